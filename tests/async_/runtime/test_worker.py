"""Long computations off the loop: one at a time, in order, and none lost to a cancellation."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fireworks_training._async.runtime.worker import (
    INLINE_TOKENS,
    in_worker,
    off_loop,
    with_pauses,
)


async def test_work_runs_one_piece_at_a_time_and_in_order() -> None:
    release, begun = threading.Event(), threading.Event()
    running: list[int] = []
    ran: list[tuple[int, int]] = []

    def piece(number: int) -> int:
        running.append(number)
        begun.set()
        assert release.wait(10)
        ran.append((number, len(running)))
        running.remove(number)
        return number

    tasks = [asyncio.create_task(in_worker(lambda n=n: piece(n))) for n in range(5)]  # type: ignore[misc]
    await asyncio.to_thread(begun.wait, 10)
    release.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2, 3, 4]
    assert ran == [(number, 1) for number in range(5)]


async def test_a_cancelled_piece_and_a_failed_one_let_the_next_begin() -> None:
    release, begun = threading.Event(), threading.Event()

    def stuck() -> None:
        begun.set()
        assert release.wait(10)

    def failing() -> None:
        raise ValueError("no")

    first = asyncio.create_task(in_worker(stuck))
    await asyncio.to_thread(begun.wait, 10)
    waiting = asyncio.create_task(in_worker(stuck))
    failed = asyncio.create_task(in_worker(failing))
    last = asyncio.create_task(in_worker(lambda: "done"))
    await asyncio.sleep(0)
    waiting.cancel()
    first.cancel()
    try:
        assert await asyncio.wait_for(last, 10) == "done"
        with pytest.raises(ValueError, match="no"):
            await failed
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(asyncio.CancelledError):
            await first
    finally:
        release.set()


async def test_small_work_stays_on_the_loop_and_large_work_leaves_it() -> None:
    here = threading.get_ident()
    assert await off_loop(INLINE_TOKENS, threading.get_ident) == here
    assert await off_loop(INLINE_TOKENS + 1, threading.get_ident) != here


def test_each_loop_has_a_worker_of_its_own() -> None:
    def on_a_loop() -> str:
        return asyncio.run(in_worker(lambda: "inner"))

    assert asyncio.run(in_worker(on_a_loop)) == "inner"


class Ticking:
    """A clock on which every item of work takes 0.4 ms, and what was paused when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def work(self, count: int) -> list[int]:
        found = []
        for item in with_pauses(range(count), clock=lambda: self.now, pause=self.pause):
            self.now += 0.0004
            found.append(item)
        return found

    def pause(self, seconds: float) -> None:
        assert seconds > 0  # a sleep of 0 gives nobody the interpreter
        self.pauses.append(round(self.now, 6))


def test_work_in_a_thread_pauses_each_millisecond() -> None:
    ticking = Ticking()
    assert ticking.work(10) == [*range(10)]
    assert ticking.pauses == [0.0012, 0.0024, 0.0036]


async def test_work_on_a_loop_does_not_pause_it_and_in_its_worker_does() -> None:
    ticking = Ticking()
    assert ticking.work(10) == [*range(10)]
    assert ticking.pauses == []
    assert await in_worker(lambda: ticking.work(10)) == [*range(10)]
    assert len(ticking.pauses) == 3
