"""What an `on_event` hook hears of sampling, and that it can break nothing."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from fireworks_training import (
    AdaptiveConcurrencyController,
    AsyncFiretitanServiceClient,
    DeploymentSampler,
    Event,
    FailureEvent,
    FinishEvent,
    InvalidArgument,
    RetryEvent,
    SamplingRequestError,
    SubmitEvent,
    WindowEvent,
)
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import KEY, MODEL, Make, quick


async def test_a_retried_completion_is_told_in_order(server: CompletionsServer, make: Make) -> None:
    server.script = [stub.status(500)]
    heard = list[Event]()
    sampler = make(on_event=heard.append)
    result = await sampler.sample_with_prompt_tokens_result([1], max_tokens=2)
    first, retry, second, finish = (e for e in heard if not isinstance(e, WindowEvent))
    assert isinstance(first, SubmitEvent)
    assert isinstance(retry, RetryEvent)
    assert isinstance(second, SubmitEvent)
    assert isinstance(finish, FinishEvent)
    assert (first.attempt, second.attempt, retry.failures) == (1, 2, 1)
    ids = {first.id, retry.id, second.id, finish.id}
    assert ids == {result.logical_request_id} == {h["X-Request-Id"] for h in server.headers}
    assert "500" in str(retry.error)
    assert finish.metrics == result.server_metrics
    times = [event.at for event in heard]
    assert times == sorted(times)


async def test_a_completion_given_up_is_told(server: CompletionsServer, make: Make) -> None:
    server.otherwise = stub.status(503)
    heard = list[Event]()
    sampler = make(on_event=heard.append, retries=quick(attempts=2))
    with pytest.raises(SamplingRequestError) as caught:
        await sampler.sample_with_prompt_tokens([1], max_tokens=2)
    assert isinstance(heard[-1], FailureEvent)
    assert heard[-1].error is caught.value
    assert heard[-1].id == caught.value.logical_request_id
    assert KEY not in repr(heard)


async def test_each_change_of_the_window_is_told(server: CompletionsServer, make: Make) -> None:
    heard = list[Event]()
    controller = AdaptiveConcurrencyController(initial_window=2)
    sampler = make(on_event=heard.append, concurrency_controller=controller)
    await sampler.sample_with_prompt_tokens([[1], [2], [3], [4]], n=4, max_tokens=1)
    changes = [event for event in heard if isinstance(event, WindowEvent)]
    assert changes
    sizes = [changes[0].before, *(change.after for change in changes)]
    assert sizes[0] == 2
    assert sizes[-1] == controller.window_size > 2
    assert [change.before for change in changes] == sizes[:-1]  # none is missing


async def test_the_hook_runs_on_the_loop_that_does_the_work(
    server: CompletionsServer, make: Make
) -> None:
    threads = set[int]()
    sampler = make(on_event=lambda _: threads.add(threading.get_ident()))
    await sampler.sample_with_prompt_tokens([1], n=3, max_tokens=1)
    assert len(threads) == 1
    assert threads != {threading.get_ident()}  # a sampler made by hand lives on the portal


async def test_a_hook_that_raises_is_logged_once_and_breaks_nothing(
    server: CompletionsServer, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    calls = 0

    def hook(event: Event) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError("of the hook")

    with caplog.at_level(logging.ERROR, "fireworks_training.events"):
        found = await make(on_event=hook).sample_with_prompt_tokens([1], n=4, max_tokens=1)
    assert len(found) == 4
    assert calls >= 8
    (record,) = caplog.records
    assert "SubmitEvent" in record.message
    assert record.exc_info is not None


@pytest.mark.parametrize("hook", [None.__class__, "print", 3])
def test_what_is_no_plain_function_is_refused(hook: Any) -> None:
    async def coroutine(event: Event) -> None: ...

    class Callable:
        async def __call__(self, event: Event) -> None: ...

    for wrong in (coroutine, Callable(), hook if not callable(hook) else coroutine):
        with pytest.raises(InvalidArgument, match="on_event"):
            DeploymentSampler("http://localhost:9", MODEL, KEY, on_event=wrong)
        with pytest.raises(InvalidArgument, match="on_event"):
            AsyncFiretitanServiceClient.from_firetitan_config(
                api_key="k", base_url="http://localhost:9", base_model="m", on_event=wrong
            )


async def test_without_a_hook_no_event_is_made(
    server: CompletionsServer, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[str]()
    for kind in (SubmitEvent, RetryEvent, FinishEvent, FailureEvent, WindowEvent):
        usual = kind.__init__

        def count(self: Any, *args: Any, _usual: Any = usual, **fields: Any) -> None:
            made.append(type(self).__name__)
            _usual(self, *args, **fields)

        monkeypatch.setattr(kind, "__init__", count)
    server.script = [stub.status(503)]
    await make().sample_with_prompt_tokens([1], n=2, max_tokens=1)
    assert not made
    await make(on_event=lambda _: None).sample_with_prompt_tokens([1], n=2, max_tokens=1)
    assert made  # the count counts
