"""`fireworks-training completion`: prints the script that completes commands in a shell.

The scripts are click's own. Knows the shells that click knows.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import get_completion_class

PROGRAM = "fireworks-training"
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", envvar="SHELL", default="", metavar="[bash|zsh|fish]")
def completion(shell: str) -> None:
    """Print the script that completes commands and options in SHELL (yours by default).

    bash and zsh: eval "$(fireworks-training completion)" in the shell's start file. fish:
    fireworks-training completion fish > ~/.config/fish/completions/fireworks-training.fish
    """
    from fireworks_training.cli.main import main

    wanted = Path(shell).name
    if wanted not in SHELLS:
        raise click.UsageError(f"the shell is not known: name it, one of {', '.join(SHELLS)}")
    made = get_completion_class(wanted)
    assert made is not None
    click.echo(made(main, {}, PROGRAM, "_FIREWORKS_TRAINING_COMPLETE").source())
