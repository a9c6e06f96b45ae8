"""`Backoff`: decides whether and when a failed request is tried again, without a clock.

It takes the typed error of an attempt and a time, and answers with a delay or with None. What is
retryable follows from the error's type and status, never from its text. It does not sleep, and
knows no request.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from email.utils import parsedate_to_datetime

from fireworks_training.errors import ApiError, ApiStatusError, InvalidArgument

RETRYABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

RETRY_AFTER_CAP = 30.0
"""Seconds that a server's Retry-After can ask for at most."""


def is_retryable(error: ApiError) -> bool:
    """Whether the same request may succeed later: by status if there is one, or by type."""
    if isinstance(error, ApiStatusError):
        return error.status in RETRYABLE_STATUS
    return error.retryable


def parse_retry_after(value: str | None, *, date: str | None = None) -> float | None:
    """Read the seconds that a Retry-After header asks to wait.

    Args:
        value: the header: seconds, or an HTTP date.
        date: the `Date` header of the same answer. A date is counted from it, so that a client's
            wrong clock does no harm; without it a date is ignored.

    Returns:
        Seconds, at least 0; None if there is no header, or it can't be read.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    if date is None:
        return None
    try:
        wait = parsedate_to_datetime(text) - parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return None
    return max(wait, timedelta(0)).total_seconds()


def full_jitter(
    attempt: int, *, base: float, cap: float, spread: float, uniform: Callable[[], float]
) -> float:
    """Compute the delay before retry `attempt` (from 0): exponential, then shortened at random.

    The ceiling is `min(cap, base * 2**attempt)`; the delay is uniform in
    `[(1 - spread) * ceiling, ceiling]`. A spread of 1 is "full jitter": many clients that failed
    together come back evenly spread.
    """
    # 2**60 is past every cap, and keeps a long wait from overflowing.
    ceiling = min(cap, base * 2.0 ** min(attempt, 60))
    return ceiling * (1.0 - spread * uniform())


class Backoff:
    """Keeps the retry budget of one logical request.

    Args:
        attempts: how many times it may be tried in all, the first included.
        base: ceiling of the first delay, seconds; it doubles with each retry.
        cap: ceiling of any delay, seconds.
        spread: share of the delay that is random, 0 to 1.
        max_elapsed: seconds from the first failure within which a retry may start; None: no limit.
        retry_after_cap: seconds that a server's Retry-After counts for at most.
        retryable: returns whether an error may go away; `is_retryable` unless given.
        uniform: random source, uniform in [0, 1).
    """

    def __init__(
        self,
        *,
        attempts: int = 7,
        base: float = 0.25,
        cap: float = 30.0,
        spread: float = 1.0,
        max_elapsed: float | None = None,
        retry_after_cap: float = RETRY_AFTER_CAP,
        retryable: Callable[[ApiError], bool] = is_retryable,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        if attempts < 1 or base < 0 or cap < base or not 0 <= spread <= 1:
            raise InvalidArgument(
                f"a retry budget needs attempts >= 1, 0 <= base <= cap and 0 <= spread <= 1; got "
                f"attempts={attempts}, base={base}, cap={cap}, spread={spread}"
            )
        self._attempts = attempts
        self._base = base
        self._cap = cap
        self._spread = spread
        self._max_elapsed = max_elapsed
        self._retry_after_cap = retry_after_cap
        self._retryable = retryable
        self._uniform = uniform
        self._failures = 0
        self._first_failure: float | None = None

    @property
    def failures(self) -> int:
        """Failed attempts so far."""
        return self._failures

    def next_delay(self, error: ApiError, *, now: float) -> float | None:
        """Note a failed attempt; seconds to wait before the next one, or None to give up.

        Args:
            error: the failure of the attempt. Its `retry_after`, where it has one, is a floor.
            now: the time, in seconds of any steady clock.
        """
        self._failures += 1
        if self._first_failure is None:
            self._first_failure = now
        if self._failures >= self._attempts or not self._retryable(error):
            return None
        delay = full_jitter(
            self._failures - 1,
            base=self._base,
            cap=self._cap,
            spread=self._spread,
            uniform=self._uniform,
        )
        asked = error.retry_after if isinstance(error, ApiStatusError) else None
        if asked is not None:
            delay = max(delay, min(asked, self._retry_after_cap))
        if self._max_elapsed is not None and now + delay > self._first_failure + self._max_elapsed:
            return None
        return delay

    def reset(self) -> None:
        """Forget the failures: the request made progress."""
        self._failures = 0
        self._first_failure = None
