"""`fireworks-training ps` and `reap`: what runs hold or have left, and its removal.

Turns options into calls of `ResourceLedger` and its rows into a table or JSON; it decides nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fireworks_training import HeldResource

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
    """Seconds, written as 90, 90s, 15m, 2h or 1d."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration: write 90, 90s, 15m, 2h or 1d", param, ctx)
        return float(match[1]) * _UNITS[match[2] or "s"]


_base_url = click.option(
    "--base-url", help="The platform.  [default: FIREWORKS_BASE_URL, else the Fireworks cloud]"
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.command()
@_base_url
@_as_json
def ps(base_url: str | None, as_json: bool) -> None:
    """Show what runs of yours hold or have left: state, age, replicas, run.

    The key comes from FIREWORKS_API_KEY.
    """
    from fireworks_training import FireworksTrainingError, ResourceLedger

    try:
        with ResourceLedger.connect(base_url=base_url) as ledger:
            rows = ledger.ps()
    except FireworksTrainingError as error:
        raise click.ClickException(str(error)) from error
    _show(rows, as_json=as_json, empty="nothing is held, and nothing was left")


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
@_base_url
@_as_json
def reap(
    older_than: float,
    dry_run: bool,
    kept: bool,
    other_machines: bool,
    base_url: str | None,
    as_json: bool,
) -> None:
    """Remove what runs of yours have left behind.

    Only what carries the mark of such a run, and whose process has ended. The key comes from
    FIREWORKS_API_KEY. Exit status 1 if something could not be removed.
    """
    from fireworks_training import FireworksTrainingError, ResourceLedger

    try:
        with ResourceLedger.connect(base_url=base_url) as ledger:
            rows = ledger.reap(
                older_than_s=older_than,
                dry_run=dry_run,
                kept=kept,
                other_machines=other_machines,
            )
    except FireworksTrainingError as error:
        raise click.ClickException(str(error)) from error
    _show(rows, as_json=as_json, empty="nothing was left behind")
    if any(row.outcome == "failed" for row in rows):
        sys.exit(1)


def _show(rows: Sequence[HeldResource], *, as_json: bool, empty: str) -> None:
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("KIND", "ID", "STATE", "AGE", "REPLICAS", "RUN", "OWNER", "OUTCOME", "WHY"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(
            row.kind,
            row.resource_id,
            row.state or "-",
            _age(row.age_s),
            "-" if row.replicas is None else str(row.replicas),
            row.run,
            _owner(row),
            _OUTCOMES[row.outcome],
            row.reason,
        )
    Console(markup=False, highlight=False).print(table)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.0f}s"


def _owner(row: HeldResource) -> str:
    if row.owner_alive is None:
        return f"{row.owner_pid} elsewhere"
    return f"{row.owner_pid} {'alive' if row.owner_alive else 'ended'}"
