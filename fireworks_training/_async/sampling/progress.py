"""`Progress`: counts what a sampler has under way, and logs a line when a call takes long.

One timer serves all calls of a sampler: a thousand rollouts that wait for the same reason are one
line. It counts; it neither samples nor waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from fireworks_training._core.waits.reports import ReportSchedule

FIRST_REPORT = 30.0
"""Seconds after which a call that is not done is logged; then at doubling intervals."""

logger = logging.getLogger("fireworks_training.sampling")


class CallInProgress(Protocol):
    """Describes one call that is under way.

    Attributes:
        labels: those of the call, as the end of a message.
        started: when it began, by the loop's clock.
        total: completions that it asks for.
        done: completions that are there.
    """

    labels: str
    started: float
    total: int
    done: int


class Progress:
    """Counts the calls, attempts and back-offs of a sampler.

    Args:
        window: returns how many requests may be in flight now.
        first_report: seconds after which a call that is not done is logged.
    """

    def __init__(self, window: Callable[[], int], *, first_report: float = FIRST_REPORT) -> None:
        self._window = window
        self._first_report = first_report
        self._calls: dict[CallInProgress, None] = {}  # oldest first
        self._attempts: dict[object, float] = {}  # when each began, oldest first
        self._backing_off = 0
        self._why = ""  # the failure that was noted last
        self._timer: asyncio.TimerHandle | None = None
        self._schedule = ReportSchedule(0.0)  # that of the call that was the oldest last
        self._scheduled: CallInProgress | None = None

    def begin(self, call: CallInProgress) -> None:
        """Count a call that starts."""
        self._calls[call] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._first_report, self._check, loop)

    def end(self, call: CallInProgress) -> None:
        """Forget a call that is over, however it went."""
        self._calls.pop(call, None)
        if not self._calls and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def attempt(self, key: object, now: float) -> None:
        """Count an attempt that has its slot."""
        self._attempts[key] = now

    def attempt_over(self, key: object) -> None:
        """Forget an attempt that gave its slot back."""
        self._attempts.pop(key, None)

    def backing_off(self, change: int) -> None:
        """Count a request that starts (1) or ends (-1) a wait before its next attempt."""
        self._backing_off += change

    def failed(self, why: str) -> None:
        """Note why an attempt failed that will be made again."""
        self._why = why

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Log the state if the oldest call is due for it; look again when the next may be."""
        self._timer = None
        oldest = next(iter(self._calls), None)
        if oldest is None:
            return  # the next call starts the timer
        if oldest is not self._scheduled:
            self._scheduled = oldest
            self._schedule = ReportSchedule(oldest.started, first=self._first_report)
        if self._schedule.take_if_due(loop.time()):
            logger.warning("%s", self.describe(oldest, loop.time()))
        self._timer = loop.call_at(self._schedule.next, self._check, loop)

    def describe(self, oldest: CallInProgress, now: float) -> str:
        """Describe the state in one line."""
        total = sum(call.total for call in self._calls)
        done = sum(call.done for call in self._calls)
        in_flight = len(self._attempts)
        waiting = total - done - in_flight - self._backing_off
        text = (
            f"sampling: {done} of {total} done, window {self._window()}, {in_flight} in flight, "
            f"{waiting} waiting for a slot, {self._backing_off} waiting to retry"
        )
        if self._backing_off and self._why:
            text += f" (last failure: {self._why})"
        if self._attempts:
            text += f", oldest {now - next(iter(self._attempts.values())):.0f} s"
        return text + oldest.labels
