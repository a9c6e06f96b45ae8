"""What a weight sync costs: bytes and time by stage, the SDK's own part, and what training loses.

    python benchmarks/weight_sync.py sizes                      # 3 minutes: a random model of 100 M
    python benchmarks/weight_sync.py syncs --official PYTHON    # 2 minutes: on the local platform

`sizes` runs the own code of trainer and engine in this process: fp32 masters, AdamW (eps 1e-8),
a fixed seed and batch; a delta after the first step, and one after 20 more ("small": with the
trainer's `extra_values={"delta_compression": "small"}`). `syncs` trains the
shipped model through the platform. The SDK's part of a sync is the wall time of `weight_sync()`
less what trainer and engine say they worked. `--official` names the Python of an environment with
`fireworks-ai`, which saves and loads on the same platform.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform as host
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RATES = (1e-6, 1e-5, 1e-4)
WARM_STEPS = 20
MODEL = "bench"

OFFICIAL = """
import json, sys, time
from fireworks.training import sdk
from fireworks.training.sdk import FiretitanServiceClient
options, rounds = json.loads(sys.argv[1]), int(sys.argv[2])
made = FiretitanServiceClient.from_firetitan_config(**options)
client = made.create_training_client(base_model=options["base_model"], lora_rank=0)
tokens = list(range(10, 40))
datum = sdk.Datum(
    model_input=sdk.ModelInput.from_ints(tokens[:-1]),
    loss_fn_inputs={
        "target_tokens": sdk.TensorData(data=tokens[1:], dtype="int64", shape=[29]),
        "weights": sdk.TensorData(data=[1.0] * 29, dtype="float32", shape=[29]),
    },
)
seconds = []
for number in range(rounds):
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(sdk.AdamParams(learning_rate=1e-5)).result()
    started = time.perf_counter()
    saved = client.save_weights_for_sampler_ext(f"official-{number}")
    made.hotload_sampler_snapshot(saved.path)
    seconds.append(time.perf_counter() - started)
print("RESULT " + json.dumps(seconds), flush=True)
made.close()
"""


# -- sizes and stages, in this process -------------------------------------------------------------


def random_model(folder: Path) -> Path:
    """A Qwen3 of 100 M parameters with random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=11,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def entropy(old: dict[str, Any], new: dict[str, Any]) -> float:
    """Order-0 entropy of the XOR of all 16-bit values, as a share of 16 bits."""
    import numpy as np
    import torch

    counts = np.zeros(1 << 16)
    for name, before in old.items():
        xor = before.view(torch.int16) ^ new[name].view(torch.int16)
        counts += np.bincount(xor.reshape(-1).numpy().view(np.uint16), minlength=1 << 16)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum() / 16)


