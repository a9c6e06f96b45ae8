"""How many sampling requests may be in flight: a fixed window, and one that follows the server.

Pure state machines: they take events (an admission, a release with what the attempt cost) and a
time, and keep a count and a window. They hold no lock, wake nobody and read no clock; the gate in
`_async` does.

The invariant: nothing is admitted unless fewer than `size` requests are in flight. A shrink below
what is in flight therefore leaves a debt, `in_flight - size`, that releases repay before anything
is admitted again; growth cancels it.

The adaptive law is additive increase, multiplicative decrease, on one of two signals:

- the server reports how long prompts queued (`prefill_queue_duration`, dedicated deployments): at
  each adjustment the mean of the samples enters a moving average (EMA); over the target the window
  is multiplied by `multiplicative_decrease`, else it grows by `additive_increase * min(target /
  ema, 4)`. HTTP statuses say nothing in this mode;
- it does not (serverless): a 429, a 503 or a transport error is congestion, and shrinks the window
  at once, but only once a cooldown; from the third attempt of a request on, twice as hard. An
  interval with answers and without congestion grows it by `additive_increase`.

Where both were seen within an interval, the queue decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fireworks_training.errors import InvalidArgument
from fireworks_training.models import ServerMetrics

CONGESTION_STATUS = frozenset({429, 503})
DEEP_RETRY = 3
MAX_HEADROOM = 4.0
_LEAST_EMA = 0.001

Signal = Literal["prefill_queue", "status"]


class FixedWindow:
    """A window that stays as it is.

    Args:
        size: requests in flight at most, at least 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InvalidArgument(f"max_concurrency must be at least 1, got {size}")
        self._size = size
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

    def withdraw(self) -> None:
        """Take back an admission that was never used; no evidence of anything."""
        self._in_flight -= 1

    def release(self, metrics: ServerMetrics | None, now: float) -> None:  # noqa: ARG002
        """One attempt is over; a fixed window has nothing to learn from it."""
        self._in_flight -= 1

    def step_completed(self) -> dict[str, float]:
        """The summary of a step: `window` alone."""
        return {"window": float(self._size)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AimdSettings:
    """The constants of the adaptive law; see `AdaptiveConcurrencyController` for their meaning."""

    initial_window: int = 8
    min_window: int = 1
    max_window: int = 256
    prefill_queue_target: float = 0.5
    additive_increase: float = 1.0
    multiplicative_decrease: float = 0.5
    ema_alpha: float = 0.3
    adjustment_interval: int = 32
    shrink_cooldown_s: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            (self.min_window >= 1, "min_window must be at least 1"),
            (self.max_window >= self.min_window, "max_window must be at least min_window"),
            (self.initial_window >= 1, "initial_window must be at least 1"),
            (self.prefill_queue_target > 0, "prefill_queue_target must be over 0 seconds"),
            (self.additive_increase >= 0, "additive_increase must not be negative"),
            (0 < self.multiplicative_decrease < 1, "multiplicative_decrease must be in (0, 1)"),
            (0 < self.ema_alpha <= 1, "ema_alpha must be in (0, 1]"),
            (self.adjustment_interval >= 0, "adjustment_interval must not be negative"),
            (self.shrink_cooldown_s >= 0, "shrink_cooldown_s must not be negative"),
        ]
        for holds, message in problems:
            if not holds:
                raise InvalidArgument(f"{message}; got {self}")


