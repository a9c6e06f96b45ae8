"""Whether an event loop stands still: decided from questions that it should have answered.

A watcher in a thread of its own asks the loop now and then for a sign of life. Knows times, in
seconds of any monotonic clock, and nothing of threads, loops or stacks.

- A question that stays unanswered means that the loop is in a call that does not return. Where, the
  watcher looks up while it lasts, and notes here.
- If the watcher itself slept far too long, the whole process stood still (a call that holds the
  interpreter's lock, or the machine was suspended): there was nobody to look.
- The same is not said again and again: a warning is due at once, and the next one ever later.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireworks_training._core.waits.reports import FIRST_NOTICE, ReportSchedule

OVERSLEPT = 1.0
"""Seconds beyond its pause after which the watcher was kept from running."""


@dataclass(frozen=True, slots=True)
class Block:
    """The loop stood still, and goes on.

    Attributes:
        seconds: for how long, at least.
        where: what it was in; "" where nobody could look.
        frozen: whether the process stood still for most of it.
    """

    seconds: float
    where: str
    frozen: bool


class LoopHealth:
    """One loop's.

    Args:
        limit: seconds without an answer that count as a block.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._asked: float | None = None
        self._where = ""
        self._frozen = 0.0
        self._still = ReportSchedule(0.0)
        self._spoken: ReportSchedule | None = None
        self._unsaid = 0

    @property
    def waiting(self) -> bool:
        """Whether a question is unanswered."""
        return self._asked is not None

    def ask(self, now: float) -> None:
        """A question goes out."""
        self._asked, self._where, self._frozen = now, "", 0.0
        self._still = ReportSchedule(now)

    def note(self, where: str) -> None:
        """What the loop is in while it does not answer."""
        self._where = where

    def overslept(self, seconds: float) -> None:
        """The watcher woke so much later than it wanted to."""
        if seconds > OVERSLEPT:
            self._frozen += seconds

    def forget(self) -> None:
        """The loop does not run, so that it can't answer: no block."""
        self._asked = None

    def still_blocked(self, now: float) -> float | None:
        """Seconds of a block that goes on, when it is time to say so."""
        if self._asked is None or not self._still.take_if_due(now):
            return None
        return now - self._asked

    def answer(self, now: float) -> Block | None:
        """The loop answers; the block that this ends, if it was one."""
        asked, self._asked = self._asked, None
        if asked is None or now - asked < self._limit:
            return None
        seconds = now - asked
        return Block(seconds, self._where, self._frozen > seconds / 2)

    def worth_a_line(self, now: float) -> int | None:
        """For a block: how many before it were not said; None if this one is not to be either."""
        if self._spoken is None or self._spoken.take_if_due(now):
            if self._spoken is None:
                self._spoken = ReportSchedule(now, first=FIRST_NOTICE)
            unsaid, self._unsaid = self._unsaid, 0
            return unsaid
        self._unsaid += 1
        return None
