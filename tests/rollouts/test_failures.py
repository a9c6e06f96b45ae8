"""What a failed rollout means for its group, and when failures end a run."""

from __future__ import annotations

from typing import Any

import pytest

from fireworks_training import InvalidArgument, RateLimited, SamplingRequestError
from fireworks_training.rollouts.failures import Breaker, FailurePolicy, is_transient


@pytest.mark.parametrize(
    ("policy", "transient", "attempts", "lost", "verdict"),
    [
        ("retry", True, 1, 0, "again"),
        ("retry", True, 2, 0, "again"),
        ("retry", True, 3, 0, "lose_group"),
        ("retry", False, 1, 0, "lose_group"),
        ("shrink", True, 1, 0, "again"),
        ("shrink", True, 3, 0, "lose_member"),
        ("shrink", False, 1, 1, "lose_member"),
        ("shrink", False, 1, 2, "lose_group"),
        ("drop", True, 1, 0, "lose_group"),
    ],
)
def test_verdicts(policy: str, transient: bool, attempts: int, lost: int, verdict: str) -> None:
    rule = FailurePolicy(lost_member=policy, retries=2, min_group_size=2)  # type: ignore[arg-type]
    assert rule.verdict(transient=transient, attempts=attempts, lost=lost, group_size=4) == verdict


def test_failures_in_a_row_end_a_run_and_one_success_between_does_not() -> None:
    breaker = Breaker(FailurePolicy(breaker_in_a_row=3))
    assert [breaker.note(failed=f) for f in (True, True, False, True, True)] == [None] * 5
    assert breaker.note(failed=True) == (3, 3)


def test_half_of_the_last_twenty_end_a_run_but_not_half_of_fewer() -> None:
    breaker = Breaker(FailurePolicy())
    said = [breaker.note(failed=bool(i % 2)) for i in range(20)]
    assert said == [None] * 19 + [(10, 20)]
    quiet = Breaker(FailurePolicy())
    assert not any(quiet.note(failed=not i % 3) for i in range(200))


def test_which_errors_may_pass() -> None:
    assert is_transient(RateLimited("wait", status=429))
    assert is_transient(ConnectionResetError())
    assert is_transient(TimeoutError())
    assert is_transient(SamplingRequestError("no", retry_budget_exhausted=True))
    assert not is_transient(SamplingRequestError("no"))
    assert not is_transient(InvalidArgument("too long"))
    assert not is_transient(ValueError())


@pytest.mark.parametrize("wrong", [{"lost_member": "no"}, {"retries": -1}, {"breaker_share": 0}])
def test_a_policy_refuses_values_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        FailurePolicy(**wrong)
