"""`Backoff`: decides whether and when a failed request is tried again, without a clock.

It takes the typed error of an attempt and a time, and answers with a delay or with None. What is
retryable follows from the error's type and status, never from its text. It does not sleep, and
knows no request.

The policy of all routes is that what may go away is tried again by the clock, not by a count:

    Fault                                             Tried again for
    408, 425, 429, 500, 502, 503, 504, the network    sampling: `OUTAGE_PATIENCE`, from the first
                                                      failure; the control plane:
                                                      `control_patience.OUTAGE`; submits and polls
                                                      of a session: `patience.UNDECIDED_SECONDS`
    402 (billing)                                     `BILLING_PATIENCE`, and a log line says so
    anything else                                     not at all: the same request would fail
                                                      again (`patience` has the few refusals of
                                                      submits and polls that are asked about)

An attempt may itself take minutes (a server that accepts and says nothing): the clock alone would
leave it one try. So a budget ends when its seconds *and* its attempts are used up.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from fireworks_training.errors import ApiError, ApiStatusError, InvalidArgument

RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

RETRY_AFTER_CAP = 30.0
"""Seconds that a server's Retry-After can ask for at most."""

OUTAGE_PATIENCE = 120.0
"""Seconds from its first failure for which a request is tried again: it outlasts an outage of 90 s,
whatever the delays, which are at most `OUTAGE_DELAY_CAP`."""

OUTAGE_DELAY_CAP = 20.0
"""Seconds between two attempts of an outage at most."""

BILLING_STATUS = 402
"""Status of an account whose credit is used up; paid for, the same request succeeds."""

BILLING_PATIENCE = 3600.0
"""Seconds for which a request waits for an account that has to be paid for."""

BILLING_DELAY_CAP = 30.0
"""Seconds between two looks at an account that has to be paid for, at most."""

_SECONDS = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def is_retryable(error: ApiError) -> bool:
    """Whether the same request may succeed later: by status if there is one, or by type."""
    if isinstance(error, ApiStatusError):
        return error.status in RETRYABLE_STATUS or bool(error.should_retry)
    return error.retryable


def is_billing(error: ApiError) -> bool:
    """Whether the account has to be paid for before the same request can succeed."""
    return isinstance(error, ApiStatusError) and error.status == BILLING_STATUS


def parse_retry_after(
    value: str | None, *, date: str | None = None, now: float | None = None
) -> float | None:
    """Read the seconds that a Retry-After header asks to wait.

    Args:
        value: the header: seconds, fractions of one too, or an HTTP date.
        date: the `Date` header of the same answer. A date is counted from it, so that a client's
            wrong clock does no harm.
        now: seconds since the epoch by the client's clock, from which a date is counted where the
            answer has no `Date`; None ignores such a date.

    Returns:
        Seconds, at least 0; None if there is no header, or it can't be read.
    """
    if value is None:
        return None
    text = value.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        if date is not None:
            wait = (until - parsedate_to_datetime(date)).total_seconds()
        elif now is not None:
            wait = until.timestamp() - now
        else:
            return None
    except (ValueError, TypeError, OverflowError):
        return None
    return max(wait, 0.0)


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


def outage_budget() -> Backoff:
    """Make the budget of a request outside a training session's line: it outlasts 90 s of outage.

    Delays are half random, so that what failed together does not come back together, and reach
    `OUTAGE_DELAY_CAP`; on average 12 attempts go to an outage of 90 s.
    """
    return Backoff(base=0.5, cap=OUTAGE_DELAY_CAP, spread=0.5, patience=OUTAGE_PATIENCE)


def billing_budget() -> Backoff:
    """Make the budget of a request whose account has to be paid for."""
    return Backoff(
        base=1.0,
        cap=BILLING_DELAY_CAP,
        spread=0.2,
        patience=BILLING_PATIENCE,
        retryable=is_billing,
    )


class Backoff:
    """Keeps the retry budget of one logical request.

    Args:
        attempts: how many times it may be tried in all, the first included; more often within
            `patience`.
        base: ceiling of the first delay, seconds; it doubles with each retry.
        cap: ceiling of any delay, seconds.
        spread: share of the delay that is random, 0 to 1.
        patience: seconds from the first failure within which it may be tried however often.
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
        patience: float = 0.0,
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
        self._patience = patience
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
        if not self._retryable(error):
            return None
        patient = now - self._first_failure < self._patience
        if self._failures >= self._attempts and not patient:
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
