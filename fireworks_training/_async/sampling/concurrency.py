"""The concurrency controllers: they decide which sampling request may be sent next.

A controller is a window (`_core/window`) with two queues before it: of retries and of new requests.
Retries go before new requests: most of their work is done already. A controller belongs to no loop
and no thread: the same one may be used from one `asyncio.run` after another, or from two at once,
and so keeps what it has learned. Its state is under a lock, and each waiter is woken on its own
loop.

A slot is handed over, not announced: the release that frees it admits the first waiter of the queue
before it wakes it, so nobody overtakes, and a waiter that is cancelled after it was admitted gives
the slot to the next one. Where the window asks for it, a waiter has its slot at once and goes on a
little later, so that a burst of answers does not become a burst of requests
(`_core/window/pacing.py`).

It knows slots and waiters, and nothing of what a request samples.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

from fireworks_training._core.window.aimd import AdaptiveWindow, FixedWindow
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training._core.window.status_law import is_success
from fireworks_training._inbox import call_on
from fireworks_training.errors import NotSupported
from fireworks_training.models import ServerMetrics

logger = logging.getLogger("fireworks_training.sampling")


@runtime_checkable
class SamplingConcurrencyController(Protocol):
    """Declares what a sampler needs of a controller; any object with these members will do."""

    @property
    def window_size(self) -> int:
        """Requests that may be in flight."""
        ...

    async def acquire(self) -> None:
        """Wait for a slot; one for each HTTP attempt."""
        ...

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Give a slot back, with what the attempt cost (None: no evidence of anything)."""
        ...

    def step_completed(self) -> dict[str, float]:
        """End a step of the training loop, and summarise it."""
        ...


