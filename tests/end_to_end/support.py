"""What the end-to-end tests share: a service on the session's platform, data, and saved states."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import tinker
import torch
from safetensors.torch import load_file

from fireworks_training import AsyncFiretitanServiceClient, supervised_datum
from tests.conftest import RunningPlatform

ADAM = tinker.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def service_on(platform: RunningPlatform, **options: Any) -> AsyncFiretitanServiceClient:
    """An async service; without a deployment unless asked for."""
    options.setdefault("create_deployment", False)
    options.setdefault("cleanup_trainer_on_close", True)
    options.setdefault("cleanup_deployment_on_close", "delete")
    options.setdefault("base_url", platform.base_url)
    if platform.as_cloud:
        # No cloud serves tokenizers: its name is a user's to give.
        options.setdefault("tokenizer_model", platform.tokenizer)
    return AsyncFiretitanServiceClient.from_firetitan_config(
        api_key=platform.api_key,
        base_model=platform.model,
        training_shape_id=platform.training_shape,
        **options,
    )


def told(platform: RunningPlatform, identity: str) -> str | None:
    """What a completion says of the snapshot that sampled it: an extension, and None without."""
    return None if platform.as_cloud else identity


def datums(count: int, *, seed: int = 0, length: int = 12, spread: int = 5) -> list[tinker.Datum]:
    """Random datums, of `spread` different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made: list[tinker.Datum] = []
    for index in range(count):
        size = length + index % spread
        tokens = torch.randint(10, 200, (size,), generator=generator).tolist()
        made.append(supervised_datum(tokens, [0.0, *([1.0] * (size - 1))]))
    return made


def curved_loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that is not linear in the logprobs."""
    values = torch.cat(logprobs)
    loss = ((values.exp() - 0.5) ** 2).sum() - 0.1 * values.sum()
    return loss, {"loss": float(loss.detach())}


def saved_state(platform: RunningPlatform, job: str, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a saved state: `master.`, `exp_avg.` and `exp_avg_sq.` by parameter."""
    folder = platform.state_dir / "jobs" / job / "states" / name
    info = json.loads((folder / "state.json").read_text())
    return load_file(folder / info["tensors_file"])


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one kind, by parameter."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}


def relative(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor, by norm."""
    assert got.keys() == wanted.keys()
    return max(
        float((got[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12))
        for name in wanted
    )


def model_folder() -> Path:
    """The shipped model."""
    import fireworks_training

    return Path(fireworks_training.__file__).parent / "local" / "assets" / "tiny-qwen3"


def worker_pid(platform: RunningPlatform, job: str) -> int:
    """The process that serves a job's socket, asked of the platform's own records."""
    database = sqlite3.connect(platform.state_dir / "state.db")
    try:
        ((pid,),) = database.execute("SELECT pid FROM workers WHERE owner = ?", (job,)).fetchall()
    finally:
        database.close()
    return int(pid)
