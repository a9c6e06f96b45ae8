"""How many sampling requests may be in flight: a fixed window, and one that follows the server.

Pure state machines: they take events (an admission, a release with what the attempt cost) and a
time, and keep a count and a window. They hold no lock, wake nobody and read no clock; the gate in
`_async` does.

The invariant: nothing is admitted unless fewer than `size` requests are in flight. A shrink below
what is in flight therefore leaves a debt, `in_flight - size`, that releases repay before anything
is admitted again; growth cancels it.

The adaptive law is additive increase, multiplicative decrease, with what TCP learned since:

- Evidence has an age. A request that was admitted before the last decrease met the queue of the old
  window, and says nothing about the new one: each congestion costs one decrease. Requests that were
  sent before the first admission after it are such; while there is a debt, nobody is admitted.
- Slow start: until the server is found full each answer adds two slots, so that the window triples
  in a round trip. It starts again when a window that was congested once shows an empty queue.
- A window that was never full is not the bottleneck, and does not grow.
- Bursts are spread out once the server has been found full (`pacing.py`).

What congestion is depends on what the server reports:

- how long prompts queued (`prefill_queue_duration`, dedicated deployments): the law of
  `queue_law.py`. Statuses say nothing then;
- nothing of the kind (serverless): a 429, a 503 or a transport error is congestion, and shrinks the
  window at once, but only once a cooldown; from the third attempt of a request on, twice as hard.
  An interval of answers without congestion grows it by `additive_increase`. Nothing is spread out:
  full is only found by being refused.

Where both were seen within a round, the queue decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fireworks_training._core.window.pacing import Pacer
from fireworks_training._core.window.queue_law import QUEUE_ALLOWANCE, QueueLaw
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import ServerMetrics

CONGESTION_STATUS = frozenset({429, 503})
DEEP_RETRY = 3

OPENING = 2.0
"""Slots that each answer adds in slow start."""

RECOVERY = 0.75
"""Share of the window that was refused last up to which a window without queue times recovers fast.
"""

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

    def delay(self, now: float) -> float:  # noqa: ARG002
        """Seconds for which a request that takes a freed slot over is held back."""
        return 0.0

    def withdraw(self) -> None:
        """Take back an admission that was never used; no evidence of anything."""
        self._in_flight -= 1

    def release(self, metrics: ServerMetrics | None, now: float) -> None:  # noqa: ARG002
        """One attempt is over; a fixed window has nothing to learn from it."""
        self._in_flight -= 1

    def step_completed(self) -> dict[str, float]:
        """The summary of a step: `window` alone."""
        return {"window": float(self._size)}


class _StatusLaw:
    """The law on statuses, for servers that report no queue."""

    def __init__(self, settings: AimdSettings) -> None:
        self._settings = settings
        self._last_shrink = -math.inf
        self._refused_at = 0.0  # the window that was refused last
        self.slow_start = True
        self.exhaustions = 0
        self._answers = 0
        self._congested = 0
        self._events = 0
        self._step_answers = 0
        self._step_congested = 0

    @property
    def observed(self) -> bool:
        return self._answers > 0

    def observe(
        self, metrics: ServerMetrics, *, window: float, sent: float, now: float
    ) -> float | None:
        """Note an answer; the factor to shrink by at once, if it is news of congestion."""
        settings = self._settings
        if not is_congestion(metrics):
            # Other errors tell nothing: neither that it is crowded, nor that there is room.
            if metrics.http_status_code is not None and 200 <= metrics.http_status_code < 300:
                self._answers += 1
                self._step_answers += 1
            return None
        self._answers += 1
        self._congested += 1
        self._step_answers += 1
        self._step_congested += 1
        if sent <= self._last_shrink or now - self._last_shrink < settings.shrink_cooldown_s:
            return None
        self._last_shrink = now
        self._refused_at = window
        self._events += 1
        self.slow_start = False
        deep = metrics.retry_attempt >= DEEP_RETRY
        return settings.multiplicative_decrease ** (2 if deep else 1)

    def over(self, round_size: int) -> bool:
        return self._answers >= round_size

    def adjusted(self, window: float, *, bound: bool) -> float:
        """The next window; ends the round."""
        clean = self._answers > 0 and self._congested == 0
        self._answers = self._congested = 0
        if not (clean and bound):
            return window
        near = RECOVERY * self._refused_at
        return max(window + self._settings.additive_increase, min(near, 1.25 * window))

    def summary(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self._step_answers:
            figures["status_responses"] = float(self._step_answers)
            figures["congestion_responses"] = float(self._step_congested)
            figures["congestion_rate"] = self._step_congested / self._step_answers
        if self._events:
            figures["congestion_events"] = float(self._events)
        if self.exhaustions:
            figures["retry_exhaustions"] = float(self.exhaustions)
        return figures

    def start_step(self) -> None:
        self._events = self._step_answers = self._step_congested = self.exhaustions = 0


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
        self._queue = QueueLaw(settings)
        self._statuses = _StatusLaw(settings)
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

    def delay(self, now: float) -> float:
        """Seconds for which a request that takes a freed slot over is held back.

        None while the window opens fast: it is then smaller than what the server could take.
        """
        if self.signal != "prefill_queue" or self._queue.slow_start:
            return 0.0
        return self._pacer.delay(self._window, now)

    def release(self, metrics: ServerMetrics | None, now: float) -> None:
        """One attempt is over.

        Args:
            metrics: what it cost; None if it tells nothing about the server. Its `client_latency`
                tells when it was sent.
            now: seconds of any steady clock.
        """
        super().release(metrics, now)
        self._step.releases += 1
        self._step.window_sum += self.size
        if metrics is not None:
            self._observe(metrics, now)
        interval = self._settings.adjustment_interval
        if interval > 0 and self._law.over(min(interval, self.size)):
            self._adjust()
        if self._fresh_from == math.inf and self.has_room:
            # Here the first one since the decrease is admitted: until now there was a debt. One
            # that was handed its slot before may still be held back.
            self._fresh_from = max(now, self._pacer.due)

    def note_retry_exhausted(self, metrics: ServerMetrics | None) -> None:
        """A request gave up; counted where congestion was the cause and statuses are the signal."""
        if metrics is None or metrics.prefill_queue_duration is not None:
            return
        if is_congestion(metrics):
            self._statuses.exhaustions += 1

    @property
    def _law(self) -> QueueLaw | _StatusLaw:
        return self._queue if self.signal == "prefill_queue" else self._statuses

    def _observe(self, metrics: ServerMetrics, now: float) -> None:
        self._step.metrics += 1
        self._step.cached_tokens += metrics.cached_prompt_tokens or 0
        self._step.prompt_tokens += metrics.prompt_tokens or 0
        latency = metrics.client_latency
        sent = now - (latency or 0.0)
        queued = metrics.prefill_queue_duration
        if queued is not None and not 0.0 <= queued < math.inf:
            queued = None  # no time at all: a NaN would stay in every average
        if queued is not None:
            self.signal = "prefill_queue"
            self._queue.note(queued)
            if latency is not None:  # as it would be at the window that is aimed at
                spare = QUEUE_ALLOWANCE * self._settings.prefill_queue_target
                # A server's clock may say that a request queued for longer than it took.
                self._pacer.note(max(0.0, latency - max(0.0, queued - spare)))
            if sent > self._fresh_from:
                self._queue.observe(queued, latency, window=self._window, now=now)
        elif self.signal != "prefill_queue":
            self.signal = "status"
            factor = self._statuses.observe(metrics, window=self._window, sent=sent, now=now)
            if factor is not None:
                self._window = self._bounded(self._window * factor)
                return
        starting = self._law.slow_start and self._full and self._settings.adjustment_interval > 0
        if starting and not is_congestion(metrics):
            self._window = self._bounded(self._window + OPENING)

    def _adjust(self) -> bool:
        """End the round; whether there was anything to go by."""
        law = self._law
        if not law.observed:
            return False
        before = self._window
        self._window = self._bounded(law.adjusted(before, bound=self._full))
        if self._window < before:
            self._fresh_from = math.inf
        self._full = self._in_flight >= self.size
        return True

    def step_completed(self) -> dict[str, float]:
        """Adjust by what the round has so far, and summarise the step.

        Returns:
            `window` (before), `requests`; `avg_pq`, `ema_pq` or `status_responses`,
            `congestion_responses`, `congestion_rate`, `congestion_events`, `retry_exhaustions`;
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
        if self._adjust():
            summary["window_after"] = float(self.size)
        summary |= self._queue.summary() if by_queue else self._statuses.summary()
        if step.prompt_tokens:
            summary["cache_hit_rate"] = step.cached_tokens / step.prompt_tokens
        self._queue.start_step()
        self._statuses.start_step()
        return summary
