"""Ours beside the official client: a sample by its recorded outcomes, and all, live."""

from __future__ import annotations

import asyncio
import zlib
from fnmatch import fnmatchcase

import pytest

from tests.cloud.grid import GRID
from tests.cloud.known_worse import KNOWN_WORSE, is_known
from tests.cloud.recorded import read
from tests.cloud.runner import OURS, compare, run_side
from tests.cloud.scenario import Outcome, worse
from tests.cloud.scenarios import SCENARIOS

QUICK_S = 2.0
ONE_IN = 8
RECORDED = read()


def _sampled(name: str) -> bool:
    """All that stand alone, and one in eight of the grid."""
    alone = name not in {scenario.name for scenario in GRID}
    return alone or zlib.crc32(name.encode()) % ONE_IN == 0


QUICK = [
    scenario
    for scenario in SCENARIOS
    if RECORDED[scenario.name].seconds < QUICK_S
    and not is_known(scenario.name)
    and _sampled(scenario.name)
]


@pytest.fixture(scope="module")
def ours() -> dict[str, Outcome]:
    """All quick scenarios with our SDK, at the same time."""
    return asyncio.run(run_side(OURS, QUICK, pause_s=0.03))


@pytest.mark.parametrize("name", [scenario.name for scenario in QUICK])
def test_ours_is_not_worse_than_recorded(ours: dict[str, Outcome], name: str) -> None:
    assert worse(RECORDED[name], ours[name], timed=False) == []


def test_known_ones_are_scenarios() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert [row for row in KNOWN_WORSE if not any(fnmatchcase(name, row) for name in names)] == []


@pytest.mark.slow
async def test_ours_is_never_worse() -> None:
    official, own = await compare(SCENARIOS)
    verdicts = {name: worse(official[name], own[name]) for name in official}
    assert {
        name: verdict for name, verdict in verdicts.items() if verdict and not is_known(name)
    } == {}
    # What is recorded, and holds ours in the fast tests, is what the official client does.
    assert {
        name: (outcome.succeeded, RECORDED[name].succeeded)
        for name, outcome in official.items()
        if RECORDED[name].seconds < QUICK_S and outcome.succeeded != RECORDED[name].succeeded
    } == {}
