"""One forward or forward-backward pass over many datums, in padded micro-batches.

Knows: batching, padding, the sum over micro-batches. Does not know optimizers, steps or where
results go.

Legend: B datums of a micro-batch, T its longest, V vocabulary, M real tokens of the micro-batch.

Datums are padded on the right: attention is causal, so a real position never looks at padding, and
padded rows of logits are dropped before the loss. The plan depends on lengths alone, so the same
operation is computed in the same order every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fireworks_training.local.losses import LOSSES, target_logprobs
from fireworks_training.local.trainer.operations import Datum, OperationFailed, Pass

LOGITS_BYTES = 64 << 20
"""Budget of one micro-batch's logits in fp32; a longer datum gets a micro-batch of its own."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass gave.

    Attributes:
        logprobs: T float32 entries for each datum, in the order of the data.
        loss: the sum over all tokens.
        loss_tokens: tokens whose weight is not zero.
        gradients: one for each parameter, or None for a forward pass.
    """

    logprobs: list[NDArray[np.float32]]
    loss: float
    loss_tokens: int
    gradients: list[Tensor] | None


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the datums of each micro-batch: longest first, at most `budget` padded tokens."""
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = lengths[index]
        batches[-1].append(index)
    return batches


def _concatenated(data: Sequence[Datum]) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {
        name: torch.from_numpy(np.concatenate([datum.inputs[name] for datum in data]))
        for name in data[0].inputs
    }
    return inputs.pop("target_tokens"), inputs


def _real_logits(module: nn.Module, data: Sequence[Datum]) -> Tensor:
    width = len(data[0].tokens)
    ids_BT = torch.zeros((len(data), width), dtype=torch.int64)
    real_BT = torch.zeros((len(data), width), dtype=torch.bool)
    for row, datum in enumerate(data):
        ids_BT[row, : len(datum.tokens)] = torch.from_numpy(datum.tokens)
        real_BT[row, : len(datum.tokens)] = True
    logits_BTV: Tensor = module(input_ids=ids_BT, use_cache=False).logits
    if bool(real_BT.all()):
        return logits_BTV.flatten(0, 1)
    return logits_BTV[real_BT]


def _micro_batches(
    data: Sequence[Datum], vocab_size: int
) -> Iterator[tuple[list[int], list[Datum]]]:
    budget = max(LOGITS_BYTES // (4 * vocab_size), 1)
    for indices in plan([len(datum.tokens) for datum in data], budget):
        yield indices, [data[index] for index in indices]


def run_pass(
    module: nn.Module, parameters: Sequence[nn.Parameter], request: Pass, vocab_size: int
) -> Passed:
    """Computes logprobs and loss, and the loss's gradient if `request.backward`.

    Nothing outside is changed: the parameters' `.grad` is None before and after.

    Raises:
        OperationFailed: a logprob, the loss or the gradient is not finite.
    """
    logprobs: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(request.data)
    loss_sum, loss_tokens = 0.0, 0
    try:
        for indices, data in _micro_batches(request.data, vocab_size):
            with torch.set_grad_enabled(request.backward):
                targets_M, inputs = _concatenated(data)
                logprobs_M = target_logprobs(_real_logits(module, data), targets_M)
                loss_M = LOSSES[request.loss].per_token(logprobs_M, inputs, request.config)
                loss = loss_M.sum()
            _check_finite(logprobs_M, loss, indices)
            if request.backward:
                torch.autograd.backward(loss, inputs=list(parameters))
            loss_sum += float(loss_M.detach().double().sum())
            loss_tokens += int(torch.count_nonzero(inputs["weights"]))
            flat: NDArray[np.float32] = logprobs_M.detach().numpy()
            ends = np.cumsum([len(datum.tokens) for datum in data])[:-1]
            for index, piece in zip(indices, np.split(flat, ends), strict=True):
                logprobs[index] = piece
        gradients = _take_gradients(parameters) if request.backward else None
    finally:
        for parameter in parameters:
            parameter.grad = None
    return Passed(logprobs, loss_sum, loss_tokens, gradients)


def _take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [
        torch.zeros_like(p) if p.grad is None else p.grad  # one that the pass did not touch
        for p in parameters
    ]


def _check_finite(logprobs_M: Tensor, loss: Tensor, indices: Sequence[int]) -> None:
    if not torch.isfinite(logprobs_M).all():
        raise OperationFailed(
            "the model's logprobs are not finite: its weights have become infinite or NaN. Load a"
            " saved state, and lower the learning rate or clip the gradient",
            error_class="NonFinite",
        )
    if not torch.isfinite(loss):
        raise OperationFailed(
            f"the loss is not finite (in datums {sorted(indices)[:8]}): look for logprobs or"
            " advantages that are far out of range",
            error_class="NonFinite",
        )


def metrics_of(passed: Passed, data: Sequence[Datum]) -> Mapping[str, float]:
    """Metrics of a pass; what follows the colon says how chunks of one call are combined."""
    return {
        "loss:sum": passed.loss,
        "num_loss_tokens:sum": float(passed.loss_tokens),
        "num_tokens:sum": float(sum(len(datum.tokens) for datum in data)),
    }
