"""`fireworks-training ps` and `reap`: show and remove the resources that runs hold or have left.

Turns options into calls of `ResourceLedger` and its rows into a table or JSON. Does not know which
resources may be removed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fireworks_training.cli.output import (
    NO_KEY,
    base_url_option,
    errors_end_the_command,
    json_option,
    show,
    wide_option,
)

if TYPE_CHECKING:
    from fireworks_training import HeldResource, ResourceLedger

ELSEWHERE = "of another account or platform"
"""Begins the reason of a resource about which the platform that is asked can say nothing."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_OUTCOMES = {
    "leave": "left",
    "remove": "would be removed",
    "removed": "removed",
    "close": "is gone",
    "closed": "was gone",
    "failed": "FAILED",
}


class Duration(click.ParamType[float]):
    """Parses seconds, written as 90, 90s, 15m, 2h or 1d."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse a duration to seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration: write 90, 90s, 15m, 2h or 1d", param, ctx)
        return float(match[1]) * _UNITS[match[2] or "s"]


@click.command()
@click.option(
    "--all", "everything", is_flag=True, help="Also what other platforms and accounts hold."
)
@base_url_option
@wide_option
@json_option
def ps(everything: bool, base_url: str | None, wide: bool, as_json: bool) -> None:
    """Show what runs of yours hold or have left: state, age, replicas, run.

    What is proven gone is forgotten. The key comes from FIREWORKS_API_KEY; without one, and without
    --base-url, only platforms of this machine are asked.
    """
    with errors_end_the_command(), _ledger(base_url) as ledger:
        rows = [row for row in ledger.ps(forget=True) if row.outcome != "closed"]
    shown = [row for row in rows if everything or not row.reason.startswith(ELSEWHERE)]
    _show(shown, as_json=as_json, wide=wide, empty="nothing is held, and nothing was left")
    if len(shown) < len(rows) and not as_json:
        held = len(rows) - len(shown)
        click.echo(f"{held} of other platforms or accounts are not shown: --all", err=True)


def _ledger(base_url: str | None) -> ResourceLedger:
    """Connect to the platform; without a key for it, to those of this machine."""
    from fireworks_training import InvalidArgument, ResourceLedger

    try:
        return ResourceLedger.connect(base_url=base_url)
    except InvalidArgument as error:
        if base_url is not None or not str(error).startswith(NO_KEY):
            raise
        click.echo("no FIREWORKS_API_KEY: only platforms of this machine are asked", err=True)
        return ResourceLedger.connect(base_url="local")


@click.command()
@click.option(
    "--older-than",
    type=Duration(),
    default=0.0,
    help="Only what was asked for at least so long ago: 90s, 15m, 2h, 1d.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--kept", is_flag=True, help="Also what runs have kept on purpose.")
@click.option(
    "--other-machines",
    is_flag=True,
    help="Also what runs on other machines made; only if you know that they have ended.",
)
@base_url_option
@wide_option
@json_option
def reap(
    older_than: float,
    dry_run: bool,
    kept: bool,
    other_machines: bool,
    base_url: str | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Remove what runs of yours have left behind.

    Only what carries the mark of such a run, and whose process has ended. The key comes from
    FIREWORKS_API_KEY. Exit status 1 if something could not be removed.
    """
    with errors_end_the_command(), _ledger(base_url) as ledger:
        rows = ledger.reap(
            older_than_s=older_than,
            dry_run=dry_run,
            kept=kept,
            other_machines=other_machines,
        )
    _show(rows, as_json=as_json, wide=wide, empty="nothing was left behind")
    if any(row.outcome == "failed" for row in rows):
        sys.exit(1)


def _show(rows: Sequence[HeldResource], *, as_json: bool, wide: bool, empty: str) -> None:
    fields = [asdict(row) for row in rows]
    if not as_json:
        for row, shown in zip(rows, fields, strict=True):
            shown |= {"age": _age(row.age_s), "owner": _owner(row)}
            shown["outcome"] = _OUTCOMES[row.outcome]
    columns = {
        "KIND": "kind",
        "ID": "resource_id",
        "STATE": "state",
        "AGE": "age",
        "REPLICAS": "replicas",
        "RUN": "run",
        "OWNER": "owner",
        "OUTCOME": "outcome",
        "WHY": "reason",
    }
    drop = ("REPLICAS", "OWNER", "WHY", "RUN", "AGE")
    show(fields, columns, as_json=as_json, wide=wide, drop=drop, empty=empty)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.0f}s"


def _owner(row: HeldResource) -> str:
    if row.owner_alive is None:
        return f"{row.owner_pid} elsewhere"
    return f"{row.owner_pid} {'alive' if row.owner_alive else 'ended'}"
