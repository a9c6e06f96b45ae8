"""The `fireworks-training` command."""

from __future__ import annotations

from fireworks_training.cli.main import main

__all__ = ["main"]
