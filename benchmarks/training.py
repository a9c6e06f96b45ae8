"""What the training client costs, beside both official clients, against one stub trainer.

    python benchmarks/training.py --tinker PYTHON --fireworks PYTHON [--hangs] [--rounds 3]

PYTHON: an interpreter that has tinker 0.38 or fireworks-ai 1.2.30 and torch; without it, that side
is left out. Each cell is a process of its own (`training_client.py`); the sides take turns. With
`--hangs` also how long a request that is never answered holds up an operation; that takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
WORKS = {
    "sft": "forward_backward + optim_step, 256 x 512 tokens, pipelined",
    "rl": "the same with advantages and logprobs",
    "long": "8 x 16,384 tokens",
    "tiny": "2,000 tiny operations, pipelined",
    "custom": "custom loss, 64 x 512",
    "storm500": "3 s of 500 on the result",
    "storm408": "3 s of 408 on the result",
}
HANGS = {"hangresult": "a poll that is never answered", "hangsubmit": "a submit, likewise"}
UNITS = {
    "cpu_per_mtok": "CPU s per million tokens",
    "cpu_ms": "CPU ms each",
    "ops_per_s": "operations/s",
    "stall_ms": "longest stall, ms",
    "requests_per_s": "requests/s",
    "recovered_s": "recovered after, s",
    "said_s": "said after, s",
}
LIMITED = {"storm500", "storm408", *HANGS}
"""Works whose stall says nothing."""


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tinker")
    parser.add_argument("--fireworks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hangs", action="store_true")
    parser.add_argument("--works", nargs="*", default=list(WORKS))
    options = parser.parse_args()
    sides = {"ours-protobuf": sys.executable, "ours-json": sys.executable}
    if options.tinker:
        sides["tinker"] = options.tinker
    if options.fireworks:
        sides |= {"fireworks-v1": options.fireworks, "fireworks-v2": options.fireworks}
    works = {name: WORKS[name] for name in options.works} | (HANGS if options.hangs else {})
    figures: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for round_ in range(options.rounds):
        for work in works:
            for side, python in sides.items():
                if round_ and work in LIMITED:
                    continue
                figures[work, side].append(measure(side, work, python))
    show(works, list(sides), figures)


def measure(side: str, work: str, python: str) -> dict[str, float]:
    """One cell: a stub and a client, both new."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stub = [sys.executable, str(HERE / "training_stub.py"), str(port), "--protobuf"]
    server = subprocess.Popen(
        [*stub, "--comms", "v2" if side.endswith("v2") else "v1"],
        stdin=subprocess.PIPE,  # closed with this process, whatever ends it
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/stats").read()
                break
            except OSError:
                time.sleep(0.05)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TINKER_TELEMETRY": "0"}
        command = [python, str(HERE / "training_client.py"), side, work, url]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise SystemExit(f"{side} {work} failed:\n{done.stdout}\n{done.stderr}")
        result: dict[str, float] = json.loads(lines[-1])
        return result
    finally:
        server.kill()
        server.wait()


def show(
    works: dict[str, str],
    sides: list[str],
    figures: dict[tuple[str, str], list[dict[str, float]]],
) -> None:
    """The table: medians, with the spread."""
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}; median (min to max).\n"
    )
    print("| work | figure | " + " | ".join(sides) + " |")
    print("|---|---|" + "---|" * len(sides))
    for work, title in works.items():
        for unit, name in UNITS.items():
            cells = []
            for side in sides:
                values = [run[unit] for run in figures[work, side] if unit in run]
                cells.append(_cell(values))
            if any(cells) and not (unit == "stall_ms" and work in LIMITED):
                print(f"| {title} | {name} | " + " | ".join(cells) + " |")


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.median(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
