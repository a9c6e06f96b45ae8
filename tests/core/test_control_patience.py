"""A request of the control plane is repeated by the clock; a stranger is given up soon."""

from __future__ import annotations

import pytest

from fireworks_training import ApiError, ConnectionFailed, NotFound, ServerFailed
from fireworks_training._core.backoff import BILLING_PATIENCE
from fireworks_training._core.control_patience import (
    OUTAGE,
    STRANGER_ATTEMPTS,
    ControlPatience,
)
from fireworks_training.errors import ApiStatusError

AWAY = ServerFailed("away", status=503)
NO_ROUTE = ConnectionFailed("refused")


def survived(patience: ControlPatience, error: ApiError) -> tuple[float, int]:
    """Seconds from the first failure to the last attempt, and the number of attempts."""
    now, attempts = 0.0, 1
    while (delay := patience.next_delay(error, now=now)) is not None:
        now += delay
        attempts += 1
    return now, attempts


@pytest.mark.parametrize("known", [True, False])
def test_an_outage_of_minutes_is_outlasted(known: bool) -> None:
    seconds, attempts = survived(ControlPatience(known=known), AWAY)
    assert OUTAGE - 10 <= seconds <= OUTAGE
    assert attempts < 200


def test_a_host_that_answered_before_is_waited_for_and_a_stranger_is_not() -> None:
    assert survived(ControlPatience(known=True), NO_ROUTE)[0] >= OUTAGE - 10
    seconds, attempts = survived(ControlPatience(known=False), NO_ROUTE)
    assert attempts == STRANGER_ATTEMPTS
    assert seconds < 20
    known_since = ControlPatience(known=False)
    assert known_since.next_delay(AWAY, now=0.0) is not None  # an answer, if a bad one
    assert survived(known_since, NO_ROUTE)[1] > STRANGER_ATTEMPTS


def test_a_paused_account_is_waited_for_longer_and_an_outage_after_it_has_its_own_time() -> None:
    paused = ApiStatusError("pay", status=402)
    patience = ControlPatience(known=True)
    seconds, _ = survived(patience, paused)
    assert BILLING_PATIENCE - 20 <= seconds <= BILLING_PATIENCE
    assert patience.billing_paused
    mixed = ControlPatience(known=True)
    now = 0.0
    while now < 2 * OUTAGE:
        delay = mixed.next_delay(paused, now=now)
        assert delay is not None
        now += delay
    assert mixed.next_delay(AWAY, now=now) is not None
    assert not mixed.billing_paused


def test_what_will_not_pass_is_not_repeated() -> None:
    assert ControlPatience(known=True).next_delay(NotFound("no", status=404), now=0.0) is None


def test_a_402_of_a_moment_costs_seconds() -> None:
    patience = ControlPatience(known=True)
    pauses = [patience.next_delay(ApiStatusError("pay", status=402), now=0.0) for _ in range(6)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


def test_what_the_server_says_is_to_be_repeated_is_repeated() -> None:
    for said, again in ((True, True), (False, False), (None, False)):
        refused = ApiStatusError("no", status=400, should_retry=said)
        delay = ControlPatience(known=True).next_delay(refused, now=0.0)
        assert (delay is not None) is again
