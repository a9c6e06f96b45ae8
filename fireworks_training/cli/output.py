"""Output of the commands that show resources: a table for people, JSON for programs.

Knows rows and columns, and how an SDK error ends a command. Does not know any resource.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fireworks_training import ControlPlane

base_url_option = click.option(
    "--base-url", help="The platform.  [default: FIREWORKS_BASE_URL, else the Fireworks cloud]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

Row = Mapping[str, object]

FOLDED = 8
"""Characters of a name that stay on one line in a table that is too wide."""


@contextmanager
def errors_end_the_command() -> Generator[None]:
    """End the command with the message of an SDK error that is raised inside."""
    from fireworks_training import FireworksTrainingError

    try:
        yield
    except FireworksTrainingError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def control_plane(base_url: str | None) -> Generator[ControlPlane]:
    """Connect to the account's control plane; an error ends the command with its message."""
    from fireworks_training import ControlPlane

    with errors_end_the_command(), ControlPlane.connect(base_url=base_url) as plane:
        yield plane


def show(
    rows: Sequence[Row], columns: Mapping[str, str], *, as_json: bool, empty: str = "none"
) -> None:
    """Print rows as a table or as JSON.

    Args:
        columns: field of a row by the head of its column; JSON has all fields.
        empty: text in place of a table without rows.
    """
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head, name in columns.items():
        values = [row.get(name) for row in rows]
        longest = max(len(_cell(value)) for value in values)
        numbers = all(value is None or isinstance(value, int | float) for value in values)
        # A number on two lines reads as two numbers: on a narrow terminal names are folded instead.
        table.add_column(
            head,
            overflow="fold",
            justify="right" if numbers else "left",
            min_width=max(longest, *map(len, head.split())) if numbers else min(longest, FOLDED),
        )
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns.values()))
    console = Console(markup=False, highlight=False)
    # No column is cut off: on a terminal too narrow for all of them the lines are too long.
    least = Measurement.get(console, console.options.update(width=1000), table).minimum
    console.print(table, width=max(console.width, least), crop=False, overflow="ignore")


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return str(value)
