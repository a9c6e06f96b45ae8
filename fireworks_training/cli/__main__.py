"""`python -m fireworks_training.cli`: the `fireworks-training` command without its script."""

from __future__ import annotations

from fireworks_training.cli.main import main

if __name__ == "__main__":
    main(prog_name="fireworks-training")
