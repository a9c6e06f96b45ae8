"""Runs scenarios with one SDK or both: a cloud for each, and a process for each SDK."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.cloud.scenario import Outcome, Scenario, worse
from tests.cloud.server import QUIET, Cloud, serving
from tests.interop.environments import interpreter

HERE = Path(__file__).parent
OFFICIAL, OURS, IMPATIENT = "official", "ours", "impatient"
_MODULES = {OFFICIAL: "official_side", OURS: "our_side", IMPATIENT: "impatient_side"}
_STARTS_WITHIN_S = 120.0
# Between the beginnings of two programs of one process, since they share its loop and its one
# processor, and many that begin at once would wait for each other. The longest begin first.
PAUSE_S = 0.1


def python_of(side: str) -> str:
    """The interpreter that has a side's SDK."""
    return interpreter("official") if side == OFFICIAL else sys.executable


def _environment(more: dict[str, str]) -> dict[str, str]:
    """The caller's, without what would reach the SDKs; each run has a ledger of its own."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("FIREWORKS_", "TINKER_", "PYTEST_"))
        and key.upper() not in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    }
    fixed = {"OMP_NUM_THREADS": "1", "TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    return kept | fixed | {"PYTHONPATH": str(HERE.parent.parent)} | more


def _outcome(said: dict[str, Any], cloud: Cloud) -> Outcome:
    counted = {name: n for name, n in sorted(cloud.requests.items()) if name not in QUIET}
    steps = [(name, how) for name, how in said["steps"]]
    return Outcome(
        steps=steps,
        requests=sum(counted.values()),
        routes=counted,
        applied=cloud.applied,
        stale=cloud.stale,
        left=cloud.left,
        seconds=said["seconds"],
        finished=said["finished"],
    )


class _Worker:
    """A process with one SDK, in one environment, that runs its scenarios at the same time."""

    def __init__(
        self, side: str, scenarios: Sequence[Scenario], clouds: Sequence[Cloud], pause_s: float
    ) -> None:
        self._side = side
        self._pause_s = pause_s
        self._scenarios = scenarios
        self._clouds = {
            scenario.name: cloud for scenario, cloud in zip(scenarios, clouds, strict=True)
        }

    async def run(self, urls: Sequence[str]) -> dict[str, Outcome]:
        """What came of each, by name."""
        first = self._scenarios[0].environment
        environment = {key: value.replace("{url}", urls[0]) for key, value in first.items()}
        with tempfile.TemporaryDirectory(prefix="cloud-harness-") as state:
            process = await asyncio.create_subprocess_exec(
                python_of(self._side),
                str(HERE / "worker.py"),
                _MODULES[self._side],
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment({"XDG_STATE_HOME": state, **environment}),
                limit=64 << 20,
            )
            try:
                return await self._talk(process, urls)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()

    async def _talk(
        self, process: asyncio.subprocess.Process, urls: Sequence[str]
    ) -> dict[str, Outcome]:
        assert process.stdin is not None
        assert process.stdout is not None
        ready = await asyncio.wait_for(process.stdout.readline(), _STARTS_WITHIN_S)
        if not ready:
            raise RuntimeError(f"the {self._side} client's process did not start")
        orders = [
            {
                "name": scenario.name,
                "program": scenario.program,
                "options": dict(scenario.options),
                "limit_s": scenario.limit_s,
                "pause_s": self._pause_s,
                "url": scenario.url.replace("{url}", url),
            }
            for scenario, url in zip(self._scenarios, urls, strict=True)
        ]
        process.stdin.write(json.dumps(orders).encode() + b"\n")
        await process.stdin.drain()
        found: dict[str, Outcome] = {}
        while len(found) < len(orders):
            line = await process.stdout.readline()
            if not line:
                missing = sorted({order["name"] for order in orders} - set(found))
                raise RuntimeError(f"the {self._side} client's process ended before {missing}")
            said = json.loads(line)
            found[said["name"]] = _outcome(said, self._clouds[said["name"]])
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{self._side}: {len(found)} of {len(orders)} ")
        return found


def _by_process(scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
    """Scenarios that may share a process; one with variables, or to run alone, has its own."""
    own = [bool(scenario.environment) or scenario.alone for scenario in scenarios]
    plain = [scenario for scenario, alone in zip(scenarios, own, strict=True) if not alone]
    plain.sort(key=lambda scenario: -scenario.limit_s)
    special = [[scenario] for scenario, alone in zip(scenarios, own, strict=True) if alone]
    return [group for group in (plain, *special) if group]


async def run_side(
    side: str,
    scenarios: Sequence[Scenario],
    clouds: dict[str, Cloud] | None = None,
    pause_s: float = PAUSE_S,
) -> dict[str, Outcome]:
    """Run all scenarios with one SDK, at the same time.

    Args:
        clouds: filled with each scenario's server, for callers that look at what it saw; one that
            is there already is used.
        pause_s: between the beginnings of two programs.
    """
    made = clouds if clouds is not None else {}
    for scenario in scenarios:
        made.setdefault(scenario.name, Cloud(scenario.habits, scenario.faults))
    async with AsyncExitStack() as stack:
        urls = {
            scenario.name: await stack.enter_async_context(serving(made[scenario.name]))
            for scenario in scenarios
        }
        parts = await asyncio.gather(
            *(
                _Worker(side, group, [made[one.name] for one in group], pause_s).run(
                    [urls[one.name] for one in group]
                )
                for group in _by_process(scenarios)
            )
        )
    return {name: outcome for part in parts for name, outcome in part.items()}


async def run_sides(
    sides: Sequence[str], scenarios: Sequence[Scenario]
) -> dict[str, dict[str, Outcome]]:
    """Run all scenarios with each of the SDKs, side by side."""
    found = await asyncio.gather(*(run_side(side, scenarios) for side in sides))
    return dict(zip(sides, found, strict=True))


async def compare(
    scenarios: Sequence[Scenario],
) -> tuple[dict[str, Outcome], dict[str, Outcome]]:
    """Run all with both SDKs; where ours is worse, again, and the second time counts.

    Backoffs are drawn by chance, and a busy machine is slow: what ours is worse in has to be so
    twice.
    """
    found = await run_sides((OFFICIAL, OURS), scenarios)
    official, ours = found[OFFICIAL], found[OURS]
    again = [one for one in scenarios if worse(official[one.name], ours[one.name])]
    if again:
        found = await run_sides((OFFICIAL, OURS), again)
        official, ours = official | found[OFFICIAL], ours | found[OURS]
    return official, ours
