"""A steady clock that a test moves by hand."""

from __future__ import annotations

from fireworks_training.errors import InvalidArgument


class ManualClock:
    """A steady clock in seconds that moves only by `advance`.

    Pass it where a clock is taken: `AdaptiveConcurrencyController(clock=ManualClock())`.

    Args:
        start: its first reading, seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        """Read the clock, in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock on.

        Raises:
            InvalidArgument: the time is negative: a steady clock never goes back.
        """
        if seconds < 0:
            raise InvalidArgument(f"a steady clock can't go back by {-seconds} s")
        self._now += seconds
