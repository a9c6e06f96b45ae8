"""`sample_with_prompt_tokens_result`: the facts of a request and of all its attempts."""

from __future__ import annotations

import pytest

from fireworks_training.errors import InvalidArgument
from tests import stub_completions as stub
from tests.async_.sampling.support import Make
from tests.stub_completions import CompletionServer


async def test_each_attempt_is_told(server: CompletionServer, make: Make) -> None:
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
