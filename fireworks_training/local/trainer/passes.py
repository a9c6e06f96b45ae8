"""One forward or forward-backward pass over many datums, in micro-batches.

Knows: the loss, its sum over micro-batches, what is refused. Does not know how micro-batches are
chosen (`packing`) or computed (`network`), optimizers, steps or where results go.

Legend: M tokens of a micro-batch's datums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fireworks_training.local.losses import LOSSES
from fireworks_training.local.trainer.network import Network, datums_of
from fireworks_training.local.trainer.operations import Datum, OperationFailed, Pass
from fireworks_training.local.trainer.packing import plan


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


def _concatenated(data: Sequence[Datum]) -> dict[str, Tensor]:
    """Every input of the loss but the targets, end to end."""
    return {
        name: torch.from_numpy(np.concatenate([datum.inputs[name] for datum in data]))
        for name in data[0].inputs
        if name != "target_tokens"
    }


def run_pass(network: Network, parameters: Sequence[nn.Parameter], request: Pass) -> Passed:
    """Computes logprobs and loss, and the loss's gradient if `request.backward`.

    Nothing outside is changed: the parameters' `.grad` is None before and after.

    Raises:
        OperationFailed: a logprob, the loss or the gradient is not finite.
    """
    logprobs: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(request.data)
    loss_sum, loss_tokens = 0.0, 0
    try:
        tokens = [datum.tokens for datum in request.data]
        for batch in plan(tokens, network.token_budget, sharing=network.sharing):
            indices = datums_of(batch)
            data = [request.data[index] for index in indices]
            inputs = _concatenated(data)
            targets = [cast("NDArray[np.int64]", datum.inputs["target_tokens"]) for datum in data]
            with torch.set_grad_enabled(request.backward):
                logprobs_M = network.target_logprobs(batch, targets)
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
