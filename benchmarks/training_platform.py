"""A step through the local platform beside bare torch, and a custom loss beside a built-in one.

    python benchmarks/training_platform.py [--datums 64] [--tokens 128] [--rounds 9]

All parameters of the shipped model, one torch thread, random tokens, so that nothing is shared.
A step is forward_backward and optim_step, over HTTP, from the call to the result; the bare loop is
the same mathematics in this process: one padded batch, cross entropy, AdamW. The custom loss is the
same cross entropy, written by the caller. The sides take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tinker
import torch
from transformers import AutoModelForCausalLM

import fireworks_training
from fireworks_training import FiretitanServiceClient

MODEL = Path(fireworks_training.__file__).parent / "local" / "assets" / "tiny-qwen3"
ADAM = tinker.AdamParams(learning_rate=1e-6)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--datums", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    ids = generator.integers(10, 200, (options.datums, options.tokens + 1))
    service = FiretitanServiceClient.from_firetitan_config(
        base_url="local",
        base_model="accounts/local/models/tiny-qwen3",
        create_deployment=False,
    )
    with service:
        client = service.create_training_client()
        sides = {"bare torch": bare(ids), **platform(client, ids)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(options.rounds + 2):
            for name, side in sides.items():
                begin = time.perf_counter()
                side()
                if round_ >= 2:
                    times[name].append(time.perf_counter() - begin)
    show(times, options)


def platform(client: Any, ids: np.ndarray[Any, Any]) -> dict[str, Callable[[], object]]:
    """The two sides over HTTP."""
    weights = np.ones(ids.shape[1] - 1, np.float32)
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:], "weights": weights},
        )
        for row in ids
    ]

    def loss(_: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.stack([values.sum() for values in logprobs]).sum(), {}

    def built_in() -> None:
        futures = client.forward_backward(data, "cross_entropy"), client.optim_step(ADAM)
        for future in futures:
            future.result()

    def custom() -> None:
        futures = client.forward_backward_custom(data, loss), client.optim_step(ADAM)
        for future in futures:
            future.result()

    return {"platform": built_in, "platform, custom loss": custom}


def bare(ids: np.ndarray[Any, Any]) -> Callable[[], object]:
    """The loop that a person would write."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), eps=1e-12)
    batch = torch.from_numpy(ids)

    def step() -> None:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        targets = batch[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        loss.backward()
        adam.step()
        adam.zero_grad()

    return step


def show(times: dict[str, list[float]], options: argparse.Namespace) -> None:
    """The table."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{os.cpu_count()} cores, torch {torch.__version__}, {options.datums} x {options.tokens} "
        f"tokens; milliseconds of a step, median (min to max) of {options.rounds}.\n"
    )
    print("| side | step | over |\n|---|---|---|")
    over = {"platform": "bare torch", "platform, custom loss": "platform"}
    for name, values in times.items():
        reference = over.get(name)
        ratio = f"{middle[name] / middle[reference]:.2f}x {reference}" if reference else ""
        spread = f"({min(values) * 1e3:.0f} to {max(values) * 1e3:.0f})"
        print(f"| {name} | {middle[name] * 1e3:.0f} {spread} | {ratio} |")


if __name__ == "__main__":
    main()
