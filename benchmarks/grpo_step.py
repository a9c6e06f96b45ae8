"""A whole GRPO step, sample to synced weights: the demo's loop here, and TRL's GRPOTrainer.

    python -m venv /some/where && /some/where/bin/pip install trl torch
    python benchmarks/grpo_step.py --trl /some/where/bin/python [--rounds 15]

Both train the shipped model on the problems that ship, 16 prompts x 16 samples a step, and take
turns: one step here, one step of TRL as tuned, and so on, the others standing still meanwhile. Two
sizes: completions of exactly 6 tokens, and the demo's, up to 48. Here a step is sampling over HTTP
with logprobs, the update over HTTP, the snapshot's save and its hot load; trainer and engine have
one torch thread each. TRL samples and trains in one process, on two threads.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any

import fireworks_training
from fireworks_training import AsyncFiretitanServiceClient
from fireworks_training.cli.demo_loop import LoopPlan, conversations, reward, sync, update
from fireworks_training.cli.demo_problems import load_problems

ASSETS = Path(fireworks_training.__file__).parent / "local" / "assets"
SIZES = {"6": (6, 6), "up to 48": (48, 0)}
WARM = 3
"""Rounds that are not counted."""


class Peer:
    """TRL in an interpreter of its own, a step at a time."""

    def __init__(self, python: str, tokens: tuple[int, int], *options: str) -> None:
        job = {
            "model": str(ASSETS / "tiny-qwen3"),
            "problems": str(ASSETS / "problems.jsonl"),
            "prompts": LoopPlan.prompts,
            "samples": LoopPlan.samples,
            "max_tokens": tokens[0],
            "min_tokens": tokens[1],
            "threads": 2,
            "micro_batches": 1,
        }
        script = Path(__file__).with_name("peer_trl.py")
        self._process = subprocess.Popen(
            [python, str(script), json.dumps(job), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines = self._out(self._process.stdout)
        while not (line := self._line()).startswith("ready"):
            pass
        self.versions = line.removeprefix("ready ")

    @staticmethod
    def _out(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def _line(self) -> str:
        line = self._lines.readline()
        if not line:
            raise SystemExit("TRL ended early; its output is above")
        return line.strip()

    async def step(self) -> float:
        """Seconds of one step."""
        stdin = self._out(self._process.stdin)

        def one() -> float:
            stdin.write("\n")
            stdin.flush()
            return float(self._line())

        return await asyncio.to_thread(one)

    def close(self) -> None:
        """End it."""
        self._out(self._process.stdin).close()
        self._process.wait(30)


async def our_steps(
    service: AsyncFiretitanServiceClient, tokens: tuple[int, int]
) -> Callable[[], Awaitable[float]]:
    """A function that does one step of the demo and gives its seconds."""
    plan = dataclasses.replace(LoopPlan(), warmup=1)
    problems = load_problems(ASSETS / "problems.jsonl")
    client = await service.create_training_client()
    sampler = await sync(service, client, "start")
    order = random.Random(0)
    count = 0

    async def step() -> float:
        nonlocal sampler, count
        began = time.perf_counter()
        batch = order.sample(problems, plan.prompts)
        options: dict[str, Any] = {"min_tokens": tokens[1]} if tokens[1] else {}
        completions = await sampler.sample_with_tokens(
            conversations(batch), n=plan.samples, max_tokens=tokens[0], logprobs=True, **options
        )
        if tokens[1]:
            rewards = [float(len(c.text) % 2) for c in completions]
        else:
            rewards = [reward(c, batch[c.prompt_index]) for c in completions]
        await update(client, completions, rewards, plan, count)
        sampler = await sync(service, client, f"step-{count}")
        count += 1
        return time.perf_counter() - began

    return step


async def compare(python: str, size: str, rounds: int) -> None:
    """One table row a side."""
    tokens = SIZES[size]
    async with AsyncFiretitanServiceClient.from_firetitan_config(
        base_url="local",
        base_model="accounts/local/models/tiny-qwen3",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        ours = await our_steps(service, tokens)
        tuned = Peer(python, tokens)
        sides: dict[str, Callable[[], Awaitable[float]]] = {
            "fireworks_training": ours,
            f"TRL, tuned ({tuned.versions})": tuned.step,
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        try:
            for number in range(WARM + rounds):
                for name, step in sides.items():
                    seconds = await step()
                    if number >= WARM:
                        times[name].append(seconds)
        finally:
            tuned.close()
    for name, values in times.items():
        print(
            f"| {size} | {name} | {statistics.median(values):.2f} "
            f"| {min(values):.2f} to {max(values):.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="A GRPO step against TRL's.")
    parser.add_argument("--trl", required=True, help="an interpreter that has TRL")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", choices=list(SIZES), action="append", help="[default: all]")
    arguments = parser.parse_args()
    print(
        f"{platform.platform()}, Python {platform.python_version()}, "
        f"fireworks_training {fireworks_training.__version__}; medians of {arguments.rounds}\n"
    )
    print("| completion tokens | | seconds a step | spread |\n|---|---|---|---|", flush=True)
    for size in arguments.size or SIZES:
        asyncio.run(compare(arguments.trl, size, arguments.rounds))


if __name__ == "__main__":
    sys.exit(main())
