"""The command group: names the commands, and imports the one that is run.

`fireworks-training --help` must answer at once, so a command's module, which may import torch, is
loaded only when that command runs; its line in the help stands here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

import click

from fireworks_training.models import __version__


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """Names a command's module and object, and its line in the help.

    Attributes:
        module: the module of the command.
        name: the command's name in that module.
        summary: its line in the help.
    """

    module: str
    name: str
    summary: str


COMMANDS = {
    "demo": LazyCommand(
        "fireworks_training.cli.demo",
        "demo",
        "Train, sync and score a small model on this machine, offline.",
    ),
    "serve": LazyCommand(
        "fireworks_training.cli.serve",
        "serve",
        "Run the local training platform until Ctrl-C or SIGTERM.",
    ),
    "shapes": LazyCommand("fireworks_training.cli.resources", "shapes", "Show training shapes."),
    "jobs": LazyCommand(
        "fireworks_training.cli.resources", "jobs", "Show the trainer jobs of the account."
    ),
    "deployments": LazyCommand(
        "fireworks_training.cli.resources",
        "deployments",
        "Show the deployments of the account.",
    ),
    "checkpoints": LazyCommand(
        "fireworks_training.cli.resources",
        "checkpoints",
        "List the checkpoints of a trainer job, or make a model of one.",
    ),
    "usage": LazyCommand(
        "fireworks_training.cli.usage",
        "usage",
        "Show what runs have used, and what that costs at your prices.",
    ),
    "doctor": LazyCommand(
        "fireworks_training.cli.doctor",
        "doctor",
        "Check key, platform, clock, versions, and the whole loop.",
    ),
    "ps": LazyCommand(
        "fireworks_training.cli.leftovers",
        "ps",
        "Show what runs of yours hold or have left: state, age, replicas, run.",
    ),
    "reap": LazyCommand(
        "fireworks_training.cli.leftovers",
        "reap",
        "Remove what runs of yours have left behind.",
    ),
    "completion": LazyCommand(
        "fireworks_training.cli.completion",
        "completion",
        "Print the script that completes commands in your shell.",
    ),
}


class LazyGroup(click.Group):
    """Imports its commands when they are run."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """List the names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command of a name; click reports an unknown one."""
        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        return cast(click.Command, getattr(importlib.import_module(place.module), place.name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fireworks-training")
def main() -> None:
    """Train a language model, hot-load its snapshots and sample from them, here or in the cloud."""
