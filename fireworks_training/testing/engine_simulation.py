"""Runs a concurrency window against an engine of so many slots, in virtual time.

Knows queues, slots and network times; the law of the window is the window's.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from fireworks_training._core.window.aimd import AdaptiveWindow, FixedWindow
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training.models import ServerMetrics


class Window(Protocol):
    """A concurrency window as a simulation needs it: who may send, and when."""

    @property
    def size(self) -> int:
        """Requests that may be in flight."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether another request may be sent."""
        ...

    def admit(self) -> None:
        """Take a slot for a request."""
        ...

    def hold_back(self, now: float, /) -> float:
        """Seconds that a request admitted now is held back before it is sent."""
        ...

    def release(self, metrics: ServerMetrics | None, now: float, /) -> None:
        """Give a slot back, with what the attempt cost."""
        ...


@dataclass(slots=True)
class EngineRun:
    """The record of a simulated engine.

    Attributes:
        seconds: virtual time until the last answer.
        busy: share of the slot-seconds that were used, from the first request to the last one sent.
        queues: for each request, in the order of the answers: time of the answer, and the seconds
            that it queued.
        windows: time and size of the window at the start and at each change.
        refused: number of requests that were refused with 429.
    """

    seconds: float = 0.0
    busy: float = 0.0
    queues: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    windows: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    refused: int = 0

    def queue_quantile(self, share: float, *, after: float = 0.0) -> float:
        """Compute the seconds that a share of the requests queued at most.

        Args:
            share: share of the requests, 0 to 1.
            after: virtual time in seconds; requests that were answered before don't count.
        """
        queues = sorted(queue for at, queue in self.queues if at >= after)
        return queues[min(len(queues) - 1, int(share * len(queues)))] if queues else 0.0


class _Simulation:
    """Plays one run of a program with endless work, its window and an engine, event by event."""

    def __init__(
        self,
        window: Window,
        slots: Callable[[float], int],
        service: Callable[[], float],
        queue_limit: int | None,
        reports_queue: bool,
        network: float,
        lag: float,
    ) -> None:
        self.window = window
        self.slots = slots
        self.service = service
        self.queue_limit = queue_limit
        self.reports_queue = reports_queue
        self.network = network
        self.lag = lag
        self.run = EngineRun(windows=[(0.0, window.size)])
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.queue: deque[tuple[float, float, int]] = deque()  # sent, arrived, attempt
        self.running = 0
        self.retries: deque[int] = deque()
        self.used = self.offered = 0.0

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), event))

    def send(self) -> None:
        while self.left and self.window.has_room:
            self.window.admit()
            attempt = self.retries.popleft() if self.retries else 1
            self.left -= 1
            sent = self.now + self.window.hold_back(self.now) + self.lag
            self.at(sent + self.network, partial(self.arrive, sent, attempt))

    def arrive(self, sent: float, attempt: int) -> None:
        if self.queue_limit is not None and len(self.queue) >= self.queue_limit:
            self.run.refused += 1
            self.at(self.now + self.network, lambda: self.refuse(sent, attempt))
        else:
            self.queue.append((sent, self.now, attempt))
            self.start()

    def start(self) -> None:
        while self.queue and self.running < self.slots(self.now):
            sent, arrived, attempt = self.queue.popleft()
            self.running += 1
            queued = self.now - arrived
            self.at(self.now + self.service(), partial(self.end, sent, queued, attempt))

    def end(self, sent: float, queued: float, attempt: int) -> None:
        self.running -= 1
        self.start()
        self.at(self.now + self.network, lambda: self.answer(sent, queued, attempt))

    def answer(self, sent: float, queued: float, attempt: int) -> None:
        self.run.queues.append((self.now, queued))
        self.release(
            ServerMetrics(
                http_status_code=200,
                prefill_queue_duration=queued if self.reports_queue else None,
                client_latency=self.now - sent,
                retry_attempt=attempt,
            )
        )

    def refuse(self, sent: float, attempt: int) -> None:
        self.retries.append(attempt + 1)
        self.left += 1
        self.release(
            ServerMetrics(
                http_status_code=429, client_latency=self.now - sent, retry_attempt=attempt
            )
        )

    def release(self, metrics: ServerMetrics) -> None:
        self.window.release(metrics, self.now)
        if self.window.size != self.run.windows[-1][1]:
            self.run.windows.append((self.now, self.window.size))
        self.send()

    def play(self, requests: int) -> EngineRun:
        self.left = requests
        self.send()
        while self.events:
            when, _, event = heapq.heappop(self.events)
            if self.left:  # the end has no work to fill the slots with: it doesn't count
                slots, span = self.slots(self.now), when - self.now
                self.used += min(self.running, slots) * span
                self.offered += slots * span
            self.now = when
            event()
        self.run.seconds = self.now
        self.run.busy = self.used / self.offered if self.offered else 1.0
        return self.run


def simulate_engine(
    window: Window | AimdSettings | int,
    *,
    slots: int | Callable[[float], int],
    service: float,
    requests: int,
    jitter: float = 0.0,
    seed: int = 0,
    queue_limit: int | None = None,
    reports_queue: bool = True,
    network: float = 0.005,
    lag: float = 0.002,
) -> EngineRun:
    """Run a window against an engine in virtual time; there is always more work than it admits.

    Args:
        window: the arguments of an `AdaptiveConcurrencyController` as `AimdSettings(...)`; or the
            size of a fixed window; or a window of your own, which keeps what it learns.
        slots: requests that the engine serves at once, as a number or by the time in seconds.
        service: seconds of one request.
        requests: how many requests are served in all.
        jitter: service times are uniform within this share of `service`, both ways.
        seed: seed of the jitter.
        queue_limit: requests that may queue before the engine answers 429; None: any number.
        reports_queue: whether the engine reports queue times, as dedicated deployments do.
        network: seconds each way.
        lag: seconds from an admission until the request is sent: a program's loop is busy.

    Raises:
        InvalidArgument: the size of the window is less than 1.
    """
    random_source = random.Random(seed)  # noqa: S311 - a simulation, no secret

    def seconds() -> float:
        return service * (1.0 + jitter * random_source.uniform(-1.0, 1.0))

    def capacity(now: float) -> int:
        return slots if isinstance(slots, int) else slots(now)

    if isinstance(window, int):
        window = FixedWindow(window)
    elif isinstance(window, AimdSettings):
        window = AdaptiveWindow(window)
    simulation = _Simulation(window, capacity, seconds, queue_limit, reports_queue, network, lag)
    return simulation.play(requests)
