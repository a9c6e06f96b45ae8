"""The wait for one resource, without a clock: states, budgets, resuming, pace."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training import ProvisioningTimeout
from fireworks_training._core.lifecycle import (
    LONGEST_HOLD,
    MISSING,
    QUICKEST,
    QUICKEST_HELD,
    SETTLE,
    SLOWEST,
    STOPPING_BUDGET,
    Again,
    GiveUp,
    Go,
    Readiness,
    ReadinessWait,
    Resume,
    Seen,
    deployment_readiness,
    job_readiness,
)

NAME = "accounts/me/rlorTrainerJobs/j"


def watch(**options: Any) -> ReadinessWait:
    budgets = {"started": 0.0, "budget": 100.0, "queue_budget": 1000.0}
    return ReadinessWait("trainer j", job_readiness, **{**budgets, **options})


def job(state: str, message: str = "") -> Seen:
    return Seen(NAME, f"JOB_STATE_{state}", message)


def test_ready_counts_once_it_answers() -> None:
    waiting = watch()
    assert isinstance(waiting.see(job("RUNNING"), 1.0, answers=False), Again)
    assert waiting.see(job("RUNNING"), 2.0) == Go()


def test_the_queue_and_the_start_have_budgets_of_their_own() -> None:
    waiting = watch()
    assert isinstance(waiting.see(job("PENDING", "full"), 999.0), Again)
    assert isinstance(waiting.see(job("CREATING"), 1500.0), Again)
    assert isinstance(waiting.see(job("CREATING"), 1600.0), Again)
    verdict = waiting.see(job("CREATING"), 1600.1)
    assert isinstance(verdict, GiveUp)
    assert isinstance(verdict.error, ProvisioningTimeout)
    assert verdict.error.resource == NAME


def test_back_in_the_queue_the_budget_of_the_start_does_not_run() -> None:
    waiting = watch()
    waiting.see(job("CREATING"), 1.0)
    assert isinstance(waiting.see(job("PENDING"), 500.0), Again)
    assert isinstance(waiting.see(job("PENDING"), 1000.1), GiveUp)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "DELETED", "EARLY_STOPPED", "CANCELLING"])
def test_a_job_that_was_made_and_stands_has_failed(state: str) -> None:
    verdict = watch().see(job(state, "why"), 1.0)
    assert isinstance(verdict, GiveUp)
    assert "why" in str(verdict.error)


def test_one_that_is_not_there_has_failed() -> None:
    assert isinstance(watch().see(None, 1.0), GiveUp)


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "PAUSED", "COMPLETED"])
def test_a_job_that_was_found_is_resumed_once(state: str) -> None:
    waiting = watch(resumable=True)
    assert waiting.see(job(state), 1.0) == Resume()
    assert isinstance(waiting.see(job(state), 2.0), Again)  # still its old state
    assert isinstance(waiting.see(job(state), 1.0 + SETTLE), GiveUp)


def test_a_job_that_is_stopping_is_waited_for_and_then_resumed() -> None:
    waiting = watch(resumable=True)
    assert isinstance(waiting.see(job("CANCELLING"), 1.0), Again)
    assert waiting.see(job("CANCELLED"), 60.0) == Resume()
    late = watch(resumable=True)
    begun = 3 * STOPPING_BUDGET  # it may begin to stop long after the wait began
    assert isinstance(late.see(job("CANCELLING"), begun), Again)
    assert isinstance(late.see(job("CANCELLING"), begun + STOPPING_BUDGET), Again)
    assert isinstance(late.see(job("CANCELLING"), begun + STOPPING_BUDGET + 0.1), GiveUp)


def test_looks_that_are_not_possible_count_against_the_budget() -> None:
    waiting = watch()
    waiting.see(job("CREATING"), 0.0)
    assert isinstance(waiting.unseen(100.0), Again)
    assert isinstance(waiting.unseen(100.1), GiveUp)


def test_the_pace_is_a_share_of_the_time_without_a_change() -> None:
    waiting = watch(queue_budget=1e9)
    delays = [delay_at(waiting, "PENDING", at) for at in (0.0, 0.4, 2.0, 8.0, 1e5)]
    assert delays == [QUICKEST, QUICKEST, pytest.approx(0.5), pytest.approx(2.0), SLOWEST]
    assert delay_at(waiting, "CREATING", 1e5 + 1) == QUICKEST
    assert waiting.changed


def delay_at(waiting: ReadinessWait, state: str, at: float) -> float:
    verdict = waiting.see(job(state), at)
    assert isinstance(verdict, Again)
    return verdict.delay


@given(st.lists(st.sampled_from(["PENDING", "CREATING", "UNHEARD_OF"]), min_size=1, max_size=40))
def test_no_wait_outlasts_its_budgets_whatever_it_sees(states: list[str]) -> None:
    waiting = watch(budget=20.0, queue_budget=100.0)
    verdicts = [waiting.see(job(states[n % len(states)]), n * 5.0) for n in range(27)]
    assert any(isinstance(verdict, GiveUp) for verdict in verdicts)


def test_unknown_states_count_as_starting() -> None:
    assert job_readiness("JOB_STATE_WARMING") is Readiness.STARTING
    assert deployment_readiness("PROVISIONING") is Readiness.STARTING


def again(waiting: ReadinessWait, row: Seen, at: float, **options: Any) -> Again:
    verdict = waiting.see(row, at, **options)
    assert isinstance(verdict, Again)
    return verdict


def test_a_platform_that_holds_answers_back_is_asked_again_at_once() -> None:
    waiting = watch()
    assert again(waiting, job("CREATING"), 0.0) == Again(QUICKEST, LONGEST_HOLD)
    assert again(waiting, job("CREATING"), 20.0, held=9.9) == Again(0.0, LONGEST_HOLD)
    # One that can't wait is polled at the pace of the age.
    assert again(waiting, job("CREATING"), 20.0) == Again(SLOWEST, LONGEST_HOLD)
    # One that says that it waits, and does not, is not asked in a busy loop.
    assert again(waiting, job("CREATING"), 20.0, held=0.0) == Again(QUICKEST_HELD, LONGEST_HOLD)


@pytest.mark.parametrize("seconds", [3.0, 10.0, 60.0])
def test_a_wait_takes_few_polls(seconds: float) -> None:
    waiting, now, polls = watch(queue_budget=1e9), 0.0, 0
    while now < seconds:
        now += delay_at(waiting, "PENDING", now)
        polls += 1
    assert polls <= 20 + seconds / SLOWEST


def test_a_resource_that_was_there_may_be_missing_for_a_while() -> None:
    waiting = watch()
    waiting.see(job("CREATING"), 0.0)
    assert isinstance(waiting.see(None, 1.0), Again)
    assert isinstance(waiting.see(job("CREATING"), 2.0), Again)
    assert isinstance(waiting.see(None, 3.0), Again)  # another gap, with its own time
    assert isinstance(waiting.see(None, 3.0 + MISSING - 0.1), Again)
    assert isinstance(waiting.see(None, 3.0 + MISSING), GiveUp)


def test_what_was_never_there_or_was_going_is_missing_at_once() -> None:
    assert isinstance(watch().see(None, 0.0), GiveUp)
    going = ReadinessWait(
        "trainer j", job_readiness, started=0.0, budget=9.0, queue_budget=9.0, resumed=True
    )
    going.see(job("DELETING"), 0.0)
    assert isinstance(going.see(None, 1.0), GiveUp)


def test_an_answer_is_not_held_back_beyond_the_budget() -> None:
    waiting = watch()
    waiting.see(job("CREATING"), 0.0)
    assert again(waiting, job("CREATING"), 96.5, held=9.0).hold == 3
    last = again(waiting, job("CREATING"), 99.5, held=3.0)
    assert (last.hold, last.delay > 0) == (0, True)


def test_what_does_not_answer_yet_is_polled() -> None:
    assert again(watch(), job("RUNNING"), 30.0, answers=False, held=5.0).hold == 0


def test_what_stood_before_somebody_else_resumed_it_is_borne_for_a_while() -> None:
    waiting = watch(resumed=True)
    for state in ("CANCELLED", "CANCELLING", "FAILED"):
        assert isinstance(waiting.see(job(state), SETTLE - 0.1), Again)
    assert isinstance(waiting.see(job("EARLY_STOPPED"), 1.0), GiveUp)
    assert isinstance(waiting.see(job("CANCELLED"), SETTLE), GiveUp)


def test_the_error_says_what_to_do_about_the_state_that_ended_the_wait() -> None:
    waiting = watch(advice={Readiness.GONE: "make another", Readiness.STARTING: "be patient"})
    for state, at, said in (("DELETED", 1.0, "DELETED; make another"), ("X", 102.0, "be patient")):
        waiting.see(job("CREATING"), 0.0)
        verdict = waiting.see(job(state), at)
        assert isinstance(verdict, GiveUp)
        assert str(verdict.error).endswith(said)
    verdict = watch().see(job("DELETED"), 1.0)
    assert isinstance(verdict, GiveUp)
    assert str(verdict.error) == "trainer j is JOB_STATE_DELETED"


def test_the_slowest_pace_is_the_callers() -> None:
    waiting = watch(queue_budget=1e9, slowest=60.0)
    assert delay_at(waiting, "PENDING", 0.0) == QUICKEST
    assert delay_at(waiting, "PENDING", 1e5) == 60.0
