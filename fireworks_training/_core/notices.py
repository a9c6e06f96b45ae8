"""When to say that something is still being waited for: once at 30 s, then ever more rarely."""

from __future__ import annotations

FIRST_NOTICE = 30.0
"""Seconds of silence before the first word."""


class Notices:
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

    def due(self, now: float) -> bool:
        """Whether to speak now; speaking moves the next notice on."""
        if now < self._due:
            return False
        self._gap *= 2
        self._due = now + self._gap
        return True
