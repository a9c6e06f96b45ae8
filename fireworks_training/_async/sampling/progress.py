"""What a sampler is busy with, and the line it logs when a call takes long.

One timer serves all calls of a sampler: a thousand rollouts that wait for the same reason say so in
one line. It counts; it neither samples nor waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

FIRST_REPORT = 30.0
"""Seconds after which a call that is not done says what it waits for; then at growing intervals."""

LONGEST_REPORT_INTERVAL = 600.0

logger = logging.getLogger("fireworks_training.sampling")


class CallInProgress(Protocol):
    """One call that is under way.

    Attributes:
        context: its labels, as messages end.
        started: when it began, by the loop's clock.
        total: completions that it asks for.
        done: those that are there.
    """

    context: str
    started: float
    total: int
    done: int


class Progress:
    """The calls, attempts and waits of a sampler.

    Args:
        window: how many requests may be in flight now.
    """

    def __init__(self, window: Callable[[], int]) -> None:
        self._window = window
        self._calls: dict[CallInProgress, None] = {}  # oldest first
        self._attempts: dict[object, float] = {}  # when each began, oldest first
        self._backing_off = 0
        self._timer: asyncio.TimerHandle | None = None
        self._interval = FIRST_REPORT
        self._said_of: CallInProgress | None = None

    def begin(self, call: CallInProgress) -> None:
        """A call starts."""
        self._calls[call] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FIRST_REPORT, self._check, loop)

    def end(self, call: CallInProgress) -> None:
        """A call is over, however it went."""
        self._calls.pop(call, None)
        if not self._calls and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def attempt(self, key: object, now: float) -> None:
        """An attempt has its slot."""
        self._attempts[key] = now

    def attempt_over(self, key: object) -> None:
        """An attempt gave its slot back."""
        self._attempts.pop(key, None)

    def backing_off(self, change: int) -> None:
        """A request starts (1) or ends (-1) a wait before its next attempt."""
        self._backing_off += change

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Speak if the oldest call is due for it; look again when the next may be."""
        self._timer = None
        oldest = next(iter(self._calls), None)
        if oldest is None:
            return  # the next call starts the timer
        if oldest is not self._said_of:
            self._interval = FIRST_REPORT
        due = oldest.started + self._interval
        if loop.time() >= due:
            logger.warning("%s", self.describe(oldest, loop.time()))
            self._said_of = oldest
            self._interval += min(self._interval, LONGEST_REPORT_INTERVAL)
            due = oldest.started + self._interval
        self._timer = loop.call_at(due, self._check, loop)

    def describe(self, oldest: CallInProgress, now: float) -> str:
        """The state in one line."""
        total = sum(call.total for call in self._calls)
        done = sum(call.done for call in self._calls)
        in_flight = len(self._attempts)
        waiting = total - done - in_flight - self._backing_off
        text = (
            f"sampling: {done} of {total} done, window {self._window()}, {in_flight} in flight, "
            f"{waiting} waiting for a slot, {self._backing_off} waiting to retry"
        )
        if self._attempts:
            text += f", oldest {now - next(iter(self._attempts.values())):.0f} s"
        return text + oldest.context
