"""Runs the scenarios with the official SDK and with ours, side by side.

    python -m tests.cloud                          all, with both, and a table
    python -m tests.cloud --only 'hot load'        those whose names hold the words
    python -m tests.cloud --side ours              ours against the recorded outcomes
    python -m tests.cloud --side official --record the official outcomes, written down anew

It ends with 1 where ours is worse.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from tests.cloud.recorded import read, write
from tests.cloud.runner import OFFICIAL, OURS, compare, run_side
from tests.cloud.scenario import Outcome, Scenario, worse
from tests.cloud.scenarios import SCENARIOS


def _cell(outcome: Outcome) -> str:
    count = sum(name != "close" for name, _ in outcome.steps)
    said = f"{outcome.succeeded}/{count}"
    marks = ("" if outcome.alive else " dead") + ("" if outcome.finished else " cut off")
    return f"{said + marks:16s} {outcome.requests:5d} {outcome.seconds:6.1f}"


def table(
    scenarios: list[Scenario],
    official: dict[str, Outcome],
    ours: dict[str, Outcome],
    *,
    timed: bool = True,
) -> tuple[str, int]:
    """The table as text, and how many rows are worse.

    Args:
        timed: compare the times: of runs side by side, not with recorded ones.
    """
    columns = f"{'req':>5s} {'s':>6s}"
    head = f"{'scenario':56s} {'official':16s} {columns}   {'ours':16s} {columns}"
    lines, count = [head], 0
    for scenario in scenarios:
        one, other = official[scenario.name], ours[scenario.name]
        found = worse(one, other, timed=timed)
        count += bool(found)
        lines.append(f"{scenario.name:56s} {_cell(one)}   {_cell(other)}")
        lines += [f"{'':8s}WORSE: {what}" for what in found]
    lines.append(f"{len(scenarios)} scenarios, ours worse in {count}")
    return "\n".join(lines), count


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.cloud", description=__doc__)
    parser.add_argument("--only", default="", help="words in the scenarios' names")
    parser.add_argument("--side", choices=["both", OFFICIAL, OURS], default="both")
    parser.add_argument("--record", action="store_true", help="write official outcomes down")
    asked = parser.parse_args()
    scenarios = [one for one in SCENARIOS if asked.only in one.name]
    if asked.side == "both":
        official, ours = asyncio.run(compare(scenarios))
    elif asked.side == OURS:
        official, ours = read(), asyncio.run(run_side(OURS, scenarios))
    else:
        official, ours = asyncio.run(run_side(OFFICIAL, scenarios)), {}
    if asked.record and asked.side != OURS:
        write(official)
    if not ours:
        rows = [f"{one.name:56s} {_cell(official[one.name])}\n" for one in scenarios]
        sys.stdout.write("".join(rows))
        return 0
    text, count = table(scenarios, official, ours, timed=asked.side == "both")
    sys.stdout.write(text + "\n")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
