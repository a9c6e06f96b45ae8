"""`Pacer`: spreads requests over time, so that an engine's slots don't turn over in step.

An engine whose requests all take about as long, and that were sent together, answers them together,
again and again: what does not fit into one such wave queues for a whole one, however little it is.
A request that takes a slot over in the midst of a wave is therefore held back a little, so that the
waves flatten out within a round trip or two.

It takes times and answers with delays; the controllers in `_async/sampling/concurrency.py` wait.
"""

from __future__ import annotations

import math

GAIN = 1.1
"""Factor by which requests are let through faster than a steady window would let them."""

BURST = 0.25
"""Share of the window that may be sent at once: so few are chance, not a wave."""

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
        """Note how long a request was in flight, in seconds."""
        old = latency if self._latency is None else self._latency
        self._latency = old + SMOOTHING * (latency - old)

    def hold_back(self, window: float, now: float) -> float:
        """Schedule the next request; returns for how many seconds it is held back."""
        if not self._latency:
            return 0.0
        gap = self._latency / (GAIN * window)
        burst = gap * max(1.0, BURST * window)
        self.due = min(max(self.due, now - burst) + gap, now + self._longest)
        return max(0.0, self.due - now)
