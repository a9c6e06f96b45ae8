"""`Occupancy`: measures how many requests a server had in service at once.

The queue time of an answer dates its service: from the end of the queue to the end of the answer. A
request that queued found the server full: the number in service while it queued is what the server
can take of this client's requests. It keeps the answers of the last few round trips.
"""

from __future__ import annotations

from collections import deque


class Occupancy:
    """Measures the mean number in service over a span of time that is chosen after the fact."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque()  # begin and end of each service
        self._begin = self._end = 0.0
        self._total = 0.0

    def note(self, begin: float, end: float, *, keep: int) -> None:
        """Note that a request was in service from `begin` to `end`; the last `keep` are kept."""
        self._recent.append((begin, end))
        while len(self._recent) > keep:
            self._recent.popleft()
        self._total += self._overlap(begin, end)

    def measure(self, begin: float, end: float) -> None:
        """Choose the span that `mean` is of from now on."""
        self._begin, self._end = begin, end
        self._total = sum(self._overlap(*one) for one in self._recent)

    def _overlap(self, begin: float, end: float) -> float:
        return max(0.0, min(end, self._end) - max(begin, self._begin))

    @property
    def mean(self) -> float:
        """Mean number in service over the span, as far as answers have come; 0 without a span."""
        length = self._end - self._begin
        return self._total / length if length > 0 else 0.0
