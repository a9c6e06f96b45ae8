"""The local engine against `transformers`: tokens a second, over HTTP and in process.

    python benchmarks/engine.py [--only NAME ...] [--rounds 5] [--write]

Sections: `decided` (what `transformers` offers, in process, one thread each), `streams` (1 to 256
streams over HTTP with logprobs, and `generate` on one static batch of 64 in this process), `mixed`
(256 requests of 8 to 256 tokens over 64 slots), `sharing` (16 samples of a 512-token prompt against
16 prompts of 512 tokens), `queue` (reported queue time against what a client sees), `window` (the
adaptive controller against fixed windows), `large` (a random model of 100 M parameters). The sides
of a section take turns. Only tokens that were asked for count. `generate` samples
(`do_sample=True, output_logits=True`) with as many torch threads as it likes best here, both cores;
the engine has one. `--write` puts each section's table into README.md, with its number of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from serving import MODEL, Served, served

import fireworks_training
from fireworks_training import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    FixedConcurrencyController,
)
from fireworks_training.local.engine.batch import RunningBatch
from fireworks_training.local.engine.decoder import Decoder
from fireworks_training.local.engine.requests import StreamRequest
from fireworks_training.local.model.model import load_model

FOLDER = Path(fireworks_training.__file__).parent / "local" / "assets" / "tiny-qwen3"
PROMPT, COMPLETION = 48, 64
Side = Callable[[int], Awaitable[int]]


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random prompts: none is in a cache."""
    return np.random.default_rng(seed).integers(4, 328, (count, length)).tolist()


async def rates(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each side, sides taking turns; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            tokens = await side(1000 + number)
            if number:
                found[name].append(tokens / (time.perf_counter() - began))
    return found


def row(name: str, values: list[float], of: list[float] | None = None) -> str:
    """One line of a table: median, spread, and the ratio to another side."""
    ratio = "" if of is None else f"{statistics.median(values) / statistics.median(of):.2f}x"
    spread = f"{min(values):,.0f} to {max(values):,.0f}"
    return f"| {name} | {statistics.median(values):,.0f} | {spread} | {ratio} |"


HEAD = "| side | tokens/s | min to max | over generate |\n|---|---|---|---|"


class InProcess:
    """`transformers` and the engine's own batch, on one model in this process."""

    def __init__(self) -> None:
        self.model = load_model(FOLDER)
        self.own = load_model(FOLDER)

    def generate(self, batch: list[list[int]], lengths: list[int], threads: int) -> int:
        """One static batch; what comes after a sequence's own length is not useful."""
        torch.set_num_threads(threads)
        ids = torch.tensor(batch)
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=max(lengths),
                min_new_tokens=max(lengths),
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=1,
            )
        return sum(lengths)

    def continuous(self, batch: list[list[int]], tokens: int) -> int:
        """The continuous batching that `transformers` has."""
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=True, eos_token_id=-1, pad_token_id=1
        )
        found = self.model.generate_batch(
            batch, generation_config=config, progress_bar=False, warmup=False
        )
        return sum(len(output.generated_tokens) for output in found.values())

    def engine(self, batch: list[list[int]], tokens: int, *, fuse: bool) -> int:
        """Our batch without a socket."""
        torch.set_num_threads(1)
        running = RunningBatch(Decoder(self.own, 2048, fuse), len(batch))
        for number, prompt in enumerate(batch):
            running.add(StreamRequest(number, tuple(prompt), tokens, key=number))
        while len(running):
            running.step(512)
        return tokens * len(batch)


async def decided(rounds: int) -> list[str]:
    """What `transformers` offers, one thread each."""
    here = InProcess()

    async def generate(seed: int) -> int:
        return here.generate(prompts(64, PROMPT, seed), [COMPLETION] * 64, 1)

    async def continuous(seed: int) -> int:
        torch.set_num_threads(1)
        return here.continuous(prompts(64, PROMPT, seed), COMPLETION)

    async def modules(seed: int) -> int:
        return here.engine(prompts(64, PROMPT, seed), COMPLETION, fuse=False)

    async def fused(seed: int) -> int:
        return here.engine(prompts(64, PROMPT, seed), COMPLETION, fuse=True)

    sides = {"generate": generate, "generate_batch": continuous}
    sides |= {"engine, the model's modules": modules, "engine, faster body": fused}
    found = await rates(sides, rounds)
    lines = ["64 sequences of 48 + 64 tokens in process, one torch thread:", "", HEAD]
    return lines + [row(name, found[name], found["generate"]) for name in found]


