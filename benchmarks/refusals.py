"""How a sampler lives with a server that refuses: 429 beyond so many at once, queue times reported.

    python benchmarks/refusals.py [--official PYTHON] [--rounds 3]

`--official` names the Python of an environment with `fireworks-ai[training]`; without it the peer
is left out. The server serves 16 requests at once, for half a second each, reports the (short)
queue time of what it serves, and answers 429 to the rest. Each side samples 1,000 completions with
its default adaptive controller; the sides take turns. What counts: all complete, and how many
requests were refused on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import Any

SLOTS, SERVICE, TOTAL = 16, 0.5, 1000
MODEL = "accounts/a/deployments/d"


async def serve() -> tuple[str, list[int]]:
    """Start the server on this loop; returns its URL, and a list that grows with each refusal."""
    from aiohttp import web

    busy, refused = 0, list[int]()

    async def complete(request: web.Request) -> web.StreamResponse:
        nonlocal busy
        if busy >= SLOTS:
            refused.append(busy)
            return web.json_response({"error": {"message": "overloaded"}}, status=429)
        busy += 1
        try:
            body = await request.json()
            await asyncio.sleep(SERVICE)
            raw = {"prompt_token_ids": body["prompt"], "completion_token_ids": [7]}
            last = {"index": 0, "text": "hi", "finish_reason": "stop", "raw_output": raw}
            event = f"data: {json.dumps({'id': 'x', 'choices': [last]})}\n\n"
            return web.Response(
                body=event + "data: [DONE]\n\n",
                headers={
                    "Content-Type": "text/event-stream",
                    "fireworks-prefill-queue-duration": "0.001",
                },
            )
        finally:
            busy -= 1

    app = web.Application()
    app.router.add_post("/inference/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}", refused


def sampler_of(side: str, url: str) -> Any:
    """Make a sampler of one side, with its own adaptive controller as it comes."""
    if side == "ours":
        from fireworks_training import DeploymentSampler

        return DeploymentSampler(url, MODEL, "k")
    from fireworks.training.sdk import DeploymentSampler as Official
    from fireworks.training.sdk.concurrency import AdaptiveConcurrencyController

    return Official(
        inference_url=url,
        model=MODEL,
        api_key="fw_k",
        tokenizer=None,
        concurrency_controller=AdaptiveConcurrencyController(),
    )


async def sample(side: str, url: str) -> None:
    """Sample all completions, and print how they ended and how long it took."""
    sampler, began = sampler_of(side, url), time.monotonic()

    async def one() -> str:
        try:
            await sampler.sample_with_prompt_tokens([1, 2], n=1, max_tokens=1)
        except Exception as error:
            return type(error).__name__
        return "ok"

    ends = Counter(await asyncio.gather(*(one() for _ in range(TOTAL))))
    print(ends["ok"], TOTAL - ends["ok"], time.monotonic() - began)


async def measure(sides: dict[str, str], rounds: int) -> None:
    """Let the sides take turns, and print the medians."""
    figures: dict[str, list[tuple[float, float, int]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, python in sides.items():
            url, refused = await serve()
            client = await asyncio.create_subprocess_exec(
                *(python, __file__, "--side", side, "--url", url),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a line for each refusal
            )
            out, _ = await client.communicate()
            ok, failed, seconds = out.split()[-3:]
            figures[side].append((int(failed), float(seconds), len(refused)))
            print(f"{side}: {int(ok)} ok, {int(failed)} failed, {len(refused)} refused, "
                  f"{float(seconds):.1f} s")  # fmt: skip
    for side, runs in figures.items():
        failed, seconds, refusals = map(statistics.median, zip(*runs, strict=True))
        print(f"| {side} | {failed:.0f} failed | {refusals:.0f} refused | {seconds:.0f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        asyncio.run(sample(options.side, options.url))
        return
    sides = {"ours": sys.executable}
    if options.official:
        sides["official"] = options.official
    asyncio.run(measure(sides, options.rounds))


if __name__ == "__main__":
    main()
