"""The window's law where the server reports how long prompts queued (dedicated deployments).

It notes the queue time of each answer, and at the end of a round sets the next window. It neither
counts nor admits requests; `aimd.py` does.

- Decrease: if more than one in twenty of a round queued for longer than the target, the window
  falls to the number that the server has in service, and a little more. By Little's law that number
  is `window * service / (service + queue)`, on the means of the round. It falls to no less than
  `multiplicative_decrease` of itself.
- First decrease after slow start: a blind start may be too high by any factor, and while its queue
  drains, nothing can be learned. The window falls to the number that was in service while the first
  of those requests queued (`occupancy.py`), however deep that is; by the factor if latencies are
  unknown. The round ends after a service time, and not before as many answers as that number have
  queued for too long: the requests that were in service then have then been counted.
- Increase: if nineteen of twenty, and the moving average of the means, queued for at most half the
  target, the set-point, the window grows. Between the two it stays.
- Refusal: a request that the server refused (`status_law.py`) has shrunk the window. Slow start is
  over; the window grows as after a refusal where no queue times are reported, until a whole round
  was served in a window that is larger than the refused one.
- Restart: if there was a queue at this window and none for a whole round now, the server can take
  more than it could. The window doubles, and slow start begins again.
"""

from __future__ import annotations

import math

from fireworks_training._core.window.occupancy import Occupancy
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training._core.window.status_law import growth_after_refusal

TAIL_SHARE = 0.05
"""Share of a round's requests that may queue for longer than the target."""

SET_POINT = 0.5
"""Share of the target up to which the window grows."""

EMPTY_SHARE = 0.05
"""Share of the target below which a queue counts as empty."""

QUEUED_SHARE = 0.1
"""Share of the target above which the mean of a round shows a queue."""

QUEUE_ALLOWANCE = 0.2
"""Share of the target that requests may still queue for in a window that has been decreased."""

MIN_ANSWERS_PER_ROUND = 16
"""Answers without a queue that make a round at least: fewer may be chance."""

ROUNDS_BEFORE_FAST_GROWTH = 1
"""Rounds without any queue after which a round's growth is an eighth of the window."""

ROUNDS_BEFORE_SLOW_START = 2
"""Rounds without any queue after which slow start begins again, in a window below any that showed a
queue."""

GROWTH_SCALE = 64
"""Window from which on growth is proportional to the window: `additive_increase` for each 64."""


class QueueLaw:
    """Sets the window by the queue times of answers.

    Args:
        settings: the constants.

    Attributes:
        slow_start: whether each answer opens the window.
        ema: moving average of the rounds' mean queue times in seconds; None before the first.
    """

    def __init__(self, settings: AimdSettings) -> None:
        self._settings = settings
        self._target = settings.prefill_queue_target
        self._queued_at = math.inf  # the least window that showed a queue
        self._empty = 0  # answers with an empty queue, one after another
        self._blind = True  # no decrease since slow start began
        self._refused_at = 0.0  # the window that was refused last; 0 if the limit has moved since
        self._occupancy = Occupancy()
        self._step_sum = 0.0
        self._step_count = 0
        self.slow_start = True
        self.ema: float | None = None
        self._now = 0.0
        self._full_at = 0.0  # when the service of the round's first overlong queuer began
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
        """Note a queue time, fresh or stale, for the summary of the step."""
        self._step_sum += queued
        self._step_count += 1

    def observe(self, queued: float, latency: float | None, *, window: float, now: float) -> None:
        """Note an answer to a request that was admitted since the last decrease.

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

    def refused(self, window: float) -> None:
        """Note that the server refused a request in this window, which was shrunk for it."""
        self._refused_at = window
        self.slow_start = self._blind = False
        self._empty = 0
        self.ema = None  # it was the old window's
        self._start_round()

    def over(self, round_size: int) -> bool:
        """Whether the round is over: complete, or clear in its verdict before."""
        answers = len(self._queues)
        if not (self._blind and self._over):
            return answers >= round_size or self._over > 0.5 * round_size
        if answers >= 2 * max(round_size, self._occupancy.mean):
            return True
        ripe = self._now >= self._full_at + self._service / answers
        return ripe and self._over > max(TAIL_SHARE * round_size, self._occupancy.mean - 0.5)

    def end_round(self, window: float, *, bound: bool) -> float:
        """End the round, and return the next window.

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
        if self._refused_at:
            growth = growth_after_refusal(window, self._refused_at, settings.additive_increase)
            if window > self._refused_at:
                self._refused_at = 0.0
                self._empty = 0
            return growth
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
        self.ema = None  # it was the old window's
        return min(window - 1.0, aim)

    def summary(self) -> dict[str, float]:
        """Summarise the step."""
        figures: dict[str, float] = {}
        if self._step_count:
            figures["avg_pq"] = self._step_sum / self._step_count
        if self.ema is not None:
            figures["ema_pq"] = self.ema
        return figures

    def start_step(self) -> None:
        """Begin another step's summary."""
        self._step_sum = 0.0
        self._step_count = 0
