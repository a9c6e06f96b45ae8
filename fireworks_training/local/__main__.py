"""`python -m fireworks_training.local [--settings-fd N]`: the platform as a process of its own.

Reads one JSON line of settings, prints one ready line, runs until it is told to end. A failure is
one JSON line `{"error": ...}` on standard output when `output` is "json", and exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes.supervisor import supervise
from fireworks_training.local.settings import PlatformSettings, parse, read_line


def main() -> int:
    """Run the platform; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fireworks_training.local")
    parser.add_argument(
        "--settings-fd",
        type=int,
        default=0,
        metavar="N",
        help="descriptor to read the settings from, one JSON line (default: standard input)",
    )
    fd: int = parser.parse_args().settings_fd
    output = "json"
    try:
        settings = parse(PlatformSettings, read_line(fd))
        output = settings.output
        asyncio.run(supervise(settings, fd))
    except LocalPlatformError as error:
        print(f"supervisor: {error.message}", file=sys.stderr, flush=True)
        if output == "json":
            print(json.dumps({"error": error.message}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
