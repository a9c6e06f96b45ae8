"""`sample_with_prompt_tokens_result`: the facts of a request and of all its attempts."""

from __future__ import annotations

import pytest

from fireworks_training.errors import InvalidArgument, NotSupported, SamplingRequestError
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import Make


async def test_each_attempt_is_told(server: CompletionsServer, make: Make) -> None:
    server.script = [stub.status(503, x_request_id="busy"), stub.stream(end=False)]
    result = await make().sample_with_prompt_tokens_result(
        [1], max_tokens=2, logical_request_id="mine"
    )
    assert (result.logical_request_id, result.attempts) == ("mine", 3)
    assert {headers["X-Request-Id"] for headers in server.headers} == {"mine"}
    assert [(one.index, one.outcome, one.error_kind) for one in result.server_attempts] == [
        (0, "retryable_error", "http_status"),
        (1, "retryable_error", "connection"),
        (2, "succeeded", None),
    ]
    assert result.server_attempts[0].status_code == 503
    assert result.server_attempts[0].response_request_id == "busy"
    assert result.upstream_response_id == "cmpl-1"
    assert result.wall_seconds > 0
    (one,) = result.completions
    assert result.server_metrics is one.metrics
    assert one.text == "<2><3>"


async def test_a_prompt_that_is_too_long_is_refused_here(make: Make) -> None:
    with pytest.raises(ValueError, match="max_seq_len is 2"):
        make().sample_with_prompt_tokens_result([1, 2], max_seq_len=2)
    with pytest.raises(InvalidArgument, match="one prompt"):
        make().sample_with_prompt_tokens_result([[1]])  # type: ignore[list-item]


async def test_a_completion_that_is_too_long_is_left_out(make: Make) -> None:
    result = await make().sample_with_prompt_tokens_result([1], max_tokens=5, max_seq_len=3)
    assert result.completions == []
    assert result.attempts == 1


async def test_the_routes_own_json(server: CompletionsServer, make: Make) -> None:
    sampler = make()
    assert sampler.account_id == "a"
    body, metrics = await sampler.async_completions_stream(
        [1], 3, logprobs=True, logical_request_id="mine", prompt_cache_key="k"
    )
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("<2><3><4>", "length")
    assert choice["raw_output"] == {"prompt_token_ids": [1], "completion_token_ids": [2, 3, 4]}
    assert choice["logprobs"]["content"][1] == {
        "token_id": 3,
        "logprob": -3 / 8,
        "sampling_logprob": -3 / 16,
    }
    assert (body["id"], body["usage"]["completion_tokens"]) == ("cmpl-1", 3)
    assert metrics.http_status_code == 200
    assert server.bodies[0]["prompt_cache_key"] == "k"
    assert server.headers[0]["X-Request-Id"] == "mine"
    body, _ = await sampler.async_completions_stream([1], 2)
    assert "logprobs" not in body["choices"][0]
    for wrong in ({"hotload_max_retries": 3}, {"r3_ttl_seconds": 1}):
        with pytest.raises(NotSupported):
            await sampler.async_completions_stream([1], **wrong)


async def test_labels_of_a_sampler_are_in_the_messages_of_its_calls(
    server: CompletionsServer, make: Make
) -> None:
    server.otherwise = stub.status(400, {"error": "no"})
    sampler = make(request_context={"run": "r1", "step": 3})
    for labels, said in (({}, "run r1, step 3"), ({"step": 4}, "run r1, step 4")):
        for _ in range(2):
            with pytest.raises(SamplingRequestError, match=said):
                await sampler.sample_with_prompt_tokens([1], sampling_context=labels)
    assert "r1" not in str(server.bodies)
    with pytest.raises(InvalidArgument, match="session, run"):
        make(request_context={"nonsense": 1})
