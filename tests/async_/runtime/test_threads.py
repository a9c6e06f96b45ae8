"""Threads of the SDK's own: nothing of the caller's is waited for, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable

import pytest

from fireworks_training._async.runtime import threads
from fireworks_training._async.runtime.threads import in_thread
from tests.async_.sampling.support import until


async def fill_default_executor(until_set: threading.Event) -> list[asyncio.Task[bool]]:
    """Take every thread of the loop's default executor, as a caller's blocking functions do."""
    return [asyncio.create_task(asyncio.to_thread(until_set.wait)) for _ in range(100)]


async def test_a_full_default_executor_holds_nothing_up() -> None:
    release = threading.Event()
    blocked = await fill_default_executor(release)
    try:
        assert await in_thread(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(TimeoutError):  # the control: what the caller filled is full
            await asyncio.wait_for(asyncio.to_thread(int), 0.05)
    finally:
        release.set()
        await asyncio.gather(*blocked)


async def test_errors_and_context_come_along() -> None:
    where = contextvars.ContextVar("where", default="nowhere")
    where.set("here")
    assert await in_thread(where.get) == "here"

    def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await in_thread(broken)

    def stops() -> None:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        await in_thread(stops)


async def test_the_threads_are_daemons_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "MAX_THREADS", 3)
    monkeypatch.setattr(threads, "_threads", threads._Threads())
    release, seen = threading.Event(), set[threading.Thread]()

    def work() -> None:
        seen.add(threading.current_thread())
        release.wait()

    tasks = [asyncio.create_task(in_thread(work)) for _ in range(10)]
    await until(lambda: len(seen) == 3)
    release.set()
    await asyncio.gather(*tasks)
    assert len(seen) == 3
    assert all(thread.daemon for thread in seen)


async def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "IDLE_SECONDS", 0.01)
    pool = threads._Threads()
    monkeypatch.setattr(threads, "_threads", pool)
    thread = await in_thread(threading.current_thread)
    await until(lambda: not thread.is_alive())
    assert (pool._threads, pool._free) == (0, 0)
    assert await in_thread(threading.current_thread) is not thread


async def test_a_cancelled_caller_leaves_and_its_work_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "MAX_THREADS", 1)
    monkeypatch.setattr(threads, "_threads", threads._Threads())
    release, begun = threading.Event(), list[str]()

    def work(name: str, wait: Callable[[], object] = bool) -> None:
        begun.append(name)
        wait()

    first = asyncio.create_task(in_thread(work, "first", release.wait))
    await until(lambda: begun == ["first"])
    second = asyncio.create_task(in_thread(work, "second"))
    await asyncio.sleep(0)
    for task in (first, second):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    release.set()
    await in_thread(work, "third")
    assert begun == ["first", "third"]


def test_a_loop_that_ends_before_the_work_harms_nobody() -> None:
    release = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(in_thread(release.wait))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(main())
    release.set()
    assert asyncio.run(in_thread(int)) == 0
