"""Output of the commands that show resources: a table for people, JSON for programs.

Knows rows and columns, and how an SDK error ends a command. Does not know any resource.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.cells import cell_len

if TYPE_CHECKING:
    from fireworks_training import ControlPlane

base_url_option = click.option(
    "--base-url", help="The platform.  [default: FIREWORKS_BASE_URL, else the Fireworks cloud]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")

wide_option = click.option(
    "--wide", is_flag=True, help="All columns, also where the terminal is too narrow for them."
)

Row = Mapping[str, object]

NO_KEY = "no API key"
"""Begins the message of the error that a missing key raises."""


@contextmanager
def errors_end_the_command() -> Generator[None]:
    """End the command with the message of an SDK error that is raised inside."""
    from fireworks_training import FireworksTrainingError

    try:
        yield
    except FireworksTrainingError as error:
        raise click.ClickException(_for_a_shell(str(error))) from error


def _for_a_shell(message: str) -> str:
    if message.startswith(NO_KEY):
        return (
            "no API key: set FIREWORKS_API_KEY (and FIREWORKS_BASE_URL, or --base-url, for a "
            "platform other than the Fireworks cloud)"
        )
    return message


@contextmanager
def not_found_means(message: str) -> Generator[None]:
    """End the command with a message before the platform's own where that answers 404 inside."""
    from fireworks_training import NotFound

    try:
        yield
    except NotFound as error:
        raise click.ClickException(f"{message}. {error}") from error


@contextmanager
def control_plane(base_url: str | None) -> Generator[ControlPlane]:
    """Connect to the account's control plane; an error ends the command with its message."""
    from fireworks_training import ControlPlane

    with errors_end_the_command(), ControlPlane.connect(base_url=base_url) as plane:
        yield plane


def show(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    *,
    as_json: bool,
    wide: bool = False,
    drop: Sequence[str] = (),
    empty: str = "none",
) -> None:
    """Print rows as a table or as JSON; a row of a table is one line, and no cell is cut.

    A pipe gets all columns. On a terminal that is too narrow for them, columns are left out, and a
    line on stderr names them.

    Args:
        columns: field of a row by the head of its column; JSON has all fields.
        wide: leaves out no column.
        drop: heads of the columns that may be left out, the least important first.
        empty: text in place of a table without rows.
    """
    if as_json:
        click.echo(json.dumps(list(rows), indent=2))
        return
    if not rows:
        click.echo(empty)
        return
    made = {head: _column(head, [row.get(name) for row in rows]) for head, name in columns.items()}
    room = None if wide or not sys.stdout.isatty() else shutil.get_terminal_size().columns
    left_out: list[str] = []
    for head in drop:
        if room is None or _width(made) <= room:
            break
        del made[head]
        left_out.append(head)
    for line in zip(*made.values(), strict=True):
        click.echo(_GAP.join(line).rstrip())
    if left_out:
        click.echo(f"left out: {', '.join(left_out)}; --wide shows them", err=True)


_GAP = "  "


def _width(made: Mapping[str, Sequence[str]]) -> int:
    return sum(cell_len(cells[0]) + len(_GAP) for cells in made.values()) - len(_GAP)


def _column(head: str, values: Sequence[object]) -> list[str]:
    """Write a column's cells, all of one width; numbers stand to the right."""
    cells = [head, *map(_cell, values)]
    width = max(map(cell_len, cells))
    numbers = all(value is None or isinstance(value, int | float) for value in values)
    blanks = [" " * (width - cell_len(cell)) for cell in cells]
    return [b + c if numbers else c + b for b, c in zip(blanks, cells, strict=True)]


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return " ".join(str(value).split())  # a line break in a message would break the row
