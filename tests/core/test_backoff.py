"""Retry decisions: what is retried, how long it waits, and when it gives up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._core.backoff import (
    Backoff,
    full_jitter,
    is_retryable,
    parse_retry_after,
)
from fireworks_training.errors import (
    ConnectionFailed,
    InvalidArgument,
    ProtocolError,
    RequestTimedOut,
    for_status,
)

BUSY = for_status(503, "busy")


def most() -> float:
    """A random source whose full-jitter delay is the ceiling."""
    return 0.0


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_statuses_are_retryable(status: int) -> None:
    assert is_retryable(for_status(status, "the text says: do not retry"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 422, 425, 501, 505])
def test_other_statuses_are_not(status: int) -> None:
    assert not is_retryable(for_status(status, "503 timeout, retry me"))


def test_without_a_status_the_type_decides() -> None:
    assert is_retryable(ConnectionFailed("x"))
    assert is_retryable(RequestTimedOut("x"))
    assert not is_retryable(ProtocolError("503"))


def test_delays_double_up_to_the_cap_and_end_with_the_attempts() -> None:
    backoff = Backoff(attempts=7, base=0.25, cap=2.0, uniform=most)
    delays = [backoff.next_delay(BUSY, now=0.0) for _ in range(7)]
    assert delays == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0, None]
    assert backoff.failures == 7


def test_an_error_that_no_retry_mends_ends_at_once() -> None:
    assert Backoff().next_delay(for_status(400, "bad"), now=0.0) is None


def test_retry_after_is_a_floor_with_a_cap() -> None:
    def delay(asked: float | None) -> float | None:
        backoff = Backoff(base=4.0, retry_after_cap=30.0, uniform=most)
        return backoff.next_delay(for_status(429, "slow down", retry_after=asked), now=0.0)

    assert delay(None) == 4.0
    assert delay(1.0) == 4.0
    assert delay(7.0) == 7.0
    assert delay(3600.0) == 30.0


def test_a_time_budget_counts_from_the_first_failure() -> None:
    backoff = Backoff(attempts=100, base=1.0, cap=1.0, max_elapsed=10.0, uniform=most)
    assert backoff.next_delay(BUSY, now=1000.0) == 1.0
    assert backoff.next_delay(BUSY, now=1009.0) == 1.0
    assert backoff.next_delay(BUSY, now=1009.1) is None


def test_progress_renews_the_budget() -> None:
    backoff = Backoff(attempts=2, max_elapsed=5.0, uniform=most)
    assert backoff.next_delay(BUSY, now=0.0) is not None
    backoff.reset()
    assert backoff.next_delay(BUSY, now=100.0) is not None
    assert backoff.next_delay(BUSY, now=100.0) is None


def test_a_senseless_budget_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        Backoff(attempts=0)
    with pytest.raises(InvalidArgument):
        Backoff(base=2.0, cap=1.0)


@given(
    attempt=st.integers(0, 10_000),
    spread=st.floats(0, 1),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_jitter_stays_between_its_bounds(attempt: int, spread: float, draw: float) -> None:
    delay = full_jitter(attempt, base=0.25, cap=30.0, spread=spread, uniform=lambda: draw)
    ceiling = min(30.0, 0.25 * 2.0 ** min(attempt, 60))
    assert (1 - spread) * ceiling <= delay + 1e-9
    assert delay <= ceiling


DATE = "Tue, 15 Nov 1994 08:12:31 GMT"


@pytest.mark.parametrize(
    ("value", "date", "seconds"),
    [
        (None, None, None),
        ("5", None, 5.0),
        (" 0 ", None, 0.0),
        ("Tue, 15 Nov 1994 08:12:41 GMT", DATE, 10.0),
        ("Tue, 15 Nov 1994 08:12:01 GMT", DATE, 0.0),
        ("Tue, 15 Nov 1994 08:12:41 GMT", None, None),
        ("-3", DATE, None),
        ("soon", DATE, None),
        ("٣", None, None),
        ("Tue, 15 Nov 1994 08:12:41 GMT", "garbled", None),
    ],
)
def test_retry_after_header(value: str | None, date: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, date=date) == seconds
