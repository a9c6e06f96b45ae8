"""Decides when a long wait is reported: after 30 s, then at doubling intervals.

Times are seconds of any monotonic clock; nothing here reads one, and nothing here logs.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_NOTICE = 30.0
"""Seconds until the first report of a wait."""

HEAD_START = 0.4
"""Seconds by which a `WaitReporter` reports early, so that a busy loop is not late."""

LOOK_EVERY = 1.0
"""Seconds between two looks at open waits, at most."""


class ReportSchedule:
    """Decides when one wait is reported.

    Args:
        started: the time when the wait began.
        first: seconds until the first report; each pause after it is twice as long as the last.
    """

    def __init__(self, started: float, *, first: float = FIRST_NOTICE) -> None:
        self._started = started
        self._due = started + first
        self._gap = first

    def age(self, now: float) -> float:
        """Give the seconds waited so far."""
        return now - self._started

    @property
    def next(self) -> float:
        """The time of the next report."""
        return self._due

    def take_if_due(self, now: float) -> bool:
        """Decide whether to report now; if so, the next report is due later."""
        if now < self._due:
            return False
        self._gap *= 2
        self._due = now + self._gap
        return True


@dataclass(slots=True)
class OpenWait:
    """Holds one operation that waits.

    Attributes:
        what: the operation's name.
        doing: the event that it waits for now.
        notices: when it is reported.
    """

    what: str
    doing: str
    notices: ReportSchedule

    def note(self, doing: str) -> None:
        """Note that it waits for another event now."""
        self.doing = doing


class WaitReporter:
    """Reports the oldest of many waits of one client.

    A thousand operations behind one that hangs are one line, not a thousand.

    Args:
        first: seconds until a wait is reported, and the shortest pause between two lines.
    """

    def __init__(self, *, first: float = FIRST_NOTICE - HEAD_START) -> None:
        self._first = first
        self._waits: dict[int, OpenWait] = {}
        self._reported_at = float("-inf")

    def __len__(self) -> int:
        return len(self._waits)

    def begin(self, key: int, what: str, doing: str, now: float) -> OpenWait:
        """Note that a wait begins; its `doing` may be changed while it lasts."""
        wait = self._waits[key] = OpenWait(what, doing, ReportSchedule(now, first=self._first))
        return wait

    def end(self, key: int) -> None:
        """Note that a wait is over, in whatever way."""
        self._waits.pop(key, None)

    def next_look(self, now: float) -> float:
        """Give the time of the next look: when a line is due, and every second, as waits change."""
        oldest = next(iter(self._waits.values()), None)
        due = now if oldest is None else max(oldest.notices.next, self._reported_at + self._first)
        return min(max(due, now), now + LOOK_EVERY)

    def look(self, now: float) -> str | None:
        """Give a line about the oldest wait, if one is due: at most one in `first` seconds."""
        oldest = next(iter(self._waits.values()), None)
        if (
            oldest is None
            or now < self._reported_at + self._first
            or not oldest.notices.take_if_due(now)
        ):
            return None
        self._reported_at = now
        behind = len(self._waits) - 1
        others = f"; {behind} more wait behind it" if behind else ""
        return f"{oldest.what}: waiting for {oldest.notices.age(now):.0f} s: {oldest.doing}{others}"
