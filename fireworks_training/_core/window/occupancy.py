"""How many requests a server had in service at once, from what each answer tells of its own.

An answer that says how long its request queued tells when it was in service: from then until it
ended. A request that queued found the server full, and so, while it did, those in service are what
the server can take of this client's.

Pure: it takes times, and holds the answers of the last few round trips.
"""

from __future__ import annotations

from collections import deque


class Occupancy:
    """Mean number in service over a span of time that is chosen after the fact."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()  # begin and end of each service
        self._begin = self._end = 0.0
        self._total = 0.0

    def note(self, begin: float, end: float, *, keep: int) -> None:
        """A request was in service from `begin` to `end`; the last `keep` are remembered."""
        self._recent.append((begin, end))
        while len(self._recent) > keep:
            self._recent.popleft()
        self._total += self._overlap(begin, end)

    def measure(self, begin: float, end: float) -> None:
        """From now on `mean` is that of this span."""
        self._begin, self._end = begin, end
        self._total = sum(self._overlap(*one) for one in self._recent)

    def _overlap(self, begin: float, end: float) -> float:
        return max(0.0, min(end, self._end) - max(begin, self._begin))

    @property
    def mean(self) -> float:
        """Requests in service over the span, as far as they have been answered; 0 without one."""
        length = self._end - self._begin
        return self._total / length if length > 0 else 0.0
