"""Faults of server and network: what is retried, what is raised, and how it reads."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from aiohttp.test_utils import unused_port

from fireworks_training._async.sampling.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
)
from fireworks_training._async.sampling.retries import RetryPolicy
from fireworks_training._core.backoff import BILLING_PATIENCE, OUTAGE_PATIENCE
from fireworks_training.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    DeploymentSamplerTimeoutError,
    InvalidArgument,
    NotFound,
    SamplingRequestError,
)
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import KEY, MODEL, PROMPT, Make, quick, until

TOKEN = stub.token_chunk(2, logprobs=False)
PARTLY = stub.event(TOKEN)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (stub.status(503), "http_status"),
        (stub.status(500, b"<html>oops</html>"), "http_status"),
        (stub.status(408), "http_status"),
        (stub.status(504), "http_status"),
        (stub.stream(PARTLY), "sse_truncation"),
        (stub.stream(PARTLY[:-7]), "sse_truncation"),
        (stub.stream(PARTLY, stub.event(b"[DONE]")), "sse_truncation"),
        (stub.stream(), "sse_truncation"),
        (stub.stream(PARTLY, end=False), "connection"),
        (
            stub.stream(PARTLY, stub.event({"error": {"status": 503}}, kind="error")),
            "upstream_stream",
        ),
        (stub.stream(PARTLY, {"error": {"status_code": 429, "code": "x"}}), "upstream_stream"),
    ],
)
async def test_a_passing_fault_costs_one_attempt(
    server: CompletionsServer, make: Make, fault: stub.Behaviour, kind: str
) -> None:
    server.script = [fault]
    controller = FixedConcurrencyController(2)
    (one,) = await make(concurrency_controller=controller).sample_with_prompt_tokens(
        [1], max_tokens=2
    )
    assert one.text == "<2><3>"  # nothing of the broken attempt is in it
    assert len(server.bodies) == 2
    assert len({headers["X-Request-Id"] for headers in server.headers}) == 1
    assert controller.in_flight == 0

    server.script = [fault] * 2
    with pytest.raises(SamplingRequestError) as caught:
        await make(retries=quick(attempts=2)).sample_with_prompt_tokens([1], max_tokens=2)
    assert (caught.value.final_error_kind, caught.value.attempts) == (kind, 2)
    assert caught.value.retry_budget_exhausted


async def test_an_unpaid_account_is_waited_for_and_said(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [stub.status(402)] * 3
    (one,) = await make().sample_with_prompt_tokens([1], max_tokens=2)
    assert one.text == "<2><3>"
    said = [record for record in caplog.records if "payment required" in record.getMessage()]
    assert len(said) == 1
    server.otherwise = stub.status(402)
    with pytest.raises(SamplingRequestError, match="paid for") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=2)
    assert caught.value.final_status == 402


def test_the_usual_budgets_are_those_of_the_policy() -> None:
    usual = RetryPolicy()
    assert usual.transient()._patience == OUTAGE_PATIENCE >= 100
    assert usual.billing()._patience == BILLING_PATIENCE


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (stub.status(400, {"error": {"message": "no such field"}}), "http_status", "no such field"),
        (stub.status(401), "http_status", "Check the API key"),
        (stub.status(302), "http_status", "inference URL"),
        (stub.stream(b"data: {not json\n\n"), "upstream_stream", "not JSON"),
        (stub.stream({"error": {"type": "x"}}), "upstream_stream", "error"),
        (stub.stream(stub.event({"status": 400}, kind="error")), "upstream_stream", "400"),
        (
            stub.stream(
                {"choices": [{"text": "", "finish_reason": "stop"}]}, stub.event(b"[DONE]")
            ),
            "upstream_stream",
            "completion_token_ids",
        ),
        (
            stub.stream(stub.last_chunk({"prompt": [1]}, [7]), b"data: x\n\n"),
            "upstream_stream",
            "not JSON",
        ),
        (stub.status(200, {"text": "hello"}), "upstream_stream", "event stream"),
    ],
)
async def test_a_fault_that_no_retry_mends_is_raised_at_once(
    server: CompletionsServer, make: Make, fault: stub.Behaviour, kind: str, says: str
) -> None:
    server.otherwise = fault
    with pytest.raises(SamplingRequestError, match=says) as caught:
        await make().sample_with_prompt_tokens(PROMPT, max_tokens=2, sampling_context={"step": 3})
    error = caught.value
    assert (error.final_error_kind, error.attempts) == (kind, 1)
    assert not error.retry_budget_exhausted
    assert "[step 3]" in str(error)
    assert len(server.bodies) == 1


async def test_a_page_instead_of_a_stream_is_asked_again_a_few_times(
    server: CompletionsServer, make: Make
) -> None:
    page = stub.status(200, b"<html>a proxy</html>", Content_Type="text/html")
    server.script = [page, page]
    (made,) = await make().sample_with_prompt_tokens(PROMPT, max_tokens=2)
    assert made.full_tokens
    assert len(server.bodies) == 3
    server.otherwise = page
    with pytest.raises(SamplingRequestError, match="inference URL") as caught:
        await make().sample_with_prompt_tokens(PROMPT, max_tokens=2)
    assert caught.value.attempts == 3


async def test_errors_hold_neither_prompt_nor_key_and_pickle(
    server: CompletionsServer, make: Make
) -> None:
    message = f"bad: {PROMPT + PROMPT} {KEY}"
    server.otherwise = stub.status(401, {"error": {"message": message, "code": "X"}})
    with pytest.raises(SamplingRequestError) as caught:
        await make().sample_with_prompt_tokens(PROMPT)
    error = caught.value
    for text in (str(error), repr(error), str(error.cause), str(error.as_error_record())):
        assert "987001" not in text
        assert KEY not in text
    assert isinstance(error.cause, AuthenticationFailed)
    assert error.as_error_record() == {
        "type": "SamplingRequestError",
        "logical_request_id": server.headers[0]["X-Request-Id"],
        "model": MODEL,
        "attempts": 1,
        "final_status": 401,
        "final_error_kind": "http_status",
        "request_id": server.headers[0]["X-Request-Id"],
        "retry_budget_exhausted": False,
    }
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_seven_attempts_and_their_delays(server: CompletionsServer, make: Make) -> None:
    delays: list[float] = []
    server.otherwise = stub.status(503)
    controller = AdaptiveConcurrencyController()
    with pytest.raises(SamplingRequestError, match="after 7 attempts"):
        await make(
            retries=quick(delays), concurrency_controller=controller
        ).sample_with_prompt_tokens([1])
    assert len(server.bodies) == 7
    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert controller.step_completed()["retry_exhaustions"] == 1.0


async def test_retry_after_is_a_floor(server: CompletionsServer, make: Make) -> None:
    delays: list[float] = []
    date = {"Date": "Tue, 15 Nov 1994 08:12:31 GMT", "Retry_After": "Tue, 15 Nov 1994 08:12:41 GMT"}
    server.script = [
        stub.status(503, Retry_After="7"),
        stub.status(429, **date),
        stub.status(429, Retry_After="3600"),
    ]
    await make(retries=quick(delays)).sample_with_prompt_tokens([1], max_tokens=1)
    assert delays == [7.0, 10.0, 30.0]


@pytest.mark.parametrize("hang", [stub.hang_before_headers, stub.hang_headers_only])
async def test_silence_is_a_timeout(
    server: CompletionsServer, make: Make, hang: stub.Behaviour
) -> None:
    server.script = [hang]
    sampler = make()
    (one,) = await sampler.sample_with_prompt_tokens([1], max_tokens=1, http_timeout=0.05)
    assert one.metrics.retry_attempt == 2
    assert sampler.drain_metrics()[0].transport_error == "RequestTimedOut"
    server.otherwise = hang
    with pytest.raises(DeploymentSamplerTimeoutError, match="http_timeout") as caught:
        await make(retries=quick(attempts=1)).sample_with_prompt_tokens([1], http_timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.final_error_kind == "timeout"
    await asyncio.wait_for(server.idle.wait(), 5)


async def test_a_stall_mid_stream_is_a_timeout(server: CompletionsServer, make: Make) -> None:
    server.otherwise = stub.hang_mid_stream
    with pytest.raises(DeploymentSamplerTimeoutError):
        await make(retries=quick(attempts=2)).sample_with_prompt_tokens([1], http_timeout=0.05)
    assert len(server.bodies) == 2


async def test_a_504_counts_as_a_timeout(server: CompletionsServer, make: Make) -> None:
    server.otherwise = stub.status(504)
    with pytest.raises(DeploymentSamplerTimeoutError):
        await make(retries=quick(attempts=2)).sample_with_prompt_tokens([1])


async def test_nobody_listens(make: Make, unused_tcp_port: int) -> None:
    sampler = make(url=f"http://127.0.0.1:{unused_tcp_port}", retries=quick(attempts=2))
    with pytest.raises(SamplingRequestError) as caught:
        await sampler.sample_with_prompt_tokens([1])
    assert caught.value.final_error_kind == "connection"
    assert isinstance(caught.value.cause, ConnectionFailed)


async def test_a_name_that_does_not_resolve(make: Make) -> None:
    sampler = make(url="http://no-such-host.invalid", retries=quick(attempts=1))
    with pytest.raises(SamplingRequestError) as caught:
        await sampler.sample_with_prompt_tokens([1])
    assert caught.value.final_error_kind == "connection"


@pytest.mark.parametrize(
    "loading",
    [
        stub.status(425),
        stub.status(404),
        stub.status(404, {"error": {"object": "error", "code": "NOT_FOUND", "message": "x"}}),
    ],
)
async def test_a_hot_load_is_waited_for(
    server: CompletionsServer, make: Make, loading: stub.Behaviour
) -> None:
    server.script = [loading] * 10
    assert len(await make().sample_with_prompt_tokens([1], max_tokens=1)) == 1
    assert len(server.bodies) == 11
    server.otherwise = loading
    with pytest.raises(SamplingRequestError, match="did not become ready") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=1)
    assert caught.value.attempts == 11


async def test_an_unknown_model_is_not_waited_for(server: CompletionsServer, make: Make) -> None:
    server.otherwise = stub.status(404, {"error": {"message": "x", "code": "NOT_FOUND"}})
    with pytest.raises(SamplingRequestError, match="no such deployment") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=1)
    assert isinstance(caught.value.cause, NotFound)
    assert len(server.bodies) == 1


async def test_one_failed_sample_does_not_lose_the_others(
    server: CompletionsServer, either: Make, caplog: pytest.LogCaptureFixture
) -> None:
    refused = stub.status(400, {"error": {"message": "content filter"}})
    server.script = [refused]
    sampler = either(concurrency_controller=FixedConcurrencyController(1))
    with pytest.raises(SamplingRequestError, match=r"content filter.* 7 of the call's 8") as caught:
        await sampler.sample_with_prompt_tokens([1], n=8, max_tokens=2)
    came = caught.value.completions
    assert [one.sample_index for one in came] == [1, 2, 3, 4, 5, 6, 7]
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.completions == came
    assert str(again) == str(caught.value)

    server.script = [refused]
    found = await sampler.sample_with_prompt_tokens(
        [[1], [2]], n=4, max_tokens=2, return_partial=True
    )
    assert [(one.prompt_index, one.sample_index) for one in found] == [
        (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)
    ]  # fmt: skip
    assert "1 of 8 completions failed and are left out" in caplog.text
    assert all("return_partial" not in body for body in server.bodies)

    server.otherwise = refused
    with pytest.raises(SamplingRequestError) as caught:
        await sampler.sample_with_prompt_tokens([1], n=2, return_partial=True)
    assert caught.value.completions == ()


async def test_return_partial_has_no_effect_on_one_completion_and_is_refused(make: Make) -> None:
    with pytest.raises(InvalidArgument, match="return_partial"):
        make().sample_with_prompt_tokens_result([1], return_partial=True)
    with pytest.raises(InvalidArgument, match="return_partial"):
        make().stream([1], return_partial=True)


async def test_what_fails_one_completion_and_all_takes_its_siblings_with_it(
    server: CompletionsServer, make: Make
) -> None:
    async def fail_once_the_others_are_there(*args: Any) -> Any:
        await until(lambda: server.generating == 4)
        return await stub.status(401)(*args)

    server.script = [stub.hang_mid_stream, stub.hang_before_headers, fail_once_the_others_are_there]
    server.otherwise = stub.hang_headers_only
    controller = FixedConcurrencyController(4)
    with pytest.raises(SamplingRequestError, match="401"):
        await make(concurrency_controller=controller).sample_with_prompt_tokens([1], n=6)
    await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 3
    assert len(server.bodies) == 4  # those that waited for a slot were never sent
    assert (controller.in_flight, controller.waiting) == (0, 0)


async def test_an_aborted_completion_and_a_missing_logprob_are_tried_again(
    server: CompletionsServer, make: Make
) -> None:
    aborted = stub.completes([7], "x", finish_reason="abort")
    chunk = stub.token_chunk(2, logprobs=True, logprob=None)
    holed = stub.stream(chunk, stub.last_chunk({"prompt": [1]}, [2]))
    server.script = [aborted, holed]
    found = await make(
        concurrency_controller=FixedConcurrencyController(1)
    ).sample_with_prompt_tokens([1], n=3, max_tokens=1, logprobs=True)
    assert [one.completion_tokens for one in found] == [[2], [2], [2]]
    assert len(server.bodies) == 5
    server.otherwise = aborted
    with pytest.raises(SamplingRequestError, match="abort") as caught:
        await make().sample_with_prompt_tokens([1], max_tokens=1)
    assert caught.value.attempts == 3


async def test_a_server_without_logprobs_is_told_once(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    server.otherwise = stub.stream(TOKEN, stub.last_chunk({"prompt": [1]}, [2]))
    sampler = make()
    for _ in range(2):
        (one,) = await sampler.sample_with_prompt_tokens([1], max_tokens=1, logprobs=True)
        assert one.inference_logprobs is None
    assert caplog.text.count("sends none") == 1


async def test_a_server_that_never_answered_is_named_at_once(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The first failed connection is told; an outage after an answer is told by the waits."""
    sampler = make(url="http://127.0.0.1:9", retries=quick(attempts=2))
    with pytest.raises(SamplingRequestError):
        await sampler.sample_with_prompt_tokens([1], n=2, max_tokens=1)
    assert caplog.text.count("http://127.0.0.1:9 has not answered yet") == 1
    caplog.clear()
    sampler = make()
    await sampler.sample_with_prompt_tokens([1], max_tokens=1)
    server.script = [stub.stream(PARTLY, end=False)]
    await sampler.sample_with_prompt_tokens([1], max_tokens=1)
    assert "has not answered yet" not in caplog.text


