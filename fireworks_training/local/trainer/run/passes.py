"""One forward or forward-backward pass over many datums, in micro-batches.

Knows the loss, its sum over micro-batches, and what is not finite. Does not know how micro-batches
are chosen (`packing`) or computed (`network`), optimizers, steps or where results go.

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

from fireworks_training.local.model.devices import array_of, on
from fireworks_training.local.model.losses import LOSSES
from fireworks_training.local.trainer.queue.operations import Backward, Datum, OperationFailed, Pass
from fireworks_training.local.trainer.run.graphs import GraphCache
from fireworks_training.local.trainer.run.network import Network, datums_of
from fireworks_training.local.trainer.run.packing import plan


@dataclass(frozen=True, slots=True)
class ComputedPass:
    """Holds the results of a pass.

    Attributes:
        outputs: for each datum, in the order of the data, `logprobs` float32 in the shape of its
            targets; with top_k also `top_k_logprobs` float32 and `top_k_indices` int64 `[T, k]`.
        loss: the sum over all tokens.
        loss_tokens: tokens that count, those whose weight is not zero.
        gradients: one for each parameter, or None for a forward pass.
    """

    outputs: list[dict[str, NDArray[np.generic]]]
    loss: float
    loss_tokens: int
    gradients: list[Tensor] | None


def _concatenated(data: Sequence[Datum], device: torch.device) -> dict[str, Tensor]:
    """Concatenate the loss's inputs but the targets, with the datum that each belongs to."""
    counts = [len(datum.tokens) * max(datum.width, 1) for datum in data]
    inputs = {
        name: on(device, np.concatenate([datum.inputs[name] for datum in data]))
        for name in data[0].inputs
        if name != "target_tokens"
    }
    return {**inputs, "sequence": on(device, np.repeat(np.arange(len(data)), counts))}


def run_pass(
    network: Network,
    parameters: Sequence[nn.Parameter],
    request: Pass,
    graphs: GraphCache | None = None,
) -> ComputedPass:
    """Compute logprobs and loss, and the loss's gradient if `request.backward`.

    With `graphs`, a forward pass leaves its graph there. Nothing else outside is changed: the
    parameters' `.grad` is None before and after.

    Raises:
        OperationFailed: a logprob, the loss or the gradient is not finite.
    """
    outputs: list[dict[str, NDArray[np.generic]]] = [{} for _ in request.data]
    loss_sum, loss_tokens = 0.0, 0
    try:
        tokens = [datum.tokens for datum in request.data]
        batches = plan(tokens, network.token_budget, sharing=network.sharing)
        for place, batch in enumerate(batches):
            indices = datums_of(batch)
            data = [request.data[index] for index in indices]
            inputs = _concatenated(data, network.device)
            kept = graphs if graphs is not None and graphs.has_room(request) else None
            recording = kept.measured() if kept else torch.set_grad_enabled(request.backward)
            with recording:
                computed = network.compute(batch)
                # A kept graph is for whatever gradients come; else a weight of 0 leaves none.
                counted = None if kept else np.concatenate([d.inputs["weights"] for d in data]) != 0
                logprobs_M = network.logprobs(computed, [_targets(d) for d in data], counted)
                loss_M = LOSSES[request.loss].per_token(logprobs_M, inputs, request.config)
                loss = loss_M.sum()
            _check_finite(logprobs_M, loss_M, indices, inputs["sequence"])
            if kept is not None:
                kept.put(request, place, logprobs_M)
            if request.backward:
                torch.autograd.backward(loss, inputs=list(parameters))
            loss_sum += float(loss_M.detach().double().sum())
            loss_tokens += int(torch.count_nonzero(inputs["weights"]))
            top = network.top(computed, request.top_k) if request.top_k else None
            pieces = _outputs(data, logprobs_M, top)
            for index, piece in zip(indices, pieces, strict=True):
                outputs[index] = piece
        gradients = take_gradients(parameters) if request.backward else None
    finally:
        for parameter in parameters:
            parameter.grad = None
    return ComputedPass(outputs, loss_sum, loss_tokens, gradients)