class Measured:
    """A model in training and an engine, with the product's own parts."""

    def __init__(self, path: Path, folder: Path) -> None:
        from fireworks_training.local.engine.weights import ServedWeights
        from fireworks_training.local.model.model import load_model
        from fireworks_training.local.model.optimizer import MasterAdamW
        from fireworks_training.local.store.snapshots import SnapshotStore
        from fireworks_training.local.trainer.run.exports import SnapshotExports

        self.store = SnapshotStore(folder)
        self.module = load_model(path)
        self.optimizer = MasterAdamW(dict(self.module.named_parameters()), "bfloat16")
        self.exports = SnapshotExports(self.store, base_model=MODEL, dtype="bfloat16", lora=None)
        self.engine = ServedWeights(path, self.store, MODEL)
        self.last: dict[str, Any] = {}
        self.before: dict[str, Any] = {}

    def step(self, rate: float, batch: Any) -> None:
        import torch

        from fireworks_training.local.model.optimizer import AdamSettings

        logits = self.module(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        )
        gradients = torch.autograd.grad(loss, self.optimizer.parameters)
        self.optimizer.accumulate(gradients, loss_tokens=batch.numel(), sequences=len(batch))
        self.optimizer.step(AdamSettings(learning_rate=rate, eps=1e-8), "none")

    def smaller(self, name: str) -> dict[str, Any]:
        """The last difference once more, with more effort."""
        from fireworks_training.local.store import deltas

        started = time.perf_counter()
        encoded = deltas.encode(self.before, self.last, "small")
        seconds = time.perf_counter() - started
        assert encoded is not None
        whole = sum(2 * tensor.numel() for tensor in self.last.values())
        return {
            "what": name,
            "kind": "delta",
            "share": encoded.bytes / whole,
            "entropy": entropy(self.before, self.last),
            "compress": seconds,
        }

    def save(self, name: str, kind: Any) -> dict[str, Any]:
        """One row: bytes, and seconds of each stage."""
        started = time.perf_counter()
        tensors = self.exports.capture(name, dict(self.optimizer.masters))
        capture = time.perf_counter() - started
        snapshot: Any = self.exports.write(name, tensors, kind).fields["snapshot"]
        started = time.perf_counter()
        prepared = self.engine.prepare(snapshot["identity"])
        middle = time.perf_counter()
        self.engine.swap(prepared)
        ended = time.perf_counter()
        whole = sum(2 * tensor.numel() for tensor in tensors.values())
        old, self.last = self.last, tensors
        self.before = old
        return {
            "what": name,
            "kind": snapshot["kind"],
            "share": snapshot["bytes"] / whole,
            "entropy": entropy(old, tensors) if old else None,
            "capture": capture,
            **snapshot["timings"],
            "load": middle - started,
            "swap": ended - middle,
        }


