"""How requests are spread over time, so that an engine's slots don't turn over in step.

An engine whose requests all take about as long, and that were sent together, answers them together,
again and again: what does not fit into one such wave queues for a whole one, however little it is.
A request that takes a slot over in the midst of a wave is therefore held back a little, so that the
waves flatten out within a round trip or two.

Pure: it takes times and answers with delays. The gate in `_async` waits.
"""

from __future__ import annotations

import math

GAIN = 1.1
"""Requests are let through this much faster than a steady window would let them through."""

BURST = 0.25
"""Share of the window that may be sent at once: less is chance, and no wave."""

SMOOTHING = 0.05
"""Weight of the newest latency in their moving average."""


class Pacer:
    """Lets `GAIN * window / latency` requests a second through, in bursts of `BURST` of the window.

    Args:
        longest: seconds that a request is held back at most. A wave need not be flatter than the
            queue time that is to be kept.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._latency: float | None = None
        self.due = -math.inf  # when the request before would have been sent without bursts

    def note(self, latency: float) -> None:
        """How long a request was in flight, in seconds."""
        old = latency if self._latency is None else self._latency
        self._latency = old + SMOOTHING * (latency - old)

    def delay(self, window: float, now: float) -> float:
        """Seconds for which the next request is held back; it counts as sent after them."""
        if not self._latency:
            return 0.0
        gap = self._latency / (GAIN * window)
        burst = gap * max(1.0, BURST * window)
        self.due = min(max(self.due, now - burst) + gap, now + self._longest)
        return max(0.0, self.due - now)
