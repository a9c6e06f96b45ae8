"""Runs an implementation on rows: as a training client would call it, and differentiates it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fireworks_training.losses.conformance.cases import Row
from fireworks_training.losses.conformance.objectives import Exact, Objective

if TYPE_CHECKING:
    import tinker
    import torch

Implementation = Callable[
    [Sequence["tinker.Datum"], "list[torch.Tensor]"], "tuple[torch.Tensor, Mapping[str, float]]"
]

FIELDS = {
    "logprobs": "sampled",
    "old_logprobs": "old",
    "ref_logprobs": "reference",
    "teacher_logprobs": "teacher",
    "advantages": "advantages",
    "kept_mass": "kept",
}
"""The arrays of a datum, and where a row has them."""


class Misuse(Exception):
    """What an implementation returned is no loss."""


def datum(row: Row, arrays: Sequence[str]) -> tinker.Datum:
    """The row as a datum, with its mask as `weights`."""
    import numpy as np
    import tinker

    inputs: dict[str, Any] = {name: getattr(row, FIELDS[name]) for name in arrays}
    inputs["weights"] = row.mask
    tensors = {
        name: tinker.TensorData.from_numpy(np.asarray(values, np.float32))
        for name, values in inputs.items()
    }
    tensors["target_tokens"] = tinker.TensorData.from_numpy(np.asarray(row.tokens, np.int64))
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([0, *row.tokens[:-1]]),
        loss_fn_inputs=cast(Any, tensors),
    )


def run(
    loss: Implementation, objective: Objective, rows: Sequence[Row], *, single: bool = False
) -> Exact:
    """Call the implementation on rows, and take its gradient by every logprob.

    Args:
        single: with logprobs in float32, as a training client has them; else float64.

    Raises:
        Misuse: what came back is no pair of a scalar tensor and metrics.
    """
    import torch

    kind = torch.float32 if single else torch.float64
    leaves = [torch.tensor(row.logprobs, dtype=kind, requires_grad=True) for row in rows]
    value = _scalar(loss([datum(row, objective.arrays) for row in rows], leaves))
    if not value.requires_grad:
        return float(value), [[0.0] * len(row.mask) for row in rows]
    found: Sequence[torch.Tensor | None] = torch.autograd.grad(
        value.reshape(()), leaves, allow_unused=True
    )
    gradients = [
        [0.0] * len(row.mask) if gradient is None else gradient.tolist()
        for row, gradient in zip(rows, found, strict=True)
    ]
    return float(value.detach()), gradients


def _scalar(returned: object) -> torch.Tensor:
    """The loss of what an implementation returned."""
    import torch

    if not isinstance(returned, tuple) or len(returned) != 2:
        raise Misuse(f"it returned {type(returned).__name__}, not (loss, metrics)")
    value: object = returned[0]
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise Misuse("its loss is no scalar tensor")
    return value


def distance(found: list[list[float]], right: list[list[float]]) -> float:
    """The largest difference, relative to the largest right entry; infinite for one not finite."""
    pairs = [
        (x, y)
        for row, other in zip(found, right, strict=True)
        for x, y in zip(row, other, strict=True)
    ]
    if not all(math.isfinite(x) for x, _ in pairs):
        return math.inf
    scale = max((abs(y) for _, y in pairs), default=0.0)
    apart = max((abs(x - y) for x, y in pairs), default=0.0)
    return apart / scale if scale else (0.0 if apart < 1e-12 else math.inf)


def apart(found: float, right: float, scale: float) -> float:
    """The difference of two values, relative to the larger of the right one and a scale."""
    size = max(abs(right), scale)
    if not math.isfinite(found):
        return math.inf
    return abs(found - right) / size if size else abs(found)
