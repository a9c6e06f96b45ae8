"""When to say that something is still being waited for: once at 30 s, then ever more rarely.

Times are seconds of any monotonic clock; nothing here reads one.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_NOTICE = 30.0
"""Seconds of silence before the first word."""

HEAD_START = 0.4
"""Seconds by which a `WaitReporter` reports early, so that a busy loop is not late."""

LOOK_EVERY = 1.0
"""Seconds between looks at what waits, at most, while something does."""


class ReportSchedule:
    """Decides when a wait is worth a line.

    Args:
        started: the time when the wait began, in seconds of any monotonic clock.
        first: seconds until the first notice; each later one waits twice as long as the last.
    """

    def __init__(self, started: float, *, first: float = FIRST_NOTICE) -> None:
        self._started = started
        self._due = started + first
        self._gap = first

    def age(self, now: float) -> float:
        """Seconds waited so far."""
        return now - self._started

    @property
    def next(self) -> float:
        """The time of the next notice."""
        return self._due

    def take_if_due(self, now: float) -> bool:
        """Whether to speak now; speaking moves the next notice on."""
        if now < self._due:
            return False
        self._gap *= 2
        self._due = now + self._gap
        return True


@dataclass(slots=True)
class OpenWait:
    """One thing waited for.

    Attributes:
        what: names it.
        doing: what it waits for just now.
        notices: when to speak of it.
    """

    what: str
    doing: str
    notices: ReportSchedule

    def note(self, doing: str) -> None:
        """It waits for something else now."""
        self.doing = doing


class WaitReporter:
    """Many waits of one client, of which the oldest is worth a line now and then.

    A thousand operations behind one that hangs are one line, not a thousand.

    Args:
        first: seconds until the first word about a wait, and at least between any two lines.
    """

    def __init__(self, *, first: float = FIRST_NOTICE - HEAD_START) -> None:
        self._first = first
        self._waits: dict[int, OpenWait] = {}
        self._spoken = float("-inf")

    def __len__(self) -> int:
        return len(self._waits)

    def begin(self, key: int, what: str, doing: str, now: float) -> OpenWait:
        """Note a wait; its `doing` may be changed while it lasts."""
        wait = self._waits[key] = OpenWait(what, doing, ReportSchedule(now, first=self._first))
        return wait

    def end(self, key: int) -> None:
        """It is over, in whatever way."""
        self._waits.pop(key, None)

    def next_look(self, now: float) -> float:
        """When to look again: when a line is due, and every second, since waits come and go."""
        oldest = next(iter(self._waits.values()), None)
        due = now if oldest is None else max(oldest.notices.next, self._spoken + self._first)
        return min(max(due, now), now + LOOK_EVERY)

    def look(self, now: float) -> str | None:
        """A line about the oldest wait, if one is due: at most one in `first` seconds."""
        oldest = next(iter(self._waits.values()), None)
        if (
            oldest is None
            or now < self._spoken + self._first
            or not oldest.notices.take_if_due(now)
        ):
            return None
        self._spoken = now
        behind = len(self._waits) - 1
        others = f"; {behind} more wait behind it" if behind else ""
        return f"{oldest.what}: waiting for {oldest.notices.age(now):.0f} s: {oldest.doing}{others}"