def run_backward(
    network: Network, parameters: Sequence[nn.Parameter], request: Backward, graphs: GraphCache
) -> tuple[ComputedPass, int]:
    """Compute the gradient of sum(logprobs * gradients).

    It is that of a cross_entropy pass with the weights -gradients. Outputs are empty, since the
    forward gave them.

    Returns:
        The pass, and the number of tokens whose graph was in the cache.

    Raises:
        OperationFailed: a logprob or the gradient is not finite.
    """
    data = request.forward.data
    loss_sum, loss_tokens, cached = 0.0, 0, 0
    try:
        batches = plan([d.tokens for d in data], network.token_budget, sharing=network.sharing)
        for place, batch in enumerate(batches):
            indices = datums_of(batch)
            given_M = np.concatenate([request.gradients[i] for i in indices])
            gradient_M = on(network.device, given_M)
            logprobs_M = graphs.take(request.forward, place)
            if logprobs_M is None:
                with torch.enable_grad():
                    targets = [_targets(data[i]) for i in indices]
                    logprobs_M = network.logprobs(network.compute(batch), targets, given_M != 0)
            else:
                cached += sum(len(data[i].tokens) for i in indices)
            loss_M = logprobs_M.detach().double() * gradient_M
            _check_finite(logprobs_M, loss_M, indices)
            torch.autograd.backward(logprobs_M, gradient_M, inputs=list(parameters))
            loss_sum += float(loss_M.sum())
            loss_tokens += sum(_counted(data[i], request.gradients[i]) for i in indices)
        gradients = take_gradients(parameters)
    finally:
        for parameter in parameters:
            parameter.grad = None
    return ComputedPass([{} for _ in data], loss_sum, loss_tokens, gradients), cached


def _counted(datum: Datum, gradient: NDArray[np.float32]) -> int:
    """Count a datum's tokens as its built-in twin does: by the forward's weights.

    A token whose gradient a loss has clipped to 0 counts; without any weight, gradients tell.
    """
    return int(np.count_nonzero(datum.inputs["weights"]) or np.count_nonzero(gradient))


def _targets(datum: Datum) -> NDArray[np.int64]:
    ids = cast("NDArray[np.int64]", datum.inputs["target_tokens"])
    return ids.reshape(datum.target_shape)


def _outputs(
    data: Sequence[Datum], logprobs_M: Tensor, top: Sequence[tuple[Tensor, Tensor]] | None
) -> list[dict[str, NDArray[np.generic]]]:
    """Split the outputs of a micro-batch by datum."""
    ends = np.cumsum([len(datum.tokens) * max(datum.width, 1) for datum in data])[:-1]
    flat: NDArray[np.float32] = array_of(logprobs_M)
    pieces: list[dict[str, NDArray[np.generic]]] = [
        {"logprobs": piece.reshape(datum.target_shape)}
        for datum, piece in zip(data, np.split(flat, ends), strict=True)
    ]
    for piece, (logprobs_TK, ids_TK) in zip(pieces, top or (), strict=False):
        piece["top_k_logprobs"], piece["top_k_indices"] = array_of(logprobs_TK), array_of(ids_TK)
    return pieces


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Collect each parameter's gradient, zeros where it has none."""
    return [
        torch.zeros_like(p) if p.grad is None else p.grad  # one that the pass did not touch
        for p in parameters
    ]


def _check_finite(
    logprobs_M: Tensor, loss_M: Tensor, indices: Sequence[int], sequence_M: Tensor | None = None
) -> None:
    if not torch.isfinite(logprobs_M).all():
        raise OperationFailed(
            "the model's logprobs are not finite: its weights have become infinite or NaN. Load a"
            " saved state, and lower the learning rate or clip the gradient",
            error_class="NonFinite",
        )
    if not torch.isfinite(loss_M.sum()):
        bad = sorted(indices)
        if sequence_M is not None and not (finite_M := torch.isfinite(loss_M)).all():
            bad = sorted({indices[place] for place in sequence_M[~finite_M].tolist()})
        raise OperationFailed(
            f"the loss is not finite (in datums {bad[:8]}): look for logprobs or advantages that"
            " are far out of range; the ratio of a token to its sampling logprob may be infinite",
            error_class="NonFinite",
        )


def metrics_of(passed: ComputedPass, data: Sequence[Datum]) -> Mapping[str, float]:
    """Compute the metrics of a pass; behind the colon: how chunks of one call are combined."""
    return {
        "loss:sum": passed.loss,
        "num_loss_tokens:sum": float(passed.loss_tokens),
        "num_tokens:sum": float(sum(len(datum.tokens) for datum in data)),
    }
