"""Decides how long a request of the control plane is repeated: by the clock, not by a count.

A control plane that answers 5xx, or can't be reached after it once answered, is restarting: the
request is repeated for five minutes. An account whose billing is paused (402) is waited for as long
as an hour, in words. A host that has never answered is given up soon: its name is probably wrong.
"""

from __future__ import annotations

from fireworks_training._core.backoff import BILLING_PATIENCE, Backoff, is_billing, is_retryable
from fireworks_training.errors import ApiError, ApiStatusError

OUTAGE = 300.0
"""Seconds for which a request is repeated in an outage."""

LONGEST_PAUSE = 10.0
BILLING_PAUSE = 15.0
"""Seconds between two attempts, at most; and while billing is paused. Both are reached by doubling:
a 402 may be one of a moment."""

STRANGER_ATTEMPTS = 7
"""Attempts at a host that has never answered."""


class ControlPatience(Backoff):
    """Keeps the retry budget of one request of the control plane.

    Args:
        known: whether the control plane has answered before.
    """

    def __init__(self, *, known: bool) -> None:
        super().__init__(
            attempts=1 << 30, cap=LONGEST_PAUSE, max_elapsed=OUTAGE, retryable=self._may_help
        )
        self.known = known
        self.billing_paused = False
        self._paused_since: float | None = None
        self._pause = 0.0

    def next_delay(self, error: ApiError, *, now: float) -> float | None:
        """Note a failed attempt; seconds to wait before the next one, or None to give up."""
        self.billing_paused = is_billing(error)
        if not self.billing_paused:
            self._paused_since = None
            return super().next_delay(error, now=now)
        self.reset()  # an outage after it has its own time
        self.known = True
        if self._paused_since is None:
            self._paused_since, self._pause = now, 0.5
        self._pause = min(2.0 * self._pause, BILLING_PAUSE)
        return self._pause if now + self._pause <= self._paused_since + BILLING_PATIENCE else None

    def _may_help(self, error: ApiError) -> bool:
        if isinstance(error, ApiStatusError):
            self.known = True
        elif not self.known and self.failures >= STRANGER_ATTEMPTS:
            return False
        return is_retryable(error)
