"""Decides whether an event loop is blocked, from questions that it should have answered.

A watcher in a thread of its own asks the loop now and then for a sign of life. This module knows
times, in seconds of any monotonic clock, and nothing of threads, loops or stacks.

- A question that stays unanswered means that the loop is in a call that does not return. The
  watcher finds the call while it lasts, and notes it here.
- If the watcher itself slept far too long, the whole process stood still (a call that holds the
  interpreter's lock, or the machine was suspended), and no call could be found.
- Blocks are not reported one by one: a warning is due at once, and the next ones ever later.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireworks_training._core.waits.reports import ReportSchedule

OVERSLEPT = 1.0
"""Seconds beyond its pause after which the watcher counts as kept from running."""


@dataclass(frozen=True, slots=True)
class Block:
    """Holds the facts of a block that has ended.

    Attributes:
        seconds: its duration, at least.
        where: the function that blocked; "" where that is unknown.
        frozen: whether the whole process stood still for most of it.
    """

    seconds: float
    where: str
    frozen: bool


class LoopHealth:
    """Decides whether one loop is blocked, and when to report it.

    Args:
        limit: seconds without an answer that count as a block.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._asked: float | None = None
        self._where = ""
        self._frozen = 0.0
        self._still = ReportSchedule(0.0)
        self._reports: ReportSchedule | None = None
        self._unreported = 0

    @property
    def waiting(self) -> bool:
        """Whether a question is unanswered."""
        return self._asked is not None

    def ask(self, now: float) -> None:
        """Note that a question was sent."""
        self._asked, self._where, self._frozen = now, "", 0.0
        self._still = ReportSchedule(now)

    def note(self, where: str) -> None:
        """Note the function in which the loop is while it does not answer."""
        self._where = where

    def overslept(self, seconds: float) -> None:
        """Note by how many seconds the watcher woke too late."""
        if seconds > OVERSLEPT:
            self._frozen += seconds

    def forget(self) -> None:
        """Drop the question: the loop does not run, and that is no block."""
        self._asked = None

    def take_long_block(self, now: float) -> float | None:
        """Give the seconds of a block that goes on, if a report of it is due; None otherwise."""
        if self._asked is None or not self._still.take_if_due(now):
            return None
        return now - self._asked

    def answer(self, now: float) -> Block | None:
        """Note the loop's answer; gives the block that it ends, if it was one."""
        asked, self._asked = self._asked, None
        if asked is None or now - asked < self._limit:
            return None
        seconds = now - asked
        return Block(seconds, self._where, self._frozen > seconds / 2)

    def take_unreported(self, now: float) -> int | None:
        """Count a block; gives how many before it were not reported, or None to report nothing."""
        if self._reports is None:
            self._reports = ReportSchedule(now)
        elif not self._reports.take_if_due(now):
            self._unreported += 1
            return None
        unreported, self._unreported = self._unreported, 0
        return unreported
