"""The two handles, with an outcome that the test fills in."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
from typing import Any

import pytest

from fireworks_training import (
    APIFuture,
    ClientClosed,
    InvalidArgument,
    OperationCancelled,
    PrecedingOperationFailed,
    SampleCall,
)
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._outcome import Outcome
from fireworks_training.errors import OwnerLoopGone, WrongLoop


def call_on(outcome: Outcome[int], started: list[int]) -> SampleCall[int]:
    def start() -> Outcome[int]:
        started.append(1)
        return outcome

    return SampleCall(start, label="a sample")


def test_a_result_waited_for_in_a_thread() -> None:
    outcome: Outcome[int] = Outcome()
    future = APIFuture(outcome)
    threading.Timer(0.01, outcome.settle, [7]).start()
    assert future.result(5) == 7
    assert future.done()
    assert future.future().result(0) == 7


def test_a_waiter_that_times_out_leaves_the_work_alone() -> None:
    asked: list[str] = []

    def cancel() -> bool:
        asked.append("cancel")
        return True

    outcome: Outcome[int] = Outcome(cancel=cancel)
    future = APIFuture(outcome)
    with pytest.raises(TimeoutError, match="goes on"):
        future.result(0.001)
    assert asked == []
    assert not future.future().cancel()  # an Outcome always counts as running
    assert future.cancel()
    assert asked == ["cancel"]


async def test_awaited_on_two_loops() -> None:
    outcome: Outcome[int] = Outcome()
    future = APIFuture(outcome)

    async def elsewhere() -> int:
        return await future

    there = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    here = asyncio.ensure_future(elsewhere())
    await asyncio.sleep(0)
    outcome.settle(3)
    assert (await there, await here) == (3, 3)


async def test_a_cancelled_waiter_is_not_the_work() -> None:
    outcome: Outcome[int] = Outcome()
    future = APIFuture(outcome)
    waiter = asyncio.ensure_future(future.result_async())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    outcome.settle(1)
    assert await future == 1


def test_a_failure_that_nobody_retrieved_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    outcome: Outcome[int] = Outcome(label="optim_step")
    future = APIFuture(outcome)
    outcome.fail(InvalidArgument("wrong"))
    with caplog.at_level(logging.ERROR):
        del future
        gc.collect()
    assert "optim_step failed, and nobody asked" in caplog.text


def test_one_that_was_retrieved_is_not_and_its_cause_counts_as_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cause = InvalidArgument("wrong")
    first: Outcome[int] = Outcome()
    second: Outcome[int] = Outcome()
    first.fail(cause)
    second.fail(PrecedingOperationFailed("so this too", cause=cause))
    futures = [APIFuture(first), APIFuture(second)]
    with pytest.raises(PrecedingOperationFailed):
        futures[1].result()
    with caplog.at_level(logging.ERROR):
        futures.clear()
        gc.collect()
    assert caplog.text == ""


def test_a_sample_call_starts_once_and_gives_the_same_again() -> None:
    outcome: Outcome[int] = Outcome()
    outcome.settle(5)
    started: list[int] = []
    call = call_on(outcome, started)
    assert asyncio.run(call) == 5
    assert asyncio.run(call) == 5
    assert call.result() == 5
    assert started == [1]


async def test_a_sample_call_in_everything_that_takes_a_coroutine() -> None:
    def call() -> SampleCall[int]:
        outcome: Outcome[int] = Outcome()
        asyncio.get_running_loop().call_soon(outcome.settle, 2)
        return call_on(outcome, [])

    assert await call() == 2
    assert await asyncio.gather(call(), call()) == [2, 2]
    assert await asyncio.wait_for(call(), 5) == 2
    assert await asyncio.create_task(call()) == 2
    async with asyncio.TaskGroup() as group:
        task = group.create_task(call())
    assert task.result() == 2


async def test_the_last_waiter_that_is_cancelled_takes_the_request_along() -> None:
    asked: list[str] = []

    def cancel() -> bool:
        asked.append("cancel")
        return True

    outcome: Outcome[int] = Outcome(cancel=cancel)
    call = call_on(outcome, [])

    async def wait() -> int:
        return await call

    first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert asked == []
    second.cancel()
    await asyncio.wait([second])
    assert asked == ["cancel"]


def test_a_sample_call_that_was_never_started_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="never started"):
        call_on(Outcome(), [])
    abandoned = call_on(Outcome(), [])
    abandoned.close()
    del abandoned
    gc.collect()  # warnings are errors here


def test_a_result_timeout_only_leaves() -> None:
    asked: list[str] = []

    def cancel() -> bool:
        asked.append("cancel")
        return True

    outcome: Outcome[int] = Outcome(cancel=cancel)
    call = call_on(outcome, [])
    with pytest.raises(TimeoutError):
        call.result(0.001)
    assert asked == []
    outcome.settle(1)
    assert call.result() == 1


async def nothing() -> int:
    return 1


def test_an_owner_loop_that_is_closed_says_what_to_do() -> None:
    owner = OwnerLoop()

    async def bind() -> None:
        owner.get()

    asyncio.run(bind())
    with pytest.raises(OwnerLoopGone, match="async with"):
        owner.spawn(nothing, label="test")


def test_what_is_posted_runs_in_the_context_of_who_posted_it() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    owner, loop, seen = OwnerLoop(), asyncio.new_event_loop(), list[str]()

    def post(name: str) -> None:
        who.set(name)
        owner.post(lambda: seen.append(who.get()))

    try:
        loop.run_until_complete(_bound(owner))
        for name in ("first", "second"):  # the loop is woken once, by the first
            contextvars.copy_context().run(post, name)
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
    assert seen == ["first", "second"]


def test_an_owner_loop_that_closes_just_now_is_gone_too() -> None:
    class Closing(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(self, *_: Any, **__: Any) -> asyncio.Handle:
            raise RuntimeError("Event loop is closed")

    owner, loop = OwnerLoop(), Closing()
    try:
        loop.run_until_complete(_bound(owner))
        with pytest.raises(OwnerLoopGone, match="async with"):
            owner.post(gc.collect)
        with pytest.raises(OwnerLoopGone, match="async with"):
            owner.spawn(nothing, label="test")
    finally:
        loop.close()


def test_an_owner_loop_that_stands_still_fails_its_work() -> None:
    owner = OwnerLoop(stopped_limit=0.01)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(_bound(owner))
        outcome = owner.spawn(nothing, label="test")
        assert isinstance(outcome.exception(5), OwnerLoopGone)
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


async def _bound(owner: OwnerLoop) -> None:
    owner.get()


def test_an_async_service_needs_a_running_loop() -> None:
    with pytest.raises(WrongLoop, match="running loop"):
        OwnerLoop().get()


async def test_a_hop_from_another_loop_and_its_cancellation() -> None:
    owner = OwnerLoop(portal=True)
    try:
        assert await owner.run(nothing, label="hop") == 1
        started, ended = threading.Event(), threading.Event()

        async def for_ever() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        hop = asyncio.create_task(owner.run(for_ever, label="hop"))
        assert await asyncio.to_thread(started.wait, 5)
        hop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hop
        assert await asyncio.to_thread(ended.wait, 5)
    finally:
        await asyncio.to_thread(owner.release)


def test_what_the_caller_gave_up_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    for error in (OperationCancelled("cancelled"), ClientClosed("closed")):
        outcome: Outcome[int] = Outcome()
        future = APIFuture(outcome)
        outcome.fail(error)
        with caplog.at_level(logging.ERROR):
            del future
            gc.collect()
    assert caplog.text == ""
