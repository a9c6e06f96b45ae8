"""The law of admission over random schedules, and rules broken on purpose.

`ROLLOUT_SCHEDULES=100000 pytest -n 1 -q tests/rollouts/test_law.py` runs a hundred thousand.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireworks_training import InvalidArgument
from fireworks_training.rollouts.errors import LagExceeded
from fireworks_training.rollouts.law import Admission, Outcome, Plan, seed_of
from tests.rollouts.schedules import Schedule, run

SCHEDULES = int(os.environ.get("ROLLOUT_SCHEDULES", "2000"))

plans = st.builds(
    Plan,
    groups_per_batch=st.integers(1, 4),
    max_lag=st.integers(0, 4),
    steps=st.none() | st.integers(0, 6),
    refill=st.booleans(),
)
BAD = st.sampled_from([0.0, 0.3, 0.9, 1.0])


def judge(plan: Plan, tasks: int, seen: Schedule) -> None:
    """What holds for every schedule in submission order."""
    assert max(seen.lags, default=0) <= plan.max_lag
    assert len(seen.trained) == len(set(seen.trained))
    assert seen.trained == sorted(seen.trained)
    ended = [group for batch in seen.batches for part in batch for group in part]
    assert len(ended) == len(set(ended))
    done = [group for group in sorted(seen.outcomes) if seen.outcomes[group] == "done"]
    handed_out = set(ended)
    assert seen.trained == [group for group in done if group in handed_out]
    assert seen.tokens.closes
    assert not seen.tokens.in_flight
    assert not seen.tokens.waiting
    size = plan.groups_per_batch
    if plan.steps is None:
        assert seen.trained == done, "a finished group was thrown away"
        assert len(ended) == tasks
    else:
        assert len(seen.batches) <= plan.steps
        assert len(seen.trained) <= plan.steps * size
    for number, (trained, untrained) in enumerate(seen.batches):
        last = number == len(seen.batches) - 1
        if not plan.refill:
            these = range(number * size, min((number + 1) * size, tasks))
            assert sorted((*trained, *untrained)) == list(these)
        elif not last:
            assert len(trained) == size


@settings(max_examples=SCHEDULES, deadline=None)
@given(plans, st.integers(0, 24), st.integers(0, 2**32), BAD, st.integers(1, 12))
def test_the_bound_holds_and_nothing_is_lost(
    plan: Plan, tasks: int, seed: int, bad: float, concurrency: int
) -> None:
    judge(plan, tasks, run(plan, tasks, seed, bad=bad, concurrency=concurrency))


class OneTooMany(Admission):
    """The rule, off by one group."""

    def may_start(self) -> bool:
        if self._exhausted:
            return False
        bound = (self.published + self.plan.max_lag + 1) * self.plan.groups_per_batch
        return self.started <= bound


class OneTooFew(Admission):
    """The rule, off by one group to the other side."""

    def may_start(self) -> bool:
        bound = (self.published + self.plan.max_lag + 1) * self.plan.groups_per_batch - 1
        return not self._exhausted and self.started < bound


@pytest.mark.parametrize("plan", [Plan(2, max_lag=0), Plan(1, max_lag=2), Plan(4, max_lag=1)])
def test_an_admission_that_is_off_by_one_is_caught(plan: Plan) -> None:
    caught = 0
    for seed in range(50):
        try:
            judge(plan, 20, run(plan, 20, seed, bad=0, admission=OneTooMany(plan)))
        except AssertionError:
            caught += 1
    assert caught >= 25


def test_an_admission_that_starts_one_too_few_is_seen_to_be_stuck() -> None:
    plan = Plan(2, max_lag=0)
    with pytest.raises(AssertionError, match="stuck"):
        run(plan, 20, 0, bad=0, admission=OneTooFew(plan))


def test_completion_order_breaks_the_bound_so_the_judge_sees_lag() -> None:
    plan = Plan(2, max_lag=2, order="completed", refill=True)
    seen = [run(plan, 60, seed, bad=0.2) for seed in range(20)]
    for s in seen:
        assert sorted(s.trained) == sorted(g for g in s.outcomes if s.outcomes[g] == "done")
    assert any(max(s.lags) > plan.max_lag for s in seen)
    assert any(s.trained != sorted(s.trained) for s in seen)


def batches_of(plan: Plan, outcomes: list[Outcome]) -> list[tuple[int, ...]]:
    law, batches = Admission(plan), list[tuple[int, ...]]()
    left = list(enumerate(outcomes))
    while True:
        while left and law.may_start():
            law.start()
            law.ended(*left.pop(0))
        if not left:
            law.exhausted()
        if law.finished():
            return batches
        batches.append(law.take().trained)
        law.publishes(law.handed_out)


def test_batches_by_hand() -> None:
    outcomes: list[Outcome] = ["done", "filtered", "failed", "timed_out", "done", "done", "done"]
    assert batches_of(Plan(2, max_lag=0), outcomes) == [(0,), (), (4, 5), (6,)]
    assert batches_of(Plan(2, max_lag=0, refill=True), outcomes) == [(0, 4), (5, 6)]
    assert batches_of(Plan(2, max_lag=0, steps=1), outcomes) == [(0,)]
    assert batches_of(Plan(2, max_lag=3, steps=1, refill=True), outcomes) == [(0, 4)]
    assert batches_of(Plan(2, max_lag=0, steps=0), outcomes) == []


def test_a_batch_that_can_never_come_raises_with_the_numbers() -> None:
    law = Admission(Plan(1, max_lag=1))
    for _ in range(2):
        law.ended(law.start(), "done")
        law.take()
    with pytest.raises(
        LagExceeded, match=r"batch 2 .*1 batches or more, and 0 are published"
    ) as it:
        law.check_can_come()
    assert (it.value.batch, it.value.published, it.value.max_lag) == (2, 0, 1)
    law.publishes(1)
    law.check_can_come()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"groups_per_batch": 0}, "at least 1"),
        ({"groups_per_batch": True}, "integer"),
        ({"groups_per_batch": 1, "max_lag": -1}, "at least 0"),
        ({"groups_per_batch": 1, "steps": -1}, "at least 0"),
        ({"groups_per_batch": 1, "order": "random"}, "submitted, completed"),
    ],
)
def test_a_plan_refuses_values_that_mean_nothing(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Plan(**arguments)


def test_seeds_depend_on_every_number_of_the_place() -> None:
    seeds = {
        seed_of(s, g, m, a) for s in range(3) for g in range(5) for m in range(5) for a in range(3)
    }
    assert len(seeds) == 3 * 5 * 5 * 3
    assert seed_of(7, 1, 2, 0) == 2029817780  # the same on every machine
