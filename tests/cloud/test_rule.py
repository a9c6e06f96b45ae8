"""What counts as worse, with a client that is worse on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.cloud.recorded import read
from tests.cloud.runner import IMPATIENT, run_side
from tests.cloud.scenario import Outcome, worse
from tests.cloud.scenarios import SCENARIOS

OFFICIAL = Outcome(
    steps=[("step", "ok"), ("step", "RuntimeError: no"), ("alive", "ok")],
    requests=10,
    routes={"forward": 9, "hot_load_post": 1},
    applied=0,
    stale=1,
    left=1,
    seconds=4.0,
    finished=True,
)


def test_the_same_outcome_is_not_worse() -> None:
    assert worse(OFFICIAL, OFFICIAL) == []
    assert worse(OFFICIAL, replace(OFFICIAL, requests=20, seconds=7.0)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": [("step", "X: y"), ("step", "X: z"), ("alive", "ok")]}, "1 of 2 operations"),
        ({"steps": [("step", "ok"), ("step", "ok"), ("alive", "X: y")]}, "dead"),
        ({"requests": 21}, "21 requests"),
        ({"seconds": 7.1}, "7.1 s"),
        ({"left": 2}, "2 resources"),
        ({"applied": 1}, "1 optimizer steps applied, 0 asked for"),
        ({"stale": 2}, "2 completions of replicas that load"),
        ({"steps": [("step", "ok")], "finished": False}, "1 of 2 operations; cut off"),
    ],
)
def test_each_way_of_being_worse(change: dict[str, Any], said: str) -> None:
    assert said in "; ".join(worse(OFFICIAL, replace(OFFICIAL, **change)))


def test_more_operations_may_take_more_requests_and_time() -> None:
    done = [("step", "ok"), ("step", "ok"), ("alive", "ok")]
    assert worse(OFFICIAL, replace(OFFICIAL, steps=done, requests=90, seconds=90.0)) == []


def test_a_load_is_asked_for_once() -> None:
    steps = [*OFFICIAL.steps, ("hot load a", "ok")]
    official = replace(OFFICIAL, steps=steps)
    often = replace(official, routes={"hot_load_post": 3})
    assert worse(official, often) == ["3 loads asked for, not 1"]
    # The first was refused: the official client asked again, too.
    assert worse(replace(official, routes={"hot_load_post": 2}), often) == []


def test_what_was_recorded_elsewhere_is_not_timed() -> None:
    assert worse(OFFICIAL, replace(OFFICIAL, seconds=90.0), timed=False) == []


def test_closing_counts_by_what_it_leaves() -> None:
    raised = [*OFFICIAL.steps, ("close", "Conflict: no")]
    swallowed = [*OFFICIAL.steps, ("close", "ok")]
    assert worse(replace(OFFICIAL, steps=swallowed), replace(OFFICIAL, steps=raised)) == []


async def test_a_client_that_gives_up_at_the_first_refusal_is_found_worse() -> None:
    names = ("completions: 500 twice", "stream: plain")
    refused, plain = [scenario for name in names for scenario in SCENARIOS if scenario.name == name]
    found = await run_side(IMPATIENT, [refused, replace(plain, options={"count": 2})])
    official = read()
    assert worse(official[plain.name], found[plain.name], timed=False) == []
    assert "dead" in worse(official[refused.name], found[refused.name], timed=False)


def test_every_scenario_has_a_name_of_its_own() -> None:
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS) >= 60
    assert set(read()) == {scenario.name for scenario in SCENARIOS}
