"""How long a request to a trainer is asked again: one policy by the clock for submits and polls.

What a failure says about a request decides, not where it came from:

- *Undecided* (408, 409, 425, 429, 5xx, a broken connection, a 2xx that can't be read, and what the
  server says is to be repeated, `x-should-retry: true`): asked again for `UNDECIDED_SECONDS` from
  the first such failure in a row. `x-should-retry: false` changes nothing: a trainer knows a
  repeated request by its number.
- *Billing* (402): asked again for `BILLING_PATIENCE`, at a slow pace.
- *Odd* (a 400 without a body on a submit, which proxies send; a 400, 401, 403, 404, 410 or
  422 on a poll, whose request was accepted): asked again `ODD_TIMES`, quickly.
- Anything else is the server's decision.

A trainer that is gone for good may show as any of these: it is not found (404, 410), or a proxy in
front of it answers 5xx for ever. So a failure also says when to look elsewhere, at the state of its
job: at once where the trainer is not found, else after `LOOK_AFTER` and then ever more rarely.

Takes errors and times and gives pauses; it sends nothing, and reads no clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum

from fireworks_training._core.backoff import BILLING_PATIENCE, is_billing
from fireworks_training.errors import ApiError, ApiStatusError, ProtocolError

UNDECIDED_SECONDS = 660.0
"""Seconds in which every exchange fails, before a request is given up."""

BILLING_PAUSE = 5.0
"""Seconds between two exchanges while the server answers 402."""

ODD_TIMES = 4
"""How often an odd refusal is asked about again, in a row."""

FIRST_PAUSE = 0.25
"""Seconds; ceiling of the first pause, of which half is random. It doubles with each failure."""

LONGEST_PAUSE = 10.0
"""Seconds; ceiling of any pause that the server does not ask for."""

RETRY_AFTER_CAP = 60.0
"""Seconds that a server's Retry-After counts for at most."""

NOT_FOUND = frozenset({404, 410})
"""Statuses by which a trainer, or a model in it, is not there."""

UNDECIDED = frozenset({408, 409, 425, 429})
"""Client-error statuses that do not say that the request was refused."""

LOOK_AFTER = 5.0
"""Seconds in which every exchange fails, before the state of the job is looked at; twice as long
until each further look."""

NO_BODY = "(no body)"


class Verdict(Enum):
    """What a failed exchange says about its request."""

    UNDECIDED = "undecided"
    BILLING = "billing"
    ODD = "odd"
    DECIDED = "decided"


def is_conflict(error: BaseException) -> bool:
    """Whether another request holds the place in the line: no retry can mend that.

    Other servers answer 409 for passing states too, so that only the `error_class` decides.
    """
    return (
        isinstance(error, ApiStatusError)
        and error.status == 409
        and error.error_class == "Conflict"
    )


def judge_submit(error: ApiError) -> Verdict:
    """Judge a failed exchange of a request that is not accepted yet."""
    if not isinstance(error, ApiStatusError):
        return _judge_transport(error)
    if is_billing(error):
        return Verdict.BILLING
    if error.should_retry:
        return Verdict.UNDECIDED
    if error.status == 400 and error.message.endswith(NO_BODY):
        return Verdict.ODD
    return _judge_status(error)


def judge_poll(error: ApiError) -> Verdict:
    """Judge a failed exchange that asks for the result of an accepted request."""
    if not isinstance(error, ApiStatusError):
        return _judge_transport(error)
    if is_billing(error):
        return Verdict.BILLING
    if error.status in (400, 401, 403, 404, 410, 422):
        return Verdict.ODD
    return _judge_status(error)


def _judge_transport(error: ApiError) -> Verdict:
    again = error.retryable or isinstance(error, ProtocolError)
    return Verdict.UNDECIDED if again else Verdict.DECIDED


def _judge_status(error: ApiStatusError) -> Verdict:
    if is_conflict(error):
        return Verdict.DECIDED
    passing = error.status >= 500 or error.status in UNDECIDED or error.status < 300
    return Verdict.UNDECIDED if passing or error.should_retry else Verdict.DECIDED


class Patience:
    """Keeps what is left of the patience with one request.

    Args:
        judge: what a failure says.
        final: statuses that decide, for this request, though they do not in general.
        uniform: random source, uniform in [0, 1).
    """

    def __init__(
        self,
        judge: Callable[[ApiError], Verdict],
        *,
        final: frozenset[int] = frozenset(),
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._judge = judge
        self._final = final
        self._uniform = uniform
        self._since: dict[Verdict, float] = {}
        self._odd = 0
        self._next_look = LOOK_AFTER
        self.failures = 0

    def next_delay(self, error: ApiError, *, now: float) -> float | None:
        """Note a failure; seconds until the request is to be sent again, None to give it up.

        Args:
            now: the time, in seconds of any steady clock.
        """
        self.failures += 1
        verdict = self._judge(error)
        if isinstance(error, ApiStatusError) and error.status in self._final:
            verdict = Verdict.DECIDED
        if verdict is Verdict.DECIDED:
            return None
        if verdict is Verdict.ODD:
            self._odd += 1
            return None if self._odd > ODD_TIMES else self._pause(self._odd)
        if verdict is Verdict.BILLING:
            began = self._since.setdefault(verdict, now)
            return None if now >= began + BILLING_PATIENCE else BILLING_PAUSE
        began = self._since.setdefault(verdict, now)
        if now >= began + UNDECIDED_SECONDS:
            return None
        asked = error.retry_after if isinstance(error, ApiStatusError) else None
        return max(self._pause(self.failures), min(asked or 0.0, RETRY_AFTER_CAP))

    def look_due(self, error: ApiError, *, now: float) -> bool:
        """Whether to look elsewhere if the trainer is gone; after `next_delay` noted the failure.

        Args:
            now: the time that `next_delay` was given.
        """
        if isinstance(error, ApiStatusError) and error.status in NOT_FOUND:
            return True
        began = self._since.get(Verdict.UNDECIDED)
        if began is None or now < began + self._next_look:
            return False
        self._next_look *= 2.0
        return True

    def _pause(self, failures: int) -> float:
        ceiling = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 60))
        return float(ceiling * (1.0 - 0.5 * self._uniform()))

    def reset(self) -> None:
        """Forget the failures: the server has answered."""
        self.failures = self._odd = 0
        self._next_look = LOOK_AFTER
        self._since.clear()
