"""The `fireworks-training` command: one module a command, behind the lazy group in `main`."""

from __future__ import annotations

from fireworks_training.cli.main import main

__all__ = ["main"]
