"""Waits that are logged, and clean-up that a cancellation does not cut."""

from __future__ import annotations

import asyncio
import logging

import pytest

from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.waits import log_if_slow


async def test_a_shielded_wait_that_is_cancelled_leaves_its_work_alone() -> None:
    works = [asyncio.get_running_loop().create_future() for _ in range(2)]
    waits = [
        asyncio.create_task(log_if_slow(asyncio.shield(works[0]), lambda: "one")),
        asyncio.create_task(log_if_slow(works[1], lambda: "two")),
    ]
    await asyncio.sleep(0)
    for wait in waits:
        wait.cancel()
    await asyncio.wait(waits)
    assert [wait.cancelled() for wait in waits] == [True, True]
    assert [work.cancelled() for work in works] == [False, True]


async def test_a_wait_is_logged_at_doubling_intervals(caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()
    at: list[float] = []
    loop = asyncio.get_running_loop()

    def what() -> str:
        at.append(loop.time())
        if len(at) == 4:
            release.set()
        return "the answer"

    began = loop.time()
    with caplog.at_level(logging.WARNING):
        await log_if_slow(release.wait(), what, first=0.01)
    assert caplog.text.count("the answer") == 4
    gaps = [later - before for before, later in zip([began, *at], at, strict=False)]
    assert all(gap >= least for gap, least in zip(gaps, (0.01, 0.02, 0.04, 0.08), strict=True))


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_is_raised_when_the_work_has_ended_with_its_failure(
    fails: bool,
) -> None:
    go_on, done = asyncio.Event(), False

    async def work() -> int:
        nonlocal done
        await go_on.wait()
        done = True
        if fails:
            raise OSError("full")
        return 1

    waiter = asyncio.create_task(finish_in_spite_of_cancellation(work()))
    for _ in range(2):
        await asyncio.sleep(0)
        waiter.cancel()
    await asyncio.sleep(0)
    assert not waiter.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await waiter
    assert done
    assert isinstance(caught.value.__cause__, OSError) is fails


async def test_without_a_cancellation_the_work_decides() -> None:
    async def fails() -> None:
        raise OSError("full")

    async def works() -> int:
        return 1

    assert await finish_in_spite_of_cancellation(works()) == 1
    with pytest.raises(OSError, match="full"):
        await finish_in_spite_of_cancellation(fails())
