"""How long a caller's loop stands still for ten large `forward_backward` calls in a row.

    OMP_NUM_THREADS=1 python benchmarks/caller_loop.py [--rounds 9] [--tokens 131072]

The caller runs asyncio. It makes ten calls of 256 x 512 tokens (with tinker, it awaits the async
method that hands out the future), and lets the loop run once after each. *In ten calls*: the time
spent in them. *The loop late*: by how much a task that sleeps for 1 ms is woken late, from first
call to the last result, added up where it is more than 1 ms. The clients are fireworks_training in
protobuf and in JSON, and tinker, in processes of their own, against the stub of `training.py`; a
round each in turns; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SIDES = ("protobuf", "json", "tinker")
CALLS = 10
LOSS = "importance_sampling"


class Late:
    """A task of the caller's loop that notes by how much it is woken late."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self.on = True

    async def watch(self) -> None:
        while self.on:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self.late.append(time.perf_counter() - due)

    def total(self) -> float:
        return sum(late for late in self.late if late > 0.001)


async def one_round(client: Any, data: list[Any], adam: Any) -> dict[str, float]:
    """Ten calls in a row, and the results."""
    gc.collect()
    late, spent, futures = Late(), 0.0, list[Any]()
    watching = asyncio.create_task(late.watch())
    await asyncio.sleep(0.01)
    late.late.clear()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(CALLS):
        begin = time.perf_counter()
        made = client(data)
        if asyncio.iscoroutine(made):
            made = await made
        spent += time.perf_counter() - begin
        futures.append(made)
        await asyncio.sleep(0)
    await asyncio.gather(*futures)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    late.on = False
    await watching
    await adam()
    seconds = {"calls": spent, "loop": late.total(), "longest": max(late.late)}
    return {name: value * 1e3 for name, value in {**seconds, "cpu": cpu, "wall": wall}.items()}


async def side(name: str, url: str, tokens: int) -> None:
    """One client: a round for each line of stdin."""
    import tinker
    from training_client import SIZES, datums

    logging.disable(logging.WARNING)
    SIZES["rl"] = (256, tokens // 256)
    data = datums(tinker, "rl")
    adam = tinker.AdamParams(learning_rate=0.0)
    if name == "tinker":
        made = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
        theirs = await made.create_lora_training_client_async(base_model="stub", rank=8)

        async def step() -> None:
            await (await theirs.optim_step_async(adam))

        await rounds(lambda some: theirs.forward_backward_async(some, LOSS), data, step)
        return
    from training_client import NoDeployment

    from fireworks_training import AsyncFiretitanTrainingClient, FiretitanProvisioningConfig
    from fireworks_training._async.http.transport import Transport
    from fireworks_training._async.runtime.loops import OwnerLoop
    from fireworks_training._async.training.model import RemoteModel
    from fireworks_training._async.training.session import TrainerSession
    from fireworks_training._async.weights.publisher import WeightPublisher

    owner = OwnerLoop()

    def transport(loop: OwnerLoop) -> Transport:
        return Transport(owner=loop, base_url=url, api_key="tml-benchmark")

    session = TrainerSession(transport(owner), transport, url)
    await session.open(None)
    config = FiretitanProvisioningConfig(base_model="stub", dialect=name)  # type: ignore[arg-type]
    model = RemoteModel(session, await session.create_model(config), config, owner=owner)
    ours = AsyncFiretitanTrainingClient(model, WeightPublisher(owner, NoDeployment()))

    async def own_step() -> None:
        await ours.optim_step(adam)

    await rounds(lambda some: ours.forward_backward(some, LOSS), data, own_step)


async def rounds(client: Any, data: list[Any], adam: Any) -> None:
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await one_round(client, data, adam)), flush=True)


def measured(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every side's rounds, in turns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    stub = [sys.executable, str(HERE / "training_stub.py"), str(port), "--protobuf"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TINKER_TELEMETRY": "0"}
    children = [subprocess.Popen(stub, stdin=subprocess.PIPE)]
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{url}/stats").read()
                break
            except OSError:
                time.sleep(0.05)
        sides: dict[str, subprocess.Popen[str]] = {}
        for name in SIDES:
            command = [sys.executable, __file__, "--side", name, "--url", url]
            sides[name] = subprocess.Popen(
                [*command, "--tokens", str(options.tokens)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            _answer(sides[name])
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for turn in range(options.rounds + 1):
            for name, process in sides.items():
                assert process.stdin is not None
                print(file=process.stdin, flush=True)
                answer = json.loads(_answer(process))
                if turn:  # the first is for warming up
                    figures[name].append(answer)
        for process in sides.values():
            process.kill()
            process.wait()
        return figures
    finally:
        for child in children:
            child.kill()
            child.wait()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("ready", "{")):
            return line
    raise SystemExit(f"{process.args} ended")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=131_072, help="of one call")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--url")
    options = parser.parse_args()
    if options.side:
        asyncio.run(side(options.side, options.url, options.tokens))
        return
    figures = measured(options)
    names = {
        "calls": "in ten calls, ms",
        "loop": "the loop late, ms in all",
        "longest": "the latest callback, ms",
        "cpu": "CPU of the round, ms",
        "wall": "wall of the round, ms",
    }
    print("| figure | " + " | ".join(SIDES) + " |\n|---|" + "---|" * len(SIDES))
    for key, title in names.items():
        cells = []
        for name in SIDES:
            values = [figure[key] for figure in figures[name]]
            middle = statistics.median(values)
            cells.append(f"{middle:.1f} ({min(values):.1f} to {max(values):.1f})")
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