async def streams(rounds: int) -> list[str]:
    """1 to 256 streams over HTTP, and one static batch in process."""
    here = InProcess()
    threads = os.cpu_count() or 1
    async with served() as deployment, deployment.sampler() as sampler:

        def side(count: int) -> Side:
            async def run(seed: int) -> int:
                found = await sampler.sample_with_prompt_tokens(
                    prompts(count, PROMPT, seed),
                    max_tokens=COMPLETION,
                    logprobs=True,
                    ignore_eos=True,
                )
                return sum(completion.completion_len for completion in found)

            return run

        async def generate(seed: int) -> int:
            return here.generate(prompts(64, PROMPT, seed), [COMPLETION] * 64, threads)

        async def single(seed: int) -> int:
            return here.generate(prompts(64, PROMPT, seed), [COMPLETION] * 64, 1)

        sides = {f"{n} streams over HTTP": side(n) for n in (64, 1, 4, 16, 256)}
        sides |= {f"generate, {threads} threads": generate, "generate, 1 thread": single}
        found = await rates(sides, rounds)
    base = found[f"generate, {threads} threads"]
    lines = ["48 + 64 tokens with logprobs; `generate` on one static batch of 64:", "", HEAD]
    return lines + [row(name, values, base) for name, values in found.items()]


async def mixed(rounds: int) -> list[str]:
    """Requests of many lengths: a static batch waits for its longest."""
    here = InProcess()
    threads = os.cpu_count() or 1
    lengths = np.random.default_rng(0).integers(8, 257, 256).tolist()
    slots = FixedConcurrencyController(64)
    async with served() as deployment, deployment.sampler(slots) as sampler:

        async def engine(seed: int) -> int:
            calls = [
                sampler.sample_with_prompt_tokens(
                    [prompt], max_tokens=length, logprobs=True, ignore_eos=True
                )
                for prompt, length in zip(prompts(256, PROMPT, seed), lengths, strict=True)
            ]
            found = await asyncio.gather(*calls)
            return sum(completion.completion_len for (completion,) in found)

        async def generate(seed: int) -> int:
            asked = prompts(256, PROMPT, seed)
            return sum(
                here.generate(asked[at : at + 64], lengths[at : at + 64], threads)
                for at in range(0, 256, 64)
            )

        found = await rates({"engine over HTTP": engine, "generate": generate}, rounds)
    lines = ["256 requests of 8 to 256 tokens, 64 at a time:", "", HEAD]
    return lines + [row(name, values, found["generate"]) for name, values in found.items()]


async def sharing(rounds: int) -> list[str]:
    """Samples of one prompt against as many prompts."""
    lines = ["16 streams with prompts of 512 tokens, over HTTP:", ""]
    lines += ["| completion | one prompt | min to max | 16 prompts | min to max | ratio |"]
    lines += ["|---|---|---|---|---|---|"]
    async with served() as deployment, deployment.sampler() as sampler:
        for tokens in (16, 64):

            def side(count: int, n: int, tokens: int = tokens) -> Side:
                async def run(seed: int) -> int:
                    found = await sampler.sample_with_prompt_tokens(
                        prompts(count, 512, seed + 7777 * n + tokens),
                        n=n,
                        max_tokens=tokens,
                        ignore_eos=True,
                    )
                    return sum(completion.completion_len for completion in found)

                return run

            found = await rates({"shared": side(1, 16), "each": side(16, 1)}, rounds)
            one, each = found["shared"], found["each"]
            ratio = statistics.median(one) / statistics.median(each)
            lines.append(
                f"| {tokens} | {statistics.median(one):,.0f} | {min(one):,.0f} to {max(one):,.0f} "
                f"| {statistics.median(each):,.0f} | {min(each):,.0f} to {max(each):,.0f} "
                f"| {ratio:.1f}x |"
            )
    return lines


