"""Runs programs in one process, each in a thread of its own; started by `runner`.

    python worker.py official_side|our_side|impatient_side

Reads the scenarios as one JSON line on stdin, writes one JSON line for each that ended, and ends
without waiting for what still runs when stdin closes. It runs in the official client's interpreter
too, and imports only the files beside it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import programs
import surface

_WRITING = threading.Lock()


def say(**facts: Any) -> None:
    """One line for the runner."""
    with _WRITING:
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


def carry_out(sdk: Any, scenario: dict[str, Any]) -> None:
    """One program, from its beginning to its end or to its limit."""
    run = programs.Run()
    began = time.monotonic()
    ended = threading.Event()

    def body() -> None:
        try:
            program = (programs.PROGRAMS | surface.SURFACE)[scenario["program"]]
            program(run, sdk, scenario["url"], **scenario["options"])
        except BaseException as error:
            run.note("program", error)
        ended.set()

    threading.Thread(target=body, daemon=True).start()
    finished = ended.wait(scenario["limit_s"])
    took = time.monotonic() - began
    say(name=scenario["name"], steps=list(run.steps), seconds=took, finished=finished)


def main() -> None:
    """Import the SDK, then run all that is asked for at once."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sdk = importlib.import_module(sys.argv[1])
    say(ready=True)
    for scenario in json.loads(sys.stdin.readline()):
        threading.Thread(target=carry_out, args=(sdk, scenario), daemon=True).start()
        time.sleep(scenario["pause_s"])
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
