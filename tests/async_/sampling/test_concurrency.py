"""The controllers: admission, order, cancellation, and no tie to a loop or a thread."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from fireworks_training._async.sampling.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    SamplingConcurrencyController,
    SlotQueue,
)
from fireworks_training._core.window.aimd import FixedWindow
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import ServerMetrics
from fireworks_training.testing import ManualClock

BUSY = ServerMetrics(http_status_code=503, retry_attempt=1)


async def settled() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_both_have_the_protocol() -> None:
    assert isinstance(FixedConcurrencyController(1), SamplingConcurrencyController)
    assert isinstance(AdaptiveConcurrencyController(), SamplingConcurrencyController)


def test_arguments_are_checked() -> None:
    with pytest.raises(InvalidArgument):
        FixedConcurrencyController(0)
    with pytest.raises(ValueError, match="adjustment_interval"):
        AdaptiveConcurrencyController(adjustment_interval=-1)


async def test_at_most_the_window_is_in_flight() -> None:
    controller = FixedConcurrencyController(3)
    peak = 0

    async def work() -> None:
        nonlocal peak
        await controller.acquire()
        peak = max(peak, controller.in_flight)
        await asyncio.sleep(0)
        controller.release()

    await asyncio.gather(*(work() for _ in range(50)))
    assert (peak, controller.in_flight, controller.waiting) == (3, 0, 0)


async def test_first_come_first_served() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    order: list[int] = []

    async def work(index: int) -> None:
        await controller.acquire()
        order.append(index)
        controller.release()

    tasks = [asyncio.create_task(work(index)) for index in range(5)]
    await settled()
    controller.release()
    await controller.acquire()  # in line behind the five
    assert order == [0, 1, 2, 3, 4]
    controller.release()
    await asyncio.gather(*tasks)


async def test_a_grown_window_admits_as_many_as_fit() -> None:
    controller = AdaptiveConcurrencyController(initial_window=4, adjustment_interval=0)
    for _ in range(4):
        await controller.acquire()
    controller.release(ServerMetrics(prefill_queue_duration=0.0))
    tasks = [asyncio.create_task(controller.acquire()) for _ in range(10)]
    await settled()
    assert (controller.window_size, controller.in_flight, controller.waiting) == (4, 4, 9)
    controller.step_completed()
    await settled()
    assert (controller.window_size, controller.in_flight, controller.waiting) == (8, 8, 5)
    assert sum(task.done() for task in tasks) == 5
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert controller.in_flight == 8


async def test_growth_at_a_step_admits_too() -> None:
    controller = AdaptiveConcurrencyController(initial_window=2, adjustment_interval=0)
    await controller.acquire()
    await controller.acquire()
    controller.release(ServerMetrics(prefill_queue_duration=0.0))
    await controller.acquire()
    waiting = asyncio.create_task(controller.acquire())
    await settled()
    assert not waiting.done()
    controller.step_completed()
    await waiting
    assert controller.in_flight == 3


async def test_a_shrink_holds_admissions_until_its_debt_is_repaid() -> None:
    clock = ManualClock()
    controller = AdaptiveConcurrencyController(initial_window=4, clock=clock)
    for _ in range(4):
        await controller.acquire()
    waiting = asyncio.create_task(controller.acquire())
    controller.release(BUSY)
    controller.release()
    await settled()
    assert (controller.window_size, controller.in_flight) == (2, 2)
    assert not waiting.done()
    controller.release(BUSY)  # within the cooldown: no further shrink
    await waiting
    assert controller.window_size == 2
    clock.advance(1.0)
    controller.release(BUSY)
    assert controller.window_size == 1


async def test_retries_go_before_new_requests() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    order: list[str] = []

    async def work(name: str, *, retry: bool) -> None:
        await controller.acquire(retry=retry)
        order.append(name)
        controller.release()

    names = [("new 1", False), ("new 2", False), ("again 1", True), ("again 2", True)]
    tasks = [asyncio.create_task(work(name, retry=retry)) for name, retry in names]
    await settled()
    assert controller.waiting == 4
    controller.release()
    await asyncio.gather(*tasks)
    assert order == ["again 1", "again 2", "new 1", "new 2"]


async def test_a_cancelled_waiter_leaves_the_line() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    first = asyncio.create_task(controller.acquire())
    second = asyncio.create_task(controller.acquire())
    await settled()
    first.cancel()
    await settled()
    controller.release()
    await second
    assert (controller.in_flight, controller.waiting) == (1, 0)


async def test_a_waiter_cancelled_after_it_was_admitted_passes_the_slot_on() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    first = asyncio.create_task(controller.acquire())
    second = asyncio.create_task(controller.acquire())
    await settled()
    controller.release()  # the slot is first's from here on
    first.cancel()  # before it ran
    with pytest.raises(asyncio.CancelledError):
        await first
    await asyncio.wait_for(second, 5)
    assert (controller.in_flight, controller.waiting) == (1, 0)


class Held(FixedWindow):
    """A window that holds back whoever takes a freed slot over."""

    def __init__(self, size: int, seconds: float) -> None:
        super().__init__(size)
        self.seconds = seconds

    def hold_back(self, now: float) -> float:
        assert now == 5.0
        return self.seconds


async def test_a_waiter_that_is_held_back_has_its_slot_and_goes_on_later() -> None:
    controller = SlotQueue(Held(1, 0.01), ManualClock(5.0))
    await controller.acquire()
    waiting = asyncio.create_task(controller.acquire())
    await settled()
    controller.release()
    await settled()
    assert not waiting.done()
    assert (controller.in_flight, controller.waiting) == (1, 0)
    await asyncio.wait_for(waiting, 5)


async def test_a_waiter_cancelled_while_it_is_held_back_passes_the_slot_on() -> None:
    window = Held(1, 3600.0)
    controller = SlotQueue(window, ManualClock(5.0))
    await controller.acquire()
    first = asyncio.create_task(controller.acquire())
    second = asyncio.create_task(controller.acquire())
    await settled()
    controller.release()
    await settled()
    window.seconds = 0.0
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await asyncio.wait_for(second, 5)
    assert (controller.in_flight, controller.waiting) == (1, 0)


async def test_a_slot_given_to_nobody_is_free_again() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    only = asyncio.create_task(controller.acquire())
    await settled()
    controller.release()
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    assert controller.in_flight == 0
    await asyncio.wait_for(controller.acquire(), 5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_controller_serves_twenty_runs_under_contention(adaptive: bool) -> None:
    controller = AdaptiveConcurrencyController() if adaptive else FixedConcurrencyController(2)

    async def work() -> None:
        await controller.acquire()
        await asyncio.sleep(0)
        controller.release(ServerMetrics(prefill_queue_duration=1.0))

    async def step() -> None:
        await asyncio.gather(*(work() for _ in range(20)))

    for _ in range(20):
        asyncio.run(step())
        controller.step_completed()
        assert (controller.in_flight, controller.waiting) == (0, 0)


def test_loops_of_several_threads_share_a_window() -> None:
    controller = FixedConcurrencyController(2)
    lock = threading.Lock()
    running, peak, done = 0, 0, 0

    async def work() -> None:
        nonlocal running, peak, done
        await controller.acquire()
        with lock:
            running += 1
            peak = max(peak, running)
        await asyncio.sleep(0)
        with lock:
            running -= 1
            done += 1
        controller.release()

    async def many() -> None:
        await asyncio.gather(*(work() for _ in range(100)))

    threads = [threading.Thread(target=asyncio.run, args=(many(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (done, controller.in_flight, controller.waiting) == (400, 0, 0)
    assert peak <= 2


def test_a_slot_for_a_waiter_on_a_closed_loop_goes_to_the_next() -> None:
    controller = FixedConcurrencyController(1)
    abandoned = asyncio.new_event_loop()

    async def hold_and_wait() -> asyncio.Task[None]:
        await controller.acquire()
        task = asyncio.ensure_future(controller.acquire())
        await settled()
        return task

    task = abandoned.run_until_complete(hold_and_wait())
    abandoned.close()
    assert controller.waiting == 1

    async def after() -> None:
        waiting = asyncio.create_task(controller.acquire())
        await settled()
        controller.release()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(after())
    assert controller.in_flight == 1
    task.get_coro().close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # abandoned on purpose


def test_a_thread_without_a_loop_may_release() -> None:
    controller = FixedConcurrencyController(1)

    async def wait_for_the_thread() -> None:
        await controller.acquire()
        waiting = asyncio.create_task(controller.acquire())
        await settled()
        thread = threading.Thread(target=controller.release)
        thread.start()
        await asyncio.wait_for(waiting, 5)
        thread.join()

    asyncio.run(wait_for_the_thread())
    assert controller.in_flight == 1


async def test_no_queue_times_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    controller = AdaptiveConcurrencyController()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await controller.acquire()
            controller.release(ServerMetrics(http_status_code=200))
    assert caplog.text.count("no prefill queue times") == 1


def test_the_repr_tells_the_state() -> None:
    assert repr(FixedConcurrencyController(2)) == (
        "<FixedConcurrencyController: window 2, 0 in flight, 0 waiting>"
    )


def test_a_manual_clock_only_goes_forward() -> None:
    with pytest.raises(InvalidArgument):
        ManualClock().advance(-1)