@dataclass(frozen=True)
class Probe:
    """What a probe saw, in seconds.

    Attributes:
        queued: the queue as reported.
        other: from sending to the first event, without the prefill as reported.
        way: a request that the gateway answers by itself.
    """

    queued: float
    other: float
    way: float


class Prober:
    """`engine_probe.py` in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(self, seed: int) -> Probe:
        """One probe."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(prompts(1, PROMPT, seed)[0]).encode() + b"\n")
        answer = json.loads(await self._process.stdout.readline())
        metrics = answer["metrics"]
        return Probe(
            metrics["prefill-queue-duration"],
            answer["seen"] - metrics["prefill-duration"],
            answer["way"],
        )


@asynccontextmanager
async def prober(deployment: Served) -> AsyncIterator[Prober]:
    """A prober of the deployment."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("engine_probe.py")),
        deployment.base_url,
        deployment.api_key,
        deployment.resource,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Prober(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


PROBES = 12


async def queue(rounds: int) -> list[str]:
    """Probes beside 256 streams: what the server reports, and what is seen from outside. The truth
    is the time to the first token, less the prefill and what the ways take: those of an idle
    request, and as much more as a request to the gateway alone takes beside the streams."""
    seen: list[Probe] = []
    async with (
        served() as deployment,
        deployment.sampler() as sampler,
        prober(deployment) as probe,
    ):
        idle = []
        for index in range(20):
            idle.append(await probe(500 + index))
            await asyncio.sleep(0.02)
        for number in range(rounds):
            load = [
                asyncio.ensure_future(
                    sampler.sample_with_prompt_tokens(
                        [prompt], max_tokens=60 + index // 2, ignore_eos=True
                    )
                )
                for index, prompt in enumerate(prompts(256, PROMPT, number))
            ]
            await asyncio.sleep(0.7)
            for index in range(PROBES):
                seen.append(await probe(10_000 * (number + 1) + index))
                await asyncio.sleep(0.01 * (index % 4))
            await asyncio.gather(*load)
    alone = statistics.median(p.other - p.queued for p in idle[1:])
    later = statistics.median(p.way for p in seen) - statistics.median(p.way for p in idle[1:])
    waits = [probe.other - alone - later for probe in seen]
    errors = [probe.queued - wait for probe, wait in zip(seen, waits, strict=True)]
    beyond = [
        max(0.0, abs(error) - max(0.1 * wait, 0.005))
        for error, wait in zip(errors, waits, strict=True)
    ]
    low, middle, high = (1000 * f(waits) for f in (min, statistics.median, max))
    worst = 1000 * max(errors, key=abs)
    held, error = sum(b == 0 for b in beyond), 1000 * statistics.median(errors)
    return [
        f"- {len(waits)} probes beside 256 streams queued {low:.0f} to {high:.0f} ms (median",
        f"  {middle:.0f}), as a blocking client in a process of its own sees it. An idle request",
        f"  takes {1000 * alone:.1f} ms on its ways; beside the streams a request that needs no",
        f"  engine takes {1000 * later:.1f} ms more than an idle one, which is no queue either.",
        f"- {held} reported queue times were within 10 % or 5 ms of that; the median error was",
        f"  {error:.1f} ms, at most {worst:.1f} ms, {1000 * max(beyond):.1f} ms over its bound.",
    ]


STEP_REQUESTS, STEPS = 1536, 4


async def window(rounds: int) -> list[str]:
    """The adaptive controller in the first four steps of a loop, its ramp from the first window
    on included, against fixed windows. Completions differ in length, as in a rollout step: with
    equal ones a fixed window runs in lockstep, which is less work for the engine."""
    found: dict[str, list[float]] = {}
    makers: dict[str, Callable[[], object]] = {
        f"fixed {n}": (lambda n=n: FixedConcurrencyController(n)) for n in (64, 128, 256)
    }
    makers["adaptive"] = AdaptiveConcurrencyController
    seeds = itertools.count()  # no prompt twice: the engine would know it
    random = np.random.default_rng(0)

    async def step(sampler: DeploymentSampler, lengths: list[int]) -> float:
        """Seconds of a rollout step."""
        asked = prompts(STEP_REQUESTS, PROMPT, next(seeds))
        began = time.perf_counter()
        calls = [
            sampler.sample_with_prompt_tokens([prompt], max_tokens=length, ignore_eos=True)
            for prompt, length in zip(asked, lengths, strict=True)
        ]
        await asyncio.gather(*calls)
        return time.perf_counter() - began

    async with served() as deployment:
        for number in range(rounds):
            lengths = random.integers(8, 57, STEP_REQUESTS).tolist()
            tokens = sum(lengths)
            for name in sorted(makers, reverse=bool(number % 2)):
                async with deployment.sampler(makers[name]()) as sampler:
                    if name.startswith("fixed"):
                        found.setdefault(name, []).append(tokens / await step(sampler, lengths))
                        continue
                    first, *later = [await step(sampler, lengths) for _ in range(STEPS)]
                    per_second = {
                        "step 1 of 4, from a window of 8": tokens / first,
                        "steps 2 to 4": tokens * len(later) / sum(later),
                        "steps 1 to 4": tokens * STEPS / (first + sum(later)),
                    }
                    for what, rate in per_second.items():
                        found.setdefault(f"adaptive, {what}", []).append(rate)
    best = max((v for k, v in found.items() if k.startswith("fixed")), key=statistics.median)
    lines = [f"{STEP_REQUESTS} requests of 48 + 8 to 56 tokens; ratios to the best fixed window:"]
    lines += ["", "| window | tokens/s | min to max | over the best |", "|---|---|---|---|"]
    return lines + [row(name, found[name], best) for name in sorted(found)]


def random_model(folder: Path) -> None:
    """About 100 M parameters with the shipped model's tokenizer."""
    config = transformers.Qwen3Config(
        vocab_size=32_000,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((FOLDER / name).read_bytes())


async def large(rounds: int) -> list[str]:
    """A random model of 100 M parameters: 64 streams of 32 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        numbers = sum(p.numel() for p in load_model(Path(folder)).parameters())
        option = ("--model", f"large={folder}")
        name = "accounts/local/models/large"
        async with served(*option, model=name) as deployment, deployment.sampler() as sampler:

            async def engine(seed: int) -> int:
                done = await sampler.sample_with_prompt_tokens(
                    prompts(64, PROMPT, seed), max_tokens=32, logprobs=True, ignore_eos=True
                )
                return sum(completion.completion_len for completion in done)

            found = await rates({"engine": engine}, min(rounds, 2))
    rate = statistics.median(found["engine"])
    size = f"A random Qwen3 of {numbers / 1e6:.0f} M parameters"
    what = "64 streams of 48 + 32 tokens with logprobs over HTTP"
    return [f"{size}, {what}: {rate:,.0f} tokens/s ({2048 / rate:.1f} s)."]


SECTIONS = (decided, streams, mixed, sharing, queue, window, large)


def write(section: str, rounds: int, lines: list[str]) -> None:
    """Puts a section's lines into README.md, between its marks."""
    path = Path(__file__).with_name("README.md")
    text = path.read_text()
    begin, end = f"<!-- engine {section} -->\n", f"<!-- /engine {section} -->\n"
    head, mark, rest = text.partition(begin)
    _, closing, tail = rest.partition(end)
    if not mark or not closing:
        raise ValueError(f"README.md has no marks of section {section}")
    table = "\n".join([f"*{section}*, {rounds} rounds.", "", *lines])
    path.write_text(f"{head}{begin}{table}\n{end}{tail}")


def main() -> None:
    """Runs the sections and prints them as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", choices=[part.__name__ for part in SECTIONS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="the tables into README.md")
    options = parser.parse_args()
    cores = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"On {cores}; {versions}; {MODEL.rpartition('/')[2]}; medians of {options.rounds}.\n")
    # This process has imported torch and transformers for the sake of one side. What collections of
    # their objects cost (0.1 s each) is no part of what a client of the engine has.
    gc.collect()
    gc.freeze()
    for part in SECTIONS:
        if options.only is None or part.__name__ in options.only:
            lines = asyncio.run(part(options.rounds))
            print("\n".join(lines) + "\n", flush=True)
            if options.write:
                write(part.__name__, options.rounds, lines)


if __name__ == "__main__":
    main()
