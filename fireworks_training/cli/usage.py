"""`fireworks-training usage`: tokens and hours of past runs, and their cost at the user's prices.

Knows prices and columns. Does not know how usage is recorded.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import cast

import click

from fireworks_training.cli.output import json_option, show, wide_option


def parse_prices(
    _context: click.Context, _parameter: click.Parameter, value: Path | None
) -> dict[str, float] | None:
    """Read the price table in a JSON file; its names are checked when it is used."""
    if value is None:
        return None
    try:
        table: object = json.loads(value.read_text())
    except ValueError as error:
        raise click.BadParameter(f"{value} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise click.BadParameter(f"{value} is not a JSON object")
    return cast(dict[str, float], table)


@click.command()
@click.argument("run", required=False)
@click.option(
    "--prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    callback=parse_prices,
    help='JSON file with money for a million tokens ("trained", "forward", "prefilled", "cached",'
    ' "sampled") and for an hour ("trainer_hour", "replica_hour"); what is absent is free.',
)
@wide_option
@json_option
def usage(run: str | None, prices: dict[str, float] | None, wide: bool, as_json: bool) -> None:
    """Show what runs have used: all of them, or those of the name or id RUN.

    What a run has used is noted every few seconds, in the user's state folder; one that was killed
    stands there as lost, with what it had used by then.
    """
    from fireworks_training import FireworksTrainingError, read_usage_records

    found = [row for row in read_usage_records() if run in (None, row.run, row.run_id)]
    if run is not None and not found:
        raise click.ClickException(f"no run {run!r} is noted; `usage` alone shows all")
    try:
        costs = [None if prices is None else row.usage.cost(prices) for row in found]
    except FireworksTrainingError as error:
        raise click.ClickException(str(error)) from error
    rows: list[dict[str, object]] = [
        {
            **{name: value for name, value in asdict(row).items() if name != "usage"},
            **asdict(row.usage),
            **({} if cost is None else {"cost": cost}),
        }
        for row, cost in zip(found, costs, strict=True)
    ]
    columns = {
        "RUN": "run",
        "ID": "run_id",
        "STATE": "state",
        "UNTIL": "ended",
        "TRAINED": "trained_tokens",
        "FORWARD": "forward_tokens",
        "PREFILLED": "prefilled_tokens",
        "CACHED": "cached_tokens",
        "SAMPLED": "sampled_tokens",
        "TRAINER S": "trainer_seconds",
        "REPLICA S": "replica_seconds",
        **({} if prices is None else {"COST": "cost"}),
    }
    if not as_json:
        for row in rows:
            row["ended"] = f"{row['ended']!s:.16}".replace("T", " ")
    drop = ("CACHED", "PREFILLED", "FORWARD", "REPLICA S", "TRAINER S", "ID", "UNTIL")
    show(rows, columns, as_json=as_json, wide=wide, drop=drop, empty="no run is noted")
    if rows and prices is not None and not as_json:
        click.echo(f"in all: {sum(cost or 0.0 for cost in costs):.2f}")
