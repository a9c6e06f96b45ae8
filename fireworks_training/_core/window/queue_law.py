"""The window's law where the server reports how long prompts queued.

It sees the queue time of each answer, judges a round of as many answers as the window has slots,
and says what the next window is. It counts nobody in flight and admits nobody; `aimd.py` does.

- More than one in twenty of a round queued for longer than the target: the window falls to what the
  server has in service, with a little to spare. By Little's law that is
  `window * service / (service + queue)`, on the means of the round. It falls to no less than
  `multiplicative_decrease` of itself.
- The first decrease after slow start is the exception, because a blind start may be too high by any
  factor, and while its queue drains, nothing can be learned of it. It falls to the number that was
  in service while the first of those requests queued (`occupancy.py`), however deep that is; where
  latencies are unknown, by the factor. It waits for a service time, and until as many answers as
  that have queued for too long: those that were in service then have then been counted.
- Nineteen of twenty, and the moving average of the means, queued for less than half the target, the
  set-point: the window grows. What lies between the two is left alone.
- A queue that was there at this window and is gone for a whole round: the server can take more than
  it could. The window doubles, and slow start begins again.
"""

from __future__ import annotations

import math

from fireworks_training._core.window.occupancy import Occupancy
from fireworks_training._core.window.settings import AimdSettings

TAIL_SHARE = 0.05
"""Share of a round's requests that may queue for longer than the target."""

SET_POINT = 0.5
"""Share of the target up to which the window grows."""

EMPTY_SHARE = 0.05
"""Share of the target below which a queue counts as empty."""

QUEUED_SHARE = 0.1
"""Share of the target above which the mean of a round shows a queue."""

QUEUE_ALLOWANCE = 0.2
"""Share of the target for which a window that falls to what is in service lets requests queue."""

MIN_ANSWERS_PER_ROUND = 16
"""Answers that a round of empty queues counts at least: fewer may be chance."""

ROUNDS_BEFORE_FAST_GROWTH = 1
"""Rounds with an empty queue, without exception, after which growth is an eighth of the window."""

ROUNDS_BEFORE_SLOW_START = 2
"""Rounds of the same kind that start slow start again at a window below those that showed a queue.
"""

GROWTH_SCALE = 64
"""From this window on growth is a share of the window, not `additive_increase` itself."""


class QueueLaw:
    """The law on queue times.

    Attributes:
        slow_start: whether the window opens with each answer.
        ema: moving average of the rounds' mean queue times in seconds; None before the first.
    """

    def __init__(self, settings: AimdSettings) -> None:
        self._settings = settings
        self._target = settings.prefill_queue_target
        self._queued_at = math.inf  # the least window that showed a queue
        self._empty = 0  # answers with an empty queue, one after another
        self._blind = True  # no decrease since slow start began
        self._occupancy = Occupancy()
        self._step_sum = 0.0
        self._step_count = 0
        self.slow_start = True
        self.ema: float | None = None
        self._now = 0.0
        self._full_at = 0.0  # when the first one of the round that had queued for too long began
        self._start_round()

    def _start_round(self) -> None:
        self._queues: list[float] = []
        self._over = 0
        self._service = 0.0

    @property
    def observed(self) -> bool:
        """Whether the round has evidence."""
        return bool(self._queues)

    def note(self, queued: float) -> None:
        """A queue time, fresh or stale: for the summary of the step."""
        self._step_sum += queued
        self._step_count += 1

    def observe(self, queued: float, latency: float | None, *, window: float, now: float) -> None:
        """An answer to a request that was admitted since the last decrease.

        Args:
            queued: seconds that it queued.
            latency: seconds that it took in all; None if unknown.
            window: at present.
            now: when it came.
        """
        service = 0.0 if latency is None else max(0.0, latency - queued)
        self._occupancy.note(now - service, now, keep=4 * int(window) + 64)
        self._queues.append(queued)
        self._service += service
        if queued > self._target:
            self._over += 1
            if self._over == 1:  # the server was full while it queued
                self._full_at = now - service
                self._occupancy.measure(self._full_at - min(queued, service), self._full_at)
        self._now = now
        if queued > EMPTY_SHARE * self._target:
            self.slow_start = False
            self._empty = 0
        else:
            self._empty += 1

    def over(self, round_size: int) -> bool:
        """Whether the round is over: it is complete, or its verdict is clear before."""
        answers = len(self._queues)
        if not (self._blind and self._over):
            return answers >= round_size or self._over > 0.5 * round_size
        if answers >= 2 * max(round_size, self._occupancy.mean):
            return True
        ripe = self._now >= self._full_at + self._service / answers
        return ripe and self._over > max(TAIL_SHARE * round_size, self._occupancy.mean - 0.5)

    def adjusted(self, window: float, *, bound: bool) -> float:
        """The next window; ends the round.

        Args:
            window: at present.
            bound: whether the window was full at some time of the round.
        """
        settings, queues = self._settings, sorted(self._queues)
        tail = queues[-1 - int(TAIL_SHARE * len(queues))]
        mean = sum(queues) / len(queues)
        old = mean if self.ema is None else self.ema
        self.ema = settings.ema_alpha * mean + (1.0 - settings.ema_alpha) * old
        if mean > QUEUED_SHARE * self._target:
            self._queued_at = min(self._queued_at, window)
        if not bound:
            self._empty = 0
        if self._over > TAIL_SHARE * len(queues):
            window = self._decreased(window, mean)
        elif bound and max(tail, self.ema) <= SET_POINT * self._target:
            window += self._growth(window)
        self._start_round()
        return window

    def _growth(self, window: float) -> float:
        settings = self._settings
        if self.slow_start:  # each answer opened it, unless steps alone adjust
            return window if settings.adjustment_interval == 0 else 0.0
        rounds = self._empty / max(window, MIN_ANSWERS_PER_ROUND)
        if rounds >= (1 if window >= self._queued_at else ROUNDS_BEFORE_SLOW_START):
            self.slow_start = self._blind = True
            self._queued_at = math.inf
            return window
        growth = settings.additive_increase * max(1.0, window / GROWTH_SCALE)
        return max(growth, window / 8) if rounds >= ROUNDS_BEFORE_FAST_GROWTH else growth

    def _decreased(self, window: float, queued: float) -> float:
        service = self._service / len(self._queues)
        spare = 1.0 + (QUEUE_ALLOWANCE * self._target / service if service else 0.0)
        least = self._settings.multiplicative_decrease * window
        if not self._blind:
            aim = max(least, spare * window * service / (service + queued))
        elif self._occupancy.mean >= 1.0:
            aim = spare * self._occupancy.mean
        else:
            aim = least
        self.slow_start = self._blind = False
        self._empty = 0
        self.ema = None  # of the old window
        return min(window - 1.0, aim)

    def summary(self) -> dict[str, float]:
        """What the step has seen."""
        figures: dict[str, float] = {}
        if self._step_count:
            figures["avg_pq"] = self._step_sum / self._step_count
        if self.ema is not None:
            figures["ema_pq"] = self.ema
        return figures

    def start_step(self) -> None:
        """The summary begins anew."""
        self._step_sum = 0.0
        self._step_count = 0
