"""The window's law by statuses: for refusals on every server, and for answers without queue times.

- A 429, a 503 or a transport error is congestion. It shrinks the window at once by
  `multiplicative_decrease`, but only once a cooldown and only if the request was sent after the
  last decrease; from the third attempt of a request on, twice as hard.
- A round of answers without congestion, in a window that was full, grows it by
  `additive_increase`; up to three quarters of the window that was refused last it grows by a
  quarter, and beyond that window too: the server takes more now than it did.

It neither counts nor admits requests; `aimd.py` does.
"""

from __future__ import annotations

import math

from fireworks_training._core.window.settings import AimdSettings
from fireworks_training.models import ServerMetrics

CONGESTION_STATUS = frozenset({429, 503})
"""Statuses with which a crowded server refuses a request."""

DEEP_RETRY = 3
"""Attempt of a request from which on a refusal shrinks the window twice as hard."""

RECOVERY_SHARE = 0.75
"""Share of the window that was refused last, up to which the window grows by a quarter a round."""

RECOVERY_GROWTH = 0.25
"""Share of the window that a clean round adds where the limit can't be near."""


def is_congestion(metrics: ServerMetrics) -> bool:
    """Whether an attempt failed as attempts fail on a crowded server."""
    return metrics.transport_error is not None or metrics.http_status_code in CONGESTION_STATUS


def is_success(metrics: ServerMetrics) -> bool:
    """Whether an attempt was answered with a success."""
    return metrics.http_status_code is not None and 200 <= metrics.http_status_code < 300


def growth_after_refusal(window: float, refused_at: float, least: float) -> float:
    """Return what a clean round adds to a window, by the window that was refused last.

    Args:
        window: at present.
        refused_at: the window that was refused last; 0 if none was.
        least: the growth between the two bounds within which the limit is looked for.
    """
    if window > refused_at > 0:
        return max(least, RECOVERY_GROWTH * window)
    near = RECOVERY_SHARE * refused_at
    return max(least, min(near - window, RECOVERY_GROWTH * window))


class StatusLaw:
    """Sets the window by the statuses of answers.

    Args:
        settings: the constants.

    Attributes:
        slow_start: whether each answer opens the window.
        exhaustions: requests of this step that used up their attempts.
    """

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
        """Whether the round has evidence."""
        return self._answers > 0

    @property
    def successes(self) -> int:
        """Answers of the round that were not refused."""
        return self._answers - self._congested

    @property
    def refusals(self) -> int:
        """Requests of the round that were refused."""
        return self._congested

    @property
    def refused_in_step(self) -> int:
        """Requests of the step that were refused."""
        return self._step_congested

    def start_round(self) -> None:
        """Begin another round."""
        self._answers = self._congested = 0

    def observe(
        self, metrics: ServerMetrics, *, window: float, sent: float, now: float
    ) -> float | None:
        """Note an answer; returns the factor to shrink by at once, if it is a new congestion."""
        settings = self._settings
        if not is_congestion(metrics):
            # Other errors are no evidence: neither that it is crowded, nor that there is room.
            if is_success(metrics):
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
        """Whether the round is complete."""
        return self._answers >= round_size

    def end_round(self, window: float, *, bound: bool) -> float:
        """End the round, and return the next window.

        Args:
            window: at present.
            bound: whether the window was full at some time of the round.
        """
        clean = self._answers > 0 and self._congested == 0
        self.start_round()
        if not (clean and bound):
            return window
        return window + growth_after_refusal(
            window, self._refused_at, self._settings.additive_increase
        )

    def summary(self) -> dict[str, float]:
        """Summarise the step."""
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
        """Begin another step's summary."""
        self._events = self._step_answers = self._step_congested = self.exhaustions = 0
