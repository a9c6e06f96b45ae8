"""`FixedWindow` and `AdaptiveWindow`: count the requests in flight against a window.

They know the count, the debt after a decrease, slow start and the age of evidence; the laws that
set the window at the end of a round stand in `queue_law.py` (answers that report how long their
prompt queued) and `status_law.py` (all others). Each answer goes to the law that fits it: a refusal
shrinks the window also where other answers report queue times. The package's text has the symbols
and the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fireworks_training._checks import integer
from fireworks_training._core.window.pacing import Pacer
from fireworks_training._core.window.queue_law import QUEUE_ALLOWANCE, QueueLaw
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training._core.window.status_law import StatusLaw, is_congestion, is_success
from fireworks_training.models import ServerMetrics

SLOW_START_GROWTH = 2.0
"""Slots that each answer adds in slow start."""

Signal = Literal["prefill_queue", "status"]


class FixedWindow:
    """Keeps a window that stays as it is.

    Args:
        size: requests in flight at most, at least 1.
    """

    def __init__(self, size: int) -> None:
        self._size = integer("max_concurrency", size, 1)
        self._in_flight = 0

    @property
    def size(self) -> int:
        """Requests that may be in flight."""
        return self._size

    @property
    def in_flight(self) -> int:
        """Requests admitted and not released."""
        return self._in_flight

    @property
    def has_room(self) -> bool:
        """Whether one more may be admitted."""
        return self._in_flight < self.size

    def admit(self) -> None:
        """Count one more request; only if there is room."""
        if not self.has_room:
            raise AssertionError("admitted beyond the window")
        self._in_flight += 1

    def hold_back(self, now: float) -> float:  # noqa: ARG002
        """Hold back a request that takes over a freed slot; returns for how many seconds."""
        return 0.0

    def withdraw(self) -> None:
        """Take back an admission that was never used; no evidence of anything."""
        self._in_flight -= 1

    def release(self, metrics: ServerMetrics | None, now: float) -> None:  # noqa: ARG002
        """Count one request less; a fixed window has nothing to learn from it."""
        self._in_flight -= 1

    def step_completed(self) -> dict[str, float]:
        """Summarise a step: `window` alone."""
        return {"window": float(self._size)}


@dataclass(slots=True)
class _Step:
    """Counts what happened in one step, for its summary."""

    metrics: int = 0
    releases: int = 0
    window_sum: float = 0.0
    max_in_flight: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0


class AdaptiveWindow(FixedWindow):
    """Keeps a window that follows the server's congestion.

    Attributes:
        signal: what the newest success has told, "prefill_queue" or "status"; before any success
            "status" if there was a refusal, else None.
    """

    def __init__(self, settings: AimdSettings) -> None:
        super().__init__(settings.max_window)
        self._settings = settings
        self._window = self._bounded(settings.initial_window)
        self._queue = QueueLaw(settings)
        self._statuses = StatusLaw(settings)
        self._step = _Step()
        self._pacer = Pacer(settings.prefill_queue_target)
        self._fresh_from = -math.inf  # requests sent before were admitted before the last decrease
        self._full = False  # whether the window was full since the last adjustment
        self.signal: Signal | None = None

    def _bounded(self, window: float) -> float:
        return max(float(self._settings.min_window), min(float(self._settings.max_window), window))

    @property
    def size(self) -> int:
        """Requests that may be in flight, within `min_window` and `max_window`."""
        return int(self._window)

    @property
    def debt(self) -> int:
        """Releases that must come before the next admission."""
        return max(0, self._in_flight - self.size)

    @property
    def ema_prefill_queue(self) -> float | None:
        """Moving average of the reported queue times in seconds; None before the first round."""
        return self._queue.ema

    def admit(self) -> None:
        """Count one more request; only if there is room."""
        super().admit()
        self._step.max_in_flight = max(self._step.max_in_flight, self._in_flight)
        if self._in_flight >= self.size:
            self._full = True

    def hold_back(self, now: float) -> float:
        """Hold back a request that takes over a freed slot; returns for how many seconds.

        For none in slow start, when the window is smaller than what the server could take, and
        without queue times: full is then only found by being refused.
        """
        if self.signal != "prefill_queue" or self._queue.slow_start:
            return 0.0
        return self._pacer.hold_back(self._window, now)

    def release(self, metrics: ServerMetrics | None, now: float) -> None:
        """Count one request less, learn from its metrics, and end the round if that is complete.

        Args:
            metrics: those of the attempt; None if it gives no evidence about the server. Its
                `client_latency` dates the sending.
            now: seconds of any steady clock.
        """
        super().release(metrics, now)
        self._step.releases += 1
        self._step.window_sum += self.size
        if metrics is not None:
            self._observe(metrics, now)
        interval = self._settings.adjustment_interval
        if interval > 0 and self._round_is_over(min(interval, self.size)):
            self._end_round()
        if self._fresh_from == math.inf and self.has_room:
            # Here the first one since the decrease is admitted: until now there was a debt. One
            # that was handed its slot before may still be held back.
            self._fresh_from = max(now, self._pacer.due)

    def note_retry_exhausted(self, metrics: ServerMetrics | None) -> None:
        """Count a request that gave up, if congestion was the cause and statuses are the signal."""
        if metrics is None or metrics.prefill_queue_duration is not None:
            return
        if is_congestion(metrics):
            self._statuses.exhaustions += 1

    def _round_is_over(self, size: int) -> bool:
        """Whether enough answers came; those without a queue time count beside those with one."""
        if self._queue.observed:
            return self._queue.over(max(1, size - self._statuses.successes))
        return self._statuses.over(size)

    def _observe(self, metrics: ServerMetrics, now: float) -> None:
        self._step.metrics += 1
        self._step.cached_tokens += metrics.cached_prompt_tokens or 0
        self._step.prompt_tokens += metrics.prompt_tokens or 0
        latency = metrics.client_latency
        sent = now - (latency or 0.0)
        if is_congestion(metrics):
            self._take_refusal(metrics, sent, now)
            return
        queued = metrics.prefill_queue_duration
        if queued is not None and 0.0 <= queued < math.inf:
            self.signal = "prefill_queue"
            self._queue.note(queued)
            if latency is not None:  # less the queue that the aimed-at window would not have
                spare = QUEUE_ALLOWANCE * self._settings.prefill_queue_target
                # By a server's clock a request may have queued for longer than it took.
                self._pacer.note(max(0.0, latency - max(0.0, queued - spare)))
            if sent > self._fresh_from:
                self._queue.observe(queued, latency, window=self._window, now=now)
        elif is_success(metrics):
            self.signal = "status"
            self._statuses.observe(metrics, window=self._window, sent=sent, now=now)
            if not self._statuses.slow_start:
                return
        else:
            return  # neither that it is crowded, nor that there is room
        if self._queue.slow_start and self._full and self._settings.adjustment_interval > 0:
            self._window = self._bounded(self._window + SLOW_START_GROWTH)

    def _take_refusal(self, metrics: ServerMetrics, sent: float, now: float) -> None:
        """Shrink the window, unless the refusal is of a congestion that has shrunk it already."""
        self.signal = self.signal or "status"
        factor = self._statuses.observe(metrics, window=self._window, sent=sent, now=now)
        if factor is None:
            return
        self._queue.refused(self._window)
        self._window = self._bounded(self._window * factor)
        self._fresh_from = math.inf

    def _end_round(self) -> bool:
        """End the round; returns whether there was any evidence."""
        before = self._window
        if self._queue.observed:
            # Where some were refused there is no room, however short the queue of the others.
            bound = self._full and not self._statuses.refusals
            self._window = self._bounded(self._queue.end_round(before, bound=bound))
            self._statuses.start_round()
        elif self._statuses.observed:
            self._window = self._bounded(self._statuses.end_round(before, bound=self._full))
        else:
            return False
        if self._window < before:
            self._fresh_from = math.inf
        self._full = self._in_flight >= self.size
        return True

    def step_completed(self) -> dict[str, float]:
        """End the round with the evidence so far, and summarise the step.

        Returns:
            `window` (before), `requests`; `avg_pq`, `ema_pq` where the server reports queue times;
            where it does not, or has refused some, `status_responses`, `congestion_responses`,
            `congestion_rate`, `congestion_events`, `retry_exhaustions`;
            `pending_decrease`, `avg_window`, `max_in_flight`; `window_after` if there was anything
            to adjust by; `cache_hit_rate` if the server reports prompt tokens.
        """
        step, self._step = self._step, _Step(max_in_flight=0)
        summary: dict[str, float] = {"window": float(self.size), "requests": float(step.metrics)}
        by_queue = self.signal == "prefill_queue"
        if self.debt:
            summary["pending_decrease"] = float(self.debt)
        if step.releases:
            summary["avg_window"] = step.window_sum / step.releases
        summary["max_in_flight"] = float(step.max_in_flight)
        if self._end_round():
            summary["window_after"] = float(self.size)
        if by_queue:
            summary |= self._queue.summary()
        if not by_queue or self._statuses.refused_in_step:
            summary |= self._statuses.summary()
        if step.prompt_tokens:
            summary["cache_hit_rate"] = step.cached_tokens / step.prompt_tokens
        self._queue.start_step()
        self._statuses.start_step()
        return summary