def sizes(path: Path, label: str) -> None:
    """The table of one model."""
    import torch

    # Both cores for the steps between; what is measured runs on one.
    torch.manual_seed(1)
    vocabulary = 300 if label == "shipped" else 16000
    batch = torch.randint(10, vocabulary, (4, 33))
    rows = []
    for rate in RATES:
        with tempfile.TemporaryDirectory() as folder:
            measured = Measured(path, Path(folder))
            rows.append(measured.save("base", "base"))
            for name, steps in ((f"first-{rate:g}", 1), (f"warm-{rate:g}", WARM_STEPS)):
                torch.set_num_threads(2)
                for _ in range(steps - 1):
                    measured.step(rate, batch)
                if steps > 1:
                    measured.save("between", "base")
                measured.step(rate, batch)
                torch.set_num_threads(1)
                rows.append(measured.save(name, "delta"))
                if rate == 1e-5 and steps > 1:
                    rows.append(measured.smaller(f"{name}, small"))
    parameters = sum(p.numel() for p in measured.module.parameters())
    print(f"\n{label}, {parameters / 1e6:.1f} M parameters; seconds a stage, one thread\n")
    print(
        "| snapshot | kind | of a base | entropy of the XOR | size / entropy | capture | hash "
        "| compress | write | read, apply, verify | swap |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows[:1] + [row for row in rows if row["what"] != "base"]:
        share, bits = row["share"], row["entropy"]
        ratio = f"{share / bits:.2f}" if bits and row["kind"] == "delta" else "-"
        stages = " | ".join(
            f"{row.get(stage, 0.0):.3f}"
            for stage in ("capture", "hash", "compress", "write", "load", "swap")
        )
        known = f"{bits:.2%}" if bits else "-"
        print(f"| {row['what']} | {row['kind']} | {share:.1%} | {known} | {ratio} | {stages} |")


# -- syncs, on the platform ------------------------------------------------------------------------


def start_platform(folder: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """The local platform, as its ready line describes it."""
    command = [sys.executable, "-m", "fireworks_training.cli", "serve", "--json", "--until-eof"]
    process = subprocess.Popen(
        [*command, "--state-dir", folder],
        stdin=subprocess.PIPE,  # closed with this process, whatever ends it
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=HERE.parent,
        env={**os.environ, "FIREWORKS_API_KEY": f"fw_{secrets.token_hex(16)}"},
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def options(served: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A service on the platform."""
    return {
        "base_url": served["base_url"],
        "api_key": served["api_key"],
        "base_model": served["model"],
        "training_shape_id": served["training_shape"],
        "cleanup_trainer_on_close": True,
        "cleanup_deployment_on_close": "delete",
        **more,
    }


def spread(values: list[float]) -> str:
    """Median and p95, in milliseconds."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return f"{1e3 * statistics.median(ordered):.0f} | {1e3 * p95:.0f}"


async def step(client: Any, rate: float, data: Any) -> None:
    """One training step."""
    import tinker

    await client.forward_backward(data, "cross_entropy")
    await client.optim_step(tinker.AdamParams(learning_rate=rate, eps=1e-8))


def some_data(count: int = 32, length: int = 64) -> Any:
    """Datums of random tokens."""
    import numpy as np

    from fireworks_training import supervised_datum

    tokens = np.random.default_rng(0).integers(10, 200, (count, length + 1))
    return [supervised_datum(row.tolist(), [1.0] * len(row)) for row in tokens]


async def overheads(served: dict[str, Any], rounds: int, **more: Any) -> dict[str, list[float]]:
    """Walls, the platform's own work, and the rest, of syncs one after another."""
    from fireworks_training import AsyncFiretitanServiceClient

    found: dict[str, list[float]] = {"wall": [], "platform": [], "sdk": [], "bytes": []}
    service = AsyncFiretitanServiceClient.from_firetitan_config(**options(served, **more))
    async with service:
        client = await service.create_training_client()
        data = some_data(2, 16)
        await client.weight_sync()
        for _ in range(rounds):
            await step(client, 1e-5, data)
            started = time.perf_counter()
            result = await client.weight_sync()
            wall = time.perf_counter() - started
            weights = await service._deployment.weights()
            (replica,) = await weights.replicas()
            work = sum((result.snapshot.timings or {}).values())
            work += sum((replica.timings or {}).values())
            found["wall"].append(wall)
            found["platform"].append(work)
            found["sdk"].append(wall - work)
            found["bytes"].append(float(result.snapshot.bytes or 0))
    return found


async def throughput(served: dict[str, Any], rounds: int, steps: int) -> tuple[float, float]:
    """Steps a second without a sync and with one each step, the sampler idle; taking turns."""
    from fireworks_training import AsyncFiretitanServiceClient

    service = AsyncFiretitanServiceClient.from_firetitan_config(**options(served))
    async with service:
        client = await service.create_training_client()
        data = some_data()
        await client.weight_sync()
        await step(client, 1e-5, data)

        async def alone() -> None:
            await step(client, 1e-5, data)

        async def syncing() -> None:
            await step(client, 1e-5, data)
            pending.append(client.weight_sync())

        async def timed(one: Callable[[], Awaitable[None]]) -> float:
            started = time.perf_counter()
            for _ in range(steps):
                await one()
            seconds = time.perf_counter() - started
            for sync in pending:
                await sync
            pending.clear()
            return steps / seconds

        pending: list[Any] = []
        without, with_ = list[float](), list[float]()
        for _ in range(rounds):
            without.append(await timed(alone))
            with_.append(await timed(syncing))
        return statistics.median(without), statistics.median(with_)


async def gaps(served: dict[str, Any], transition: str, streams: int) -> dict[str, Any]:
    """64 streams in flight during a sync: the longest silence, and how many came to their end."""
    from fireworks_training import AsyncFiretitanServiceClient, FixedConcurrencyController

    service = AsyncFiretitanServiceClient.from_firetitan_config(
        **options(served, hot_load_transition_type=transition)
    )
    async with service:
        client = await service.create_training_client()
        await client.weight_sync()
        sampler = await service.create_deployment_sampler(
            concurrency_controller=FixedConcurrencyController(streams)
        )
        silences: list[tuple[float, float]] = []

        async def one() -> Any:
            last = None
            stream = sampler.stream([10, 11, 12], max_tokens=600, ignore_eos=True, logprobs=True)
            async for _ in stream:
                now = time.perf_counter()
                if last is not None:
                    silences.append((last, now))
                last = now
            return stream.completion

        running = [asyncio.create_task(one()) for _ in range(streams)]
        while len(silences) < 4 * streams:  # noqa: ASYNC110 - they are all well under way
            await asyncio.sleep(0.01)
        silences.clear()
        started = time.perf_counter()
        await step(client, 1e-5, some_data(2, 16))
        before = max((end - begin for begin, end in silences), default=0.0)
        synced_at = time.perf_counter()
        await client.weight_sync()
        live = time.perf_counter()
        done = await asyncio.gather(*running)
        during = [e - b for b, e in silences if e > synced_at and b < live]
        return {
            "ended": sum(c.completion_len == 600 for c in done),
            "switched": sum(c.snapshot_switch_index is not None for c in done),
            "before": before,
            "during": max(during),
            "sync": live - synced_at,
            "step": synced_at - started,
        }


def official(served: dict[str, Any], python: str, rounds: int) -> list[float]:
    """Seconds from the save to the end of the hot load, with the official SDK."""
    more = options(served, trainer_job_id="t-official", deployment_id="d-official")
    told = subprocess.run(
        [python, "-c", OFFICIAL, json.dumps(more), str(rounds)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    for line in told.stdout.splitlines():
        if line.startswith("RESULT "):
            seconds: list[float] = json.loads(line.removeprefix("RESULT "))
            return seconds
    raise SystemExit(f"the official SDK failed:\n{told.stderr[-2000:]}")


def syncs(python: str | None, rounds: int, *, only_gaps: bool) -> None:
    """The tables of the platform."""
    with tempfile.TemporaryDirectory() as folder:
        process, served = start_platform(folder)
        try:
            if not only_gaps:
                costs(served, python, rounds)
            for transition in ("ASYNC", "SYNC"):
                told = asyncio.run(gaps(served, transition, 64))
                print(
                    f"{transition}: of 64 streams in flight {told['ended']} came to their end, "
                    f"{told['switched']} with both snapshots; the longest silence of one was "
                    f"{1e3 * told['during']:.0f} ms during the sync of {1e3 * told['sync']:.0f} ms,"
                    f" {1e3 * told['before']:.0f} ms before it."
                )
        finally:
            process.terminate()
            process.wait(20)


def costs(served: dict[str, Any], python: str | None, rounds: int) -> None:
    """The table of syncs, and what training loses to them."""
    rows = {
        "delta, 1e-5": asyncio.run(overheads(served, rounds)),
        "LoRA, rank 8": asyncio.run(overheads(served, rounds, lora_rank=8)),
    }
    print("\nSyncs of the shipped model, milliseconds, median and p95\n")
    print("| | KB | wall | p95 | platform | p95 | SDK and HTTP | p95 |")
    print("|---|---|---|---|---|---|---|---|")
    for label, found in rows.items():
        size = statistics.median(found["bytes"]) / 1e3
        cells = " | ".join(spread(found[key]) for key in ("wall", "platform", "sdk"))
        print(f"| {label} | {size:.0f} | {cells} |")
    if python is not None:
        print(f"| official SDK | | {spread(official(served, python, 3))} | | | | |")
    without, with_ = asyncio.run(throughput(served, 5, 12))
    print(
        f"\nTraining, sampler idle: {without:.2f} steps/s without, {with_:.2f} with a sync"
        f" each step ({with_ / without:.0%})."
    )


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("sizes", "syncs"))
    parser.add_argument("--official", help="Python of an environment with fireworks-ai")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=("gaps",), help="a part of syncs")
    asked = parser.parse_args()
    print(f"{host.machine()}, {os.cpu_count()} cores, Python {host.python_version()}")
    if asked.what == "syncs":
        syncs(asked.official, asked.rounds, only_gaps=asked.only == "gaps")
        return
    import torch

    print(f"torch {torch.__version__}")
    shipped = HERE.parent / "fireworks_training" / "local" / "assets" / "tiny-qwen3"
    sizes(shipped, "shipped")
    with tempfile.TemporaryDirectory() as folder:
        sizes(random_model(Path(folder)), "random")


if __name__ == "__main__":
    main()
