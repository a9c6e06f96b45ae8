"""How long a request is asked again: the policy by the clock, one failure after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from fireworks_training._core.backoff import BILLING_PATIENCE
from fireworks_training._core.patience import (
    BILLING_PAUSE,
    LOOK_AFTER,
    ODD_TIMES,
    UNDECIDED_SECONDS,
    Patience,
    Verdict,
    judge_poll,
    judge_submit,
)
from fireworks_training.errors import (
    ApiError,
    ConnectionFailed,
    ProtocolError,
    RequestTimedOut,
    for_status,
)

Judge = Callable[[ApiError], Verdict]


def status(code: int, text: str = "no", error_class: str | None = None) -> ApiError:
    return for_status(
        code, f"optim_step: the server answered {code}: {text}", error_class=error_class
    )


def outlasts(patience: Patience, error: ApiError) -> tuple[int, float]:
    """How many times, and for how many seconds, a request is sent again."""
    times, now = 0, 1000.0
    while times < 10_000 and (delay := patience.next_delay(error, now=now)) is not None:
        assert delay >= 0
        times, now = times + 1, now + delay
    return times, now - 1000.0


PASSING = [
    *[status(code) for code in (408, 409, 425, 429, 500, 502, 503, 504, 520)],
    ConnectionFailed("cut"),
    RequestTimedOut("late"),
    ProtocolError("a page of a proxy"),
]


@pytest.mark.parametrize("judge", [judge_submit, judge_poll])
@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_decides_nothing_is_asked_again_for_ten_minutes(judge: Judge, error: ApiError) -> None:
    times, seconds = outlasts(Patience(judge), error)
    assert 600 <= seconds <= UNDECIDED_SECONDS + 10
    assert times < 200


@pytest.mark.parametrize("judge", [judge_submit, judge_poll])
def test_a_billing_pause_is_waited_for_an_hour(judge: Judge) -> None:
    times, seconds = outlasts(Patience(judge), status(402))
    assert times == BILLING_PATIENCE / BILLING_PAUSE
    assert seconds == BILLING_PATIENCE


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 422])
def test_an_odd_answer_to_a_poll_is_looked_at_again_and_decides_a_submit(code: int) -> None:
    times, seconds = outlasts(Patience(judge_poll), status(code))
    assert times == ODD_TIMES
    assert seconds < 10
    assert outlasts(Patience(judge_submit), status(code)) == (0, 0.0)


@pytest.mark.parametrize("judge", [judge_submit, judge_poll])
def test_the_server_may_say_that_a_refusal_is_to_be_repeated(judge: Judge) -> None:
    def refused(should_retry: bool | None) -> Verdict:
        return judge(for_status(405, "no", should_retry=should_retry))

    assert refused(True) is Verdict.UNDECIDED
    assert refused(False) is refused(None) is Verdict.DECIDED


def test_a_400_without_a_body_decides_nothing_at_once() -> None:
    assert outlasts(Patience(judge_submit), status(400, "(no body)"))[0] == ODD_TIMES


def test_a_place_that_another_holds_is_decided() -> None:
    for judge in (judge_submit, judge_poll):
        assert outlasts(Patience(judge), status(409, error_class="Conflict")) == (0, 0.0)
    filler = Patience(judge_submit, final=frozenset({409}))
    assert outlasts(filler, status(409)) == (0, 0.0)


def test_an_answer_ends_the_row() -> None:
    patience = Patience(judge_poll)
    for _ in range(3):
        outlasts(patience, status(404))
        patience.reset()
    assert outlasts(patience, status(404))[0] == ODD_TIMES


def looks(patience: Patience, error: ApiError, until: float) -> list[float]:
    """Seconds after the first failure at which the state of the job is looked at."""
    at, now = list[float](), 0.0
    while now < until and (delay := patience.next_delay(error, now=now)) is not None:
        if patience.look_due(error, now=now):
            at.append(now)
        now += delay
    return at


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_failures_that_go_on_are_a_reason_to_look_ever_more_rarely(error: ApiError) -> None:
    """Nine minutes of them take few looks, and the first one comes soon."""
    at = looks(Patience(judge_poll), error, 540.0)
    assert LOOK_AFTER <= at[0] < LOOK_AFTER + 10
    assert 4 <= len(at) <= 8
    gaps = [later - earlier for earlier, later in itertools.pairwise(at)]
    assert gaps[-1] > 4 * gaps[0]


def test_what_is_not_found_is_looked_at_at_once_and_a_refusal_never() -> None:
    assert looks(Patience(judge_poll), status(404), 10.0)[0] == 0.0
    assert looks(Patience(judge_poll), status(403), 10.0) == []
    assert looks(Patience(judge_poll), status(402), 60.0) == []


def test_an_answer_ends_the_reason_to_look() -> None:
    patience = Patience(judge_poll)
    for _ in range(100):  # a poll in four fails, as at a busy gateway
        assert looks(patience, status(503), 0.1) == []
        patience.reset()


def test_what_the_server_asks_to_wait_is_a_floor() -> None:
    busy = for_status(429, "busy", retry_after=7.0)
    delay = Patience(judge_poll).next_delay(busy, now=0.0)
    assert delay == 7.0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0 - 1e-9])
def test_a_storm_is_met_with_few_requests(share: float) -> None:
    """At most 5 requests in any second, whatever the dice say; and 10 s apart in the end."""
    patience = Patience(judge_poll, uniform=lambda: share)
    times, now, delay = [0.0], 0.0, None
    while now < 60.0:
        delay = patience.next_delay(status(500), now=now)
        assert delay is not None
        now += delay
        times.append(now)
    for start in times:
        assert len([t for t in times if start <= t < start + 1.0]) <= 5
    assert delay is not None
    assert 5.0 <= delay <= 10.0
