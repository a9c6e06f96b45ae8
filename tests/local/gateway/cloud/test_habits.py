"""The schedule of faults: repeatable, bounded, and what the official client lives through."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training.local.gateway.cloud.habits import (
    FIRST_COMPLETIONS,
    LOOKS,
    REDIRECT,
    ROUNDS,
    STRAYS,
    CloudFault,
    Habits,
)
from fireworks_training.local.gateway.cloud.requests import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)
requests = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from(["", "d1", "d2"]), st.booleans()),
    max_size=300,
)


def run(habits: Habits, asked: list[tuple[Kind, str, bool]]) -> list[CloudFault | None]:
    met: list[CloudFault | None] = []
    for kind, deployment, loads in asked:
        if loads:
            habits.loading(deployment)
        met.append(habits.meet(kind, deployment))
    return met


@given(requests, st.none() | st.integers(0, 2**31))
def test_the_same_requests_meet_the_same_faults(
    asked: list[tuple[Kind, str, bool]], seed: int | None
) -> None:
    assert run(Habits(trouble=seed), asked) == run(Habits(trouble=seed), asked)


@given(requests, st.none() | st.integers(0, 2**31))
def test_what_failed_succeeds_when_it_is_tried_again(
    asked: list[tuple[Kind, str, bool]], seed: int | None
) -> None:
    last: dict[str, bool] = {}
    for (kind, _, _), fault in zip(asked, run(Habits(trouble=seed), asked), strict=True):
        assert not (fault is not None and last.get(kind)), kind
        last[kind] = fault is not None


def test_without_a_seed_only_habits_are_met() -> None:
    allowed = {kind: set(found.faults) for kind, found in ROUNDS.items()}
    allowed |= {"look": set(LOOKS), "complete": set(FIRST_COMPLETIONS)}
    habits = Habits()
    for number in range(200):
        if number % 10 == 0:
            habits.loading("d")
        for kind in KINDS:
            fault = habits.meet(kind, "d")
            assert fault is None or fault in allowed[kind], kind
    # No control plane call fails: the official client gives a wait up at the first.
    assert not {"control", "session", "hot_load"} & allowed.keys()


def test_every_habit_is_met() -> None:
    habits = Habits()
    met: dict[Kind, set[CloudFault | None]] = {kind: set() for kind in KINDS}
    for _ in range(12):
        habits.loading("d")
        for _ in range(28):
            for kind in KINDS:
                met[kind].add(habits.meet(kind, "d"))
    for kind, found in ROUNDS.items():
        assert set(found.faults) <= met[kind], kind
    assert set(LOOKS) <= met["look"]
    assert set(FIRST_COMPLETIONS) <= met["complete"]


def test_the_first_look_lists_nothing_and_the_second_can_t_be_read() -> None:
    habits = Habits()
    assert habits.meet("look", "d") is None
    assert habits.lists_replicas("d")  # before any load: the client looks when it is made
    habits.loading("d")
    assert habits.meet("look", "d") is None
    assert not habits.lists_replicas("d")
    assert habits.meet("look", "d") == LOOKS[0]
    assert habits.meet("look", "d") is None
    assert habits.lists_replicas("d")


def test_a_seed_brings_every_stray_fault() -> None:
    met: dict[Kind, set[CloudFault | None]] = {kind: set() for kind in KINDS}
    for seed in range(20):
        habits = Habits(trouble=seed)
        for _ in range(200):
            for kind in KINDS:
                met[kind].add(habits.meet(kind))
    for kind, faults in STRAYS.items():
        assert set(faults) <= met[kind], kind
    assert any(fault is not None and fault.status == REDIRECT for fault in met["complete"])
    assert run(Habits(trouble=1), [("control", "", False)] * 300) != run(
        Habits(trouble=2), [("control", "", False)] * 300
    )


@pytest.mark.parametrize("pace", [0.0, 0.1, 1.0, 3.0])
def test_a_pace_scales_every_duration(pace: float) -> None:
    habits, usual = Habits(pace), Habits()
    assert habits.limits() == {k: (v or 0) * pace for k, v in usual.limits().items()}
    assert habits.notice_after(1) == pytest.approx(usual.notice_after(1) * pace)
    assert usual.notice_after(1) > usual.notice_after(0) > 0
