"""Rows made by hand, for tests of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import tinker
import torch
from torch import Tensor


def row(length: int, **arrays: Sequence[float]) -> tinker.Datum:
    """A datum of a length with the arrays given; `weights` is 1 everywhere unless given or None."""
    inputs: dict[str, Any] = {"weights": [1.0] * length, **arrays}
    tensors = {
        name: tinker.TensorData.from_numpy(np.asarray(values, np.float32))
        for name, values in inputs.items()
        if values is not None
    }
    tensors["target_tokens"] = tinker.TensorData.from_numpy(np.arange(length))
    tokens = tinker.ModelInput.from_ints([1] * length)
    return tinker.Datum(model_input=tokens, loss_fn_inputs=cast(Any, tensors))


def leaf(*values: float, kind: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=kind, requires_grad=True)


def random_batch(seed: int, count: int = 12) -> tuple[list[tinker.Datum], list[Tensor]]:
    """Rows of mixed lengths with a prompt, every array, and their logprobs in float64."""
    draw = np.random.default_rng(seed)
    data, leaves = [], []
    for _ in range(count):
        length = int(draw.integers(2, 40))
        prompt = int(draw.integers(0, length))
        mask = (np.arange(length) >= prompt) & (draw.random(length) > 0.2)
        mask[-1] = True
        logprobs = -draw.exponential(1.0, length)
        near = {
            name: np.minimum(logprobs + 0.3 * draw.standard_normal(length), 0.0)
            for name in ("logprobs", "old_logprobs", "ref_logprobs", "teacher_logprobs")
        }
        advantages = np.full(length, draw.standard_normal())
        data.append(row(length, weights=mask, advantages=advantages * mask, **near))
        leaves.append(torch.tensor(logprobs, requires_grad=True))
    return data, leaves