async def test_a_server_that_never_answered_is_given_up_with_its_cure(make: Make) -> None:
    sampler = make(url=f"http://127.0.0.1:{unused_port()}", retries=quick(attempts=1 << 20))
    hosts = sampler._context.transport.hosts
    hosts.hopeless(sampler.base_url, ConnectionFailed("the first"), -10.0)
    with pytest.raises(SamplingRequestError, match=r"Nothing listens at 127\.0\.0\.1, port"):
        await sampler.sample_with_prompt_tokens([1], n=2, max_tokens=1)


async def test_https_to_a_server_of_http_is_given_up_with_its_cure(
    server: CompletionsServer, make: Make
) -> None:
    sampler = make(url=server.url.replace("http:", "https:"), retries=quick(attempts=1 << 20))
    hosts = sampler._context.transport.hosts
    hosts.hopeless(sampler.base_url, ConnectionFailed("the first"), -10.0)
    with pytest.raises(SamplingRequestError, match="write http:// instead of https://"):
        await sampler.sample_with_prompt_tokens([1], max_tokens=1)


async def test_a_server_that_has_answered_is_waited_for(
    server: CompletionsServer, make: Make
) -> None:
    """The same failure is an outage once the host has answered: it is tried to the budget's end."""
    sampler = make(retries=quick(attempts=4))
    hosts = sampler._context.transport.hosts
    hosts.hopeless(sampler.base_url, ConnectionFailed("the first"), -10.0)
    server.script = [stub.stream(PARTLY, end=False)] * 4  # the answers break off
    with pytest.raises(SamplingRequestError, match="after 4 attempts"):
        await sampler.sample_with_prompt_tokens([1], max_tokens=1)


@pytest.mark.parametrize(
    ("temperature", "full"), [(1.0, True), (0.5, False)], ids=["full", "at half"]
)
async def test_a_completion_says_whether_the_whole_distribution_was_sampled(
    temperature: float, full: bool, make: Make
) -> None:
    (one,) = await make().sample_with_prompt_tokens([1], max_tokens=1, temperature=temperature)
    assert one.full_distribution is full
