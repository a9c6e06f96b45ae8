"""How much of a provisioning's time is the SDK's own: against the platform's clock, and the peer's.

    python benchmarks/provisioning.py --official /path/to/python           # about 3 minutes
    python benchmarks/provisioning.py --runs 5 --write                     # and the table

A local platform serves as a process of its own, with the delays of a row before a trainer and a
replica start. A run makes a trainer and a deployment and waits for both. The platform's time is
from the call to the later of the two moments at which the platform noted them ready, by its own
records and the same clock; the SDK's share is the rest. `--official` names the Python of an
environment with `fireworks-ai`, whose managed provisioning takes turns with ours; its runs include
the making of the model, some 0.1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform as host
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = ((0.0, 0.0), (2.0, 1.0), (8.0, 4.0), (20.0, 10.0))
"""Seconds before a trainer and before a replica starts."""

FOREIGN = (20.0, 10.0)
"""The row that is measured also as a platform that can't hold an answer back would have it."""

OFFICIAL = """
import json, sys, time
from fireworks.training.sdk import FiretitanServiceClient
options = json.loads(sys.argv[1])
started = time.time()
service = FiretitanServiceClient.from_firetitan_config(**options)
service.create_training_client(base_model=options["base_model"], lora_rank=0)
ended = time.time()
print(json.dumps([started, ended]), flush=True)
sys.stdin.readline()
service.close()
"""


@contextlib.contextmanager
def platform(trainer_delay: float, deployment_delay: float) -> Iterator[dict[str, Any]]:
    """The local platform, as its ready line describes it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fireworks_training.cli", "serve", "--json", "--until-eof"]
        command += ["--state-dir", folder, "--trainer-delay", str(trainer_delay)]
        command += ["--deployment-delay", str(deployment_delay)]
        # The peer takes only keys that look like the cloud's.
        environment = {**os.environ, "FIREWORKS_API_KEY": f"fw_{secrets.token_hex(16)}"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # closed with this process, whatever ends it
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parent,
            env=environment,
        )
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()
            process.wait(20)


def options(served: dict[str, Any], run: str) -> dict[str, Any]:
    """What both sides are asked for."""
    return {
        "base_url": served["base_url"],
        "api_key": served["api_key"],
        "base_model": served["model"],
        "training_shape_id": served["training_shape"],
        "trainer_job_id": f"t-{run}",
        "deployment_id": f"d-{run}",
        "cleanup_trainer_on_close": True,
        "cleanup_deployment_on_close": "delete",
    }


async def ready_at(served: dict[str, Any], run: str) -> float:
    """When the platform noted the later of the two ready."""
    import aiohttp

    times = list[float]()
    async with aiohttp.ClientSession(headers={"X-API-Key": served["api_key"]}) as session:
        for path in (f"rlorTrainerJobs/t-{run}", f"deployments/d-{run}"):
            async with session.get(f"{served['base_url']}/v1/accounts/local/{path}") as answer:
                row = await answer.json()
                times.append(datetime.fromisoformat(row["updateTime"]).timestamp())
    return max(times)


async def ours(served: dict[str, Any], run: str, *, polls: bool = False) -> tuple[float, float]:
    """The platform's time and our share, in seconds.

    Args:
        polls: look as at a platform that can't hold an answer back: it never sees the header.
    """
    from fireworks_training import AsyncFiretitanServiceClient

    settings = options(served, run)
    if polls:
        settings["additional_headers"] = {"Prefer": ""}
    started = time.time()
    async with AsyncFiretitanServiceClient.from_firetitan_config(**settings) as service:
        # A sampler needs both resources and makes no model; that tokenizer is never used.
        await service.create_deployment_sampler(tokenizer=object())  # type: ignore[arg-type]
        ended = time.time()
        ready = await ready_at(served, run)
    return ready - started, ended - ready


async def official(python: str, served: dict[str, Any], run: str) -> tuple[float, float]:
    """The platform's time and the peer's share, in seconds."""
    process = await asyncio.create_subprocess_exec(
        python,
        "-c",
        OFFICIAL,
        json.dumps(options(served, run)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    started, ended = json.loads(await process.stdout.readline())
    ready = await ready_at(served, run)
    await process.communicate(b"\n")
    return ready - started, ended - ready


async def measure(runs: int, python: str | None, peer_runs: int) -> list[str]:
    """The lines of the table."""
    lines = [
        "| trainer, replica start after | platform | SDK's share | official SDK's share |",
        "|---|---|---|---|",
    ]
    for trainer_delay, deployment_delay in ROWS:
        with platform(trainer_delay, deployment_delay) as served:
            await ours(served, "warm-up")
            mine = list[tuple[float, float]]()
            peer = list[tuple[float, float]]()
            for number in range(runs):
                mine.append(await ours(served, f"ours-{number}"))
                if python is not None and number < peer_runs:
                    peer.append(await official(python, served, f"peer-{number}"))
        lines.append(
            f"| {trainer_delay:g} s, {deployment_delay:g} s "
            f"| {shown([took for took, _ in mine])} | {shown([share for _, share in mine])} "
            f"| {shown([share for _, share in peer]) if peer else '-'} |"
        )
        print(lines[-1], flush=True)
    with platform(*FOREIGN) as served:
        polled = [await ours(served, f"polled-{number}", polls=True) for number in range(2)]
    lines.append(
        f"| {FOREIGN[0]:g} s, {FOREIGN[1]:g} s, polled | {shown([took for took, _ in polled])} "
        f"| {shown([share for _, share in polled])} | - |"
    )
    print(lines[-1], flush=True)
    return lines


def shown(seconds: list[float]) -> str:
    """Median and spread, in milliseconds."""
    ms = [1000 * value for value in seconds]
    return f"{statistics.median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})"


def main() -> None:
    """Measure, print, and write the section of README.md if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--official", metavar="PYTHON")
    parser.add_argument("--peer-runs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines = asyncio.run(measure(arguments.runs, arguments.official, arguments.peer_runs))
    text = (
        "## Provisioning: the SDK's own share\n\n"
        "    python benchmarks/provisioning.py --official PYTHON --write\n\n"
        f"On {host.machine()} with {host.system()}, Python {host.python_version()}, aiohttp "
        f"{version('aiohttp')}; a trainer and a deployment on the local platform; milliseconds,\n"
        f"median (min to max) of {arguments.runs} runs, of the peer {arguments.peer_runs} (it "
        "looks every 5 s and every 15 s).\nThe local platform holds the answer of a look back "
        'until something changes; "polled" is how\na platform fares that can\'t: it is looked '
        "at every hundredth of the time for which nothing\nhas changed.\n\n" + "\n".join(lines)
    )
    print(f"\n{text}")
    if arguments.write:
        path = HERE / "README.md"
        begin, end = "<!-- provisioning -->", "<!-- /provisioning -->"
        whole = path.read_text()
        before, _, rest = whole.partition(begin)
        after = rest.partition(end)[2] if rest else "\n"
        path.write_text(f"{before.rstrip()}\n\n{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
