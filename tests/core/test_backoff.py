"""Retry decisions: what is retried, how long it waits, and when it gives up."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._core.backoff import (
    Backoff,
    billing_budget,
    full_jitter,
    is_billing,
    is_retryable,
    outage_budget,
    parse_retry_after,
)
from fireworks_training.errors import (
    ApiError,
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


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_transient_statuses_are_retryable(status: int) -> None:
    assert is_retryable(for_status(status, "the text says: do not retry"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 422, 501, 505])
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


def lasts(backoff: Backoff, error: ApiError, *, attempt: float = 0.0) -> tuple[float, int]:
    """Seconds from the first failure to the last attempt, and how many attempts there were."""
    now, attempts = attempt, 1
    while (delay := backoff.next_delay(error, now=now)) is not None:
        now += delay + attempt
        attempts += 1
    return now - attempt, attempts


def test_an_outage_of_90_seconds_is_outlasted_whatever_the_delays() -> None:
    for _ in range(200):
        seconds, attempts = lasts(outage_budget(), BUSY)
        assert 100 <= seconds <= 140
        assert attempts <= 24
    # The control: a count of attempts alone does not.
    assert min(lasts(Backoff(), BUSY)[0] for _ in range(200)) < 90


def test_attempts_that_take_long_are_made_as_often_as_before() -> None:
    seconds, attempts = lasts(outage_budget(), RequestTimedOut("x"), attempt=600.0)
    assert attempts == 7
    assert seconds > 6 * 600


def test_a_permanent_fault_is_tried_once_however_patient_the_budget() -> None:
    for status in (400, 401, 403, 404, 409, 410, 422):
        assert outage_budget().next_delay(for_status(status, "no"), now=0.0) is None


def test_an_account_is_waited_for_until_it_is_paid_for() -> None:
    unpaid = for_status(402, "pay")
    assert is_billing(unpaid)
    seconds, attempts = lasts(billing_budget(), unpaid)
    assert 3500 <= seconds <= 3700
    assert attempts <= 200
    assert billing_budget().next_delay(BUSY, now=0.0) is None


def test_a_date_without_the_answer_s_own_date_counts_from_our_clock() -> None:
    at = datetime(1994, 11, 15, 8, 12, 31, tzinfo=UTC).timestamp()
    later = "Tue, 15 Nov 1994 08:12:41 GMT"
    assert parse_retry_after(later, now=at) == 10.0
    assert parse_retry_after(later, now=at + 60) == 0.0
    assert parse_retry_after(later, date=DATE, now=at + 3600) == 10.0  # the server's own is better


@given(st.text(max_size=40), st.none() | st.text(max_size=40), st.none() | st.floats(0, 4e9))
def test_no_retry_after_header_breaks_anything(
    value: str, date: str | None, now: float | None
) -> None:
    seconds = parse_retry_after(value, date=date, now=now)
    assert seconds is None or seconds >= 0


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
        ("Tue, 15 Nov 1994 08:12:41 GMT", None, None),  # nothing to count from
        ("-3", DATE, None),
        ("soon", DATE, None),
        ("٣", None, None),
        ("Tue, 15 Nov 1994 08:12:41 GMT", "garbled", None),
        ("1.5", None, 1.5),
        ("1.", None, 1.0),
        (".25", None, 0.25),
        ("1_0", None, None),
        ("1e3", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("-1.5", None, None),
        ("", DATE, None),
    ],
)
def test_retry_after_header(value: str | None, date: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, date=date) == seconds
