"""One client of `sampler.py`'s server, in a process of its own; prints what it cost as JSON.

    python benchmarks/sampler_clients.py ADAPTER --url URL --model MODEL --total N --in-flight M

Adapters: `ours-async` (the sampler lives on the program's loop), `ours-portal` (built by hand:
it lives on the background loop), `ours-sync` (a plain function and `.result()`), `official` (the
peer's sampler, in an environment that has it), `floor` (aiohttp and orjson, and nothing else).

Each of `--in-flight` workers samples one completion after another, with logprobs. The floor decodes
the stream as the bytes arrive and keeps text, ids and both kinds of logprobs: the work that no
client can leave out. The loop's longest stall is seen by a task that sleeps 5 ms at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import resource
import sys
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

PROMPT = list(range(100, 228))
Sample = Callable[[], Awaitable[tuple[int, float | None]]]


class Figures:
    """What is measured while the workers run."""

    def __init__(self) -> None:
        self.tokens = 0
        self.first: list[float] = []
        self.stall = 0.0

    def note(self, tokens: int, first: float | None) -> None:
        self.tokens += tokens
        if first is not None:
            self.first.append(first)

    async def watch(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            self.stall = max(self.stall, now - last - 0.005)
            last = now


async def workers(sample: Sample, total: int, in_flight: int, figures: Figures) -> None:
    left = total

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            figures.note(*await sample())

    await asyncio.gather(*(work() for _ in range(min(in_flight, total))))


def controller(args: argparse.Namespace, module: Any) -> Any:
    if args.window == "adaptive":
        return module.AdaptiveConcurrencyController()
    if args.window.startswith("from-"):
        return module.AdaptiveConcurrencyController(initial_window=int(args.window[5:]))
    return module.FixedConcurrencyController(args.in_flight)


@contextlib.asynccontextmanager
async def ours(args: argparse.Namespace, *, portal: bool) -> AsyncIterator[Sample]:
    import fireworks_training as ft

    sampler = ft.DeploymentSampler(
        args.url,
        args.model,
        "key",
        concurrency_controller=controller(args, ft),
        verify_ssl=False,
    )

    async def sample() -> tuple[int, float | None]:
        (one,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=4096, logprobs=True)
        assert one.inference_logprobs is not None
        assert len(one.inference_logprobs) == one.completion_len
        return one.completion_len, one.metrics.client_ttft

    if portal:
        yield sample
        await sampler.aclose()
    else:
        async with sampler:
            yield sample


@contextlib.asynccontextmanager
async def official(args: argparse.Namespace) -> AsyncIterator[Sample]:
    from fireworks.training.sdk import concurrency
    from fireworks.training.sdk.sampling import DeploymentSampler

    sampler = DeploymentSampler(
        args.url, args.model, "key", concurrency_controller=controller(args, concurrency)
    )

    async def sample() -> tuple[int, float | None]:
        (one,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=4096, logprobs=True)
        assert len(one.inference_logprobs) == one.completion_len
        first = sampler.drain_metrics()
        return one.completion_len, first[-1].client_ttft if first else None

    yield sample


@contextlib.asynccontextmanager
async def floor(args: argparse.Namespace) -> AsyncIterator[Sample]:
    import aiohttp
    import orjson

    fields = {
        "model": args.model, "n": 1, "max_tokens": 4096, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "stream": True, "raw_output": True, "perf_metrics_in_response": True,
        "logprobs": True, "prompt": PROMPT,
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "Authorization": "Bearer key"}
    slots = asyncio.Semaphore(args.in_flight)
    connector = aiohttp.TCPConnector(limit=0, ssl=False)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def sample() -> tuple[int, float | None]:
            text: list[str] = []
            raw, sampling, ids = array("d"), array("d"), []
            first, rest, sent = None, b"", time.perf_counter()
            async with (
                slots,
                session.post(
                    f"{args.url}/inference/v1/completions",
                    data=orjson.dumps(fields),
                    headers=headers,
                ) as response,
            ):
                assert response.status == 200
                async for piece in response.content.iter_any():
                    *events, rest = (rest + piece).split(b"\n\n")
                    for event in events:
                        if event == b"data: [DONE]":
                            continue
                        for choice in orjson.loads(event[6:])["choices"]:
                            text.append(choice["text"])
                            if logprobs := choice.get("logprobs"):
                                raw.extend([one["logprob"] for one in logprobs["content"]])
                                sampling.extend(
                                    [one["sampling_logprob"] for one in logprobs["content"]]
                                )
                            if output := choice.get("raw_output"):
                                ids = output["completion_token_ids"]
                    first = first or time.perf_counter() - sent
            assert len(raw) == len(sampling) == len(ids)
            return len("".join(text)) and len(ids), first

        yield sample


def adapter(args: argparse.Namespace) -> contextlib.AbstractAsyncContextManager[Sample]:
    if args.adapter == "floor":
        return floor(args)
    if args.adapter == "official":
        return official(args)
    return ours(args, portal=args.adapter == "ours-portal")


async def measured(args: argparse.Namespace) -> dict[str, float]:
    figures = Figures()
    async with adapter(args) as sample:
        if args.warm_up:
            await workers(sample, args.warm_up, args.in_flight, Figures())
        watcher = asyncio.create_task(figures.watch())
        cpu, start = time.process_time(), time.perf_counter()
        await workers(sample, args.total, args.in_flight, figures)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        watcher.cancel()
    return report(args, figures, wall, cpu)


def measured_sync(args: argparse.Namespace) -> dict[str, float]:
    import fireworks_training as ft

    figures = Figures()
    with ft.DeploymentSampler(
        args.url, args.model, "key", concurrency_controller=controller(args, ft), verify_ssl=False
    ) as sampler:

        def run(total: int) -> list[Any]:
            call = sampler.sample_with_prompt_tokens(
                PROMPT, n=total, max_tokens=4096, logprobs=True
            )
            return call.result()

        if args.warm_up:
            run(args.warm_up)
        cpu, start = time.process_time(), time.perf_counter()
        for one in run(args.total):
            figures.note(one.completion_len, one.metrics.client_ttft)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return report(args, figures, wall, cpu)


def report(args: argparse.Namespace, figures: Figures, wall: float, cpu: float) -> dict[str, float]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    first = sorted(figures.first) or [float("nan")]
    return {
        "wall": wall,
        "rate": args.total / wall,
        "cpu_ms": 1000 * cpu / args.total,
        "peak_mb": peak,
        "stall": figures.stall,
        "first": first[len(first) // 2],
        "tokens": figures.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="A client of benchmarks/sampler.py.")
    kinds = ("ours-async", "ours-portal", "ours-sync", "official", "floor")
    parser.add_argument("adapter", choices=kinds)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--total", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=0)
    parser.add_argument("--window", default="fixed", help="fixed, adaptive, or from-N")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    sync = args.adapter == "ours-sync"
    figures = measured_sync(args) if sync else asyncio.run(measured(args))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
