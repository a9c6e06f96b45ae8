"""Fakes for tests of this package and of code that uses it.

`ManualClock` stands in for a steady clock: it moves only when a test says so.
"""

from __future__ import annotations

from fireworks_training.errors import InvalidArgument

__all__ = ["ManualClock"]


class ManualClock:
    """A steady clock in seconds that moves only by `advance`.

    Pass it where a clock is taken: `AdaptiveConcurrencyController(clock=ManualClock())`.

    Args:
        start: its first reading.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move on; never backwards."""
        if seconds < 0:
            raise InvalidArgument(f"a steady clock can't go back by {-seconds} s")
        self._now += seconds
