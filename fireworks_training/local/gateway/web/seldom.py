"""Log lines that a client could cause without end: each kind is written once in a while, counted.

Knows kinds and times. Does not know what happened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

EVERY_S = 10.0


class SeldomLog:
    """Writes at most one line of a kind in `every_s` seconds; the next one says how many were not.

    Args:
        log: where the lines go, as warnings.
        clock: monotonic seconds.
        every_s: seconds between two lines of a kind.
    """

    def __init__(
        self, log: logging.Logger, clock: Callable[[], float], every_s: float = EVERY_S
    ) -> None:
        self._log = log
        self._clock = clock
        self._every_s = every_s
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def say(self, kind: str) -> None:
        """Write the line of a kind, or count it. Kinds are the program's own texts: few."""
        now = self._clock()
        if kind in self._last and now - self._last[kind] < self._every_s:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._last[kind] = now
        more = self._left_out.pop(kind, 0)
        self._log.warning("%s%s", kind, f" ({more} more since the last line)" if more else "")
