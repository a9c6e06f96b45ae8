"""`python -m fireworks_training.cli`: runs the command where its script is not on the path."""

from __future__ import annotations

from fireworks_training.cli import main

main(prog_name="fireworks-training")