class _SlotWaiter:
    """Holds one `acquire` until it has its slot."""

    __slots__ = ("admitted", "delay", "future", "loop", "queue")

    def __init__(self, queue: OrderedDict[_SlotWaiter, None]) -> None:
        self.queue = queue
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.admitted = False
        self.delay = 0.0  # seconds from its admission until it goes on

    def wake(self) -> bool:
        """Let the waiter go on; False if its loop is closed. Not under the controller's lock."""
        try:
            if asyncio.get_running_loop() is self.loop:
                self._start()
                return True
        except RuntimeError:
            pass  # called from a thread without a loop: woken as from any other thread
        try:
            call_on(self.loop, self._start)
        except RuntimeError:
            return False
        return True

    def _start(self) -> None:
        if self.delay > 0:
            self.loop.call_later(self.delay, self._set)
        else:
            self._set()

    def _set(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class SlotQueue:
    """Queues requests until the window has room: retries, then new ones. Base of both controllers.

    Args:
        window: counts the slots.
        clock: returns the time in seconds, steadily.
    """

    def __init__(self, window: FixedWindow, clock: Callable[[], float]) -> None:
        self._window = window
        self._clock = clock
        self._lock = threading.Lock()
        self._waiters: OrderedDict[_SlotWaiter, None] = OrderedDict()
        self._retries: OrderedDict[_SlotWaiter, None] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotSupported(
            f"a {type(self).__name__} counts the requests of this process and does not pickle: "
            "make one in the other process"
        )

    @property
    def window_size(self) -> int:
        """Requests that may be in flight."""
        return self._window.size

    @property
    def in_flight(self) -> int:
        """Slots that are taken."""
        return self._window.in_flight

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiters) + len(self._retries)

    async def acquire(self, *, retry: bool = False) -> None:
        """Wait for a slot: first come, first served.

        Args:
            retry: whether the request was tried before: it then goes before those that were not.
        """
        with self._lock:
            # Room means that nobody waits: whatever makes room admits the waiters first.
            if self._window.has_room:
                self._window.admit()
                return
            waiter = _SlotWaiter(self._retries if retry else self._waiters)
            waiter.queue[waiter] = None
        try:
            await waiter.future
        except BaseException:
            self._leave(waiter)
            raise

    def _leave(self, waiter: _SlotWaiter) -> None:
        """Remove a waiter; a slot that it was given goes to the next one."""
        with self._lock:
            if not waiter.admitted:
                waiter.queue.pop(waiter, None)
                return
            admitted = self._pass_on()
        self._wake(admitted)

    def _pass_on(self) -> list[_SlotWaiter]:
        """Take a slot back that was handed over in vain. Under the lock."""
        self._window.withdraw()
        return self._admit_waiters()

    def _admit_waiters(self) -> list[_SlotWaiter]:
        """Give the free slots to the first waiters. Under the lock."""
        now = self._clock()
        admitted: list[_SlotWaiter] = []
        while (queue := self._retries or self._waiters) and self._window.has_room:
            waiter, _ = queue.popitem(last=False)
            self._window.admit()
            waiter.admitted = True
            waiter.delay = self._window.hold_back(now)
            admitted.append(waiter)
        return admitted

    def _wake(self, admitted: list[_SlotWaiter]) -> None:
        pending = deque(admitted)
        while pending:
            if not pending.popleft().wake():
                with self._lock:
                    pending.extend(self._pass_on())

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Give a slot back, and admit as many waiters as there is room for.

        Args:
            metrics: those of the attempt; None if it gives no evidence about the server.
        """
        with self._lock:
            self._window.release(metrics, self._clock())
            admitted = self._admit_waiters()
        self._wake(admitted)

    def step_completed(self) -> dict[str, float]:
        """End a step of the training loop.

        Returns:
            A summary, `{"window": ...}` at least.
        """
        with self._lock:
            summary = self._window.step_completed()
            admitted = self._admit_waiters()
        self._wake(admitted)
        return summary

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: window {self.window_size}, {self.in_flight} in flight, "
            f"{self.waiting} waiting>"
        )


class FixedConcurrencyController(SlotQueue):
    """Keeps at most `max_concurrency` sampling requests in flight.

    Args:
        max_concurrency: at least 1.

    Raises:
        InvalidArgument: it is less.
    """

    def __init__(self, max_concurrency: int) -> None:
        super().__init__(FixedWindow(max_concurrency), time.monotonic)

    def __reduce__(self) -> tuple[type[Self], tuple[int]]:
        """Pickle the bound; in another process it bounds the requests of that process."""
        return type(self), (self.window_size,)


class AdaptiveConcurrencyController(SlotQueue):
    """Follows what the server reports about its load, by a window that grows and shrinks (AIMD).

    With reported prefill queue times (dedicated deployments) it keeps all but one in twenty below
    the target; by 429, 503 and transport errors it shrinks on every server, and steers where no
    queue times are reported (serverless). The window triples in a round trip until the server is
    found full. From then on, where queue times are reported, a
    request that takes a freed slot over may be held back, by `prefill_queue_target` at most: those
    that ended together don't begin together. The law stands in `_core/window`.

    Args:
        initial_window: requests in flight at the start.
        min_window: the window never falls below.
        max_window: the window never grows beyond.
        prefill_queue_target: seconds that a prompt may queue on the server.
        additive_increase: growth of an adjustment; windows over 64 grow by as great a share.
        multiplicative_decrease: factor of the deepest shrink, in (0, 1); but the first one after a
            fast start falls to what is seen to be in service, however deep that is.
        ema_alpha: weight of the newest mean in the moving average of queue times, in (0, 1]; the
            window grows while both are below half the target.
        adjustment_interval: completed requests between adjustments at most; a smaller window
            adjusts each time it has turned over once. 0 adjusts only in `step_completed()`.
        shrink_cooldown_s: seconds between two shrinks by status.
        clock: steady clock in seconds, for tests.

    Raises:
        InvalidArgument: a value is out of range.
    """

    _window: AdaptiveWindow

    def __init__(
        self,
        initial_window: int = 8,
        min_window: int = 1,
        max_window: int = 4096,
        prefill_queue_target: float = 0.5,
        additive_increase: float = 1.0,
        multiplicative_decrease: float = 0.5,
        ema_alpha: float = 0.3,
        adjustment_interval: int = 256,
        shrink_cooldown_s: float = 1.0,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = AimdSettings(
            initial_window=initial_window,
            min_window=min_window,
            max_window=max_window,
            prefill_queue_target=prefill_queue_target,
            additive_increase=additive_increase,
            multiplicative_decrease=multiplicative_decrease,
            ema_alpha=ema_alpha,
            adjustment_interval=adjustment_interval,
            shrink_cooldown_s=shrink_cooldown_s,
        )
        super().__init__(AdaptiveWindow(settings), clock)
        self._settings = settings
        self._warned_of_statuses = False

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        """Pickle the settings; another process learns its window by itself, on its own clock."""
        return partial(type(self), **asdict(self._settings)), ()

    @property
    def ema_prefill_queue(self) -> float | None:
        """Moving average of the reported queue times in seconds; None before the first."""
        return self._window.ema_prefill_queue

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Give a slot back, learn from the attempt, admit as many as there is room for.

        Args:
            metrics: those of the attempt; None if it gives no evidence about the server.
        """
        before = self.window_size
        super().release(metrics)
        served = metrics is not None and is_success(metrics)
        if served and self._window.signal == "status" and not self._warned_of_statuses:
            self._warned_of_statuses = True
            logger.warning(
                "the server reports no prefill queue times: the concurrency window follows "
                "429, 503 and transport errors instead"
            )
        if self.window_size != before:
            logger.debug("concurrency window %d -> %d", before, self.window_size)

    def note_retry_exhausted(self, metrics: ServerMetrics | None) -> None:
        """Note that a request used up its attempts; `metrics` is what the last one cost."""
        with self._lock:
            self._window.note_retry_exhausted(metrics)