class _PrefillQueue:
    """The law on queue times."""

    def __init__(self, settings: AimdSettings) -> None:
        self._settings = settings
        self._sum = 0.0
        self._count = 0
        self.ema: float | None = None

    @property
    def observed(self) -> bool:
        return self._count > 0

    def observe(self, seconds: float) -> None:
        self._sum += seconds
        self._count += 1

    def adjusted(self, window: float) -> float:
        """The next window; only after an observation, and it ends the interval."""
        settings = self._settings
        mean = self._sum / self._count
        if self.ema is None:
            self.ema = mean
        else:
            self.ema = settings.ema_alpha * mean + (1.0 - settings.ema_alpha) * self.ema
        if self.ema > settings.prefill_queue_target:
            return window * settings.multiplicative_decrease
        headroom = settings.prefill_queue_target / max(self.ema, _LEAST_EMA)
        return window + settings.additive_increase * min(headroom, MAX_HEADROOM)

    def summary(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self._count:
            figures["avg_pq"] = self._sum / self._count
        if self.ema is not None:
            figures["ema_pq"] = self.ema
        return figures

    def start_interval(self) -> None:
        self._sum = 0.0
        self._count = 0


class _Statuses:
    """The law on statuses, for servers that report no queue."""

    def __init__(self, settings: AimdSettings) -> None:
        self._settings = settings
        self._answers = 0
        self._congested = 0
        self._events = 0
        self._last_shrink = -math.inf
        self.exhaustions = 0

    @property
    def observed(self) -> bool:
        return self._answers > 0

    @property
    def clean(self) -> bool:
        return self._congested == 0

    def observe(self, metrics: ServerMetrics, now: float) -> float | None:
        """Note an answer; the factor to shrink by at once, if it is news of congestion."""
        settings = self._settings
        if not is_congestion(metrics):
            # Other errors tell nothing: neither that it is crowded, nor that there is room.
            if metrics.http_status_code is not None and 200 <= metrics.http_status_code < 300:
                self._answers += 1
            return None
        self._answers += 1
        self._congested += 1
        if now - self._last_shrink < settings.shrink_cooldown_s:
            return None
        self._last_shrink = now
        self._events += 1
        deep = metrics.retry_attempt >= DEEP_RETRY
        return settings.multiplicative_decrease ** (2 if deep else 1)

    def summary(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self._answers:
            figures["status_responses"] = float(self._answers)
            figures["congestion_responses"] = float(self._congested)
            figures["congestion_rate"] = self._congested / self._answers
        if self._events:
            figures["congestion_events"] = float(self._events)
        if self.exhaustions:
            figures["retry_exhaustions"] = float(self.exhaustions)
        return figures

    def start_interval(self) -> None:
        self._answers = 0
        self._congested = 0

    def start_step(self) -> None:
        self._events = 0
        self.exhaustions = 0


def is_congestion(metrics: ServerMetrics) -> bool:
    """Whether an attempt failed as attempts fail on a crowded server."""
    return metrics.transport_error is not None or metrics.http_status_code in CONGESTION_STATUS


@dataclass(slots=True)
class _Step:
    """What one step has seen, for its summary."""

    metrics: int = 0
    releases: int = 0
    window_sum: float = 0.0
    max_in_flight: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0


class AdaptiveWindow(FixedWindow):
    """A window that follows the server's congestion.

    Attributes:
        signal: what it steers by: "prefill_queue" or "status"; None before the first metrics.
    """

    def __init__(self, settings: AimdSettings) -> None:
        super().__init__(settings.max_window)
        self._settings = settings
        self._window = self._bounded(settings.initial_window)
        self._queue = _PrefillQueue(settings)
        self._statuses = _Statuses(settings)
        self._interval_releases = 0
        self._step = _Step()
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
        """Moving average of the reported queue times in seconds; None before the first."""
        return self._queue.ema

    def admit(self) -> None:
        """Count one more request; only if there is room."""
        super().admit()
        self._step.max_in_flight = max(self._step.max_in_flight, self._in_flight)

    def release(self, metrics: ServerMetrics | None, now: float) -> None:
        """One attempt is over.

        Args:
            metrics: what it cost; None if it tells nothing about the server.
            now: seconds of any steady clock.
        """
        super().release(metrics, now)
        self._step.releases += 1
        self._step.window_sum += self.size
        if metrics is not None:
            self._observe(metrics, now)
        if self._settings.adjustment_interval > 0:
            self._interval_releases += 1
            if self._interval_releases >= self._settings.adjustment_interval:
                self._adjust()

    def note_retry_exhausted(self, metrics: ServerMetrics | None) -> None:
        """A request gave up; counted where congestion was the cause and statuses are the signal."""
        if metrics is None or metrics.prefill_queue_duration is not None:
            return
        if is_congestion(metrics):
            self._statuses.exhaustions += 1

    def _observe(self, metrics: ServerMetrics, now: float) -> None:
        self._step.metrics += 1
        self._step.cached_tokens += metrics.cached_prompt_tokens or 0
        self._step.prompt_tokens += metrics.prompt_tokens or 0
        if metrics.prefill_queue_duration is not None:
            self.signal = "prefill_queue"
            self._queue.observe(metrics.prefill_queue_duration)
            return
        if self.signal is None:
            self.signal = "status"
        factor = self._statuses.observe(metrics, now)
        if factor is not None:
            self._window = self._bounded(self._window * factor)

    def _adjust(self) -> bool:
        """End the interval; whether there was anything to go by."""
        informed = self._queue.observed or self._statuses.observed
        if self._queue.observed:
            self._window = self._bounded(self._queue.adjusted(self._window))
        elif self._statuses.observed and self._statuses.clean:
            self._window = self._bounded(self._window + self._settings.additive_increase)
        self._queue.start_interval()
        self._statuses.start_interval()
        self._interval_releases = 0
        return informed

    def step_completed(self) -> dict[str, float]:
        """Adjust by what the interval has so far, and summarise the step.

        Returns:
            `window` (before), `requests`; `avg_pq`, `ema_pq` or `status_responses`,
            `congestion_responses`, `congestion_rate`, `congestion_events`, `retry_exhaustions`;
            `pending_decrease`, `avg_window`, `max_in_flight`; `window_after` if there was anything
            to adjust by; `cache_hit_rate` if the server reports prompt tokens.
        """
        step, self._step = self._step, _Step(max_in_flight=0)
        summary: dict[str, float] = {"window": float(self.size), "requests": float(step.metrics)}
        summary |= self._queue.summary() if self._queue.observed else self._statuses.summary()
        if self.debt:
            summary["pending_decrease"] = float(self.debt)
        if step.releases:
            summary["avg_window"] = step.window_sum / step.releases
        summary["max_in_flight"] = float(step.max_in_flight)
        if self._adjust():
            summary["window_after"] = float(self.size)
        if step.prompt_tokens:
            summary["cache_hit_rate"] = step.cached_tokens / step.prompt_tokens
        self._statuses.start_step()
        return summary
