"""Passes whose output is taken from the last hidden states: embeddings, projections, similarities.

Knows pooling, the projection head, the contrastive loss, and gradients that a client sends. Does
not know optimizers or steps.

Legend: B sequences, T the longest of them, H hidden size, D outputs of the projection head.

    embedding              [H], the mean over a sequence's tokens, or its last one
    projection             [T, D], the projection head at every token
    cos_similarity_matrix  row i of S [B, B], the cosines between pooled embedding i and all
    contrastive_loss       nothing a datum; the loss is InfoNCE in both directions (`info_nce`)

Outputs that depend on the whole batch are computed in two rounds: embeddings without gradient, the
loss and its gradient with respect to them, then each micro-batch again with its part of that
gradient (Gao et al. 2021, arXiv:2101.06983). So memory does not grow with the batch, and the
gradient is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fireworks_training.local.model.devices import array_of, on
from fireworks_training.local.trainer.queue.operations import (
    GRADIENT_INPUTS,
    EmbeddingPass,
    OperationFailed,
)
from fireworks_training.local.trainer.run.network import Network, datums_of
from fireworks_training.local.trainer.run.packing import MicroBatch, plan
from fireworks_training.local.trainer.run.passes import ComputedPass, take_gradients

HEAD = "projection_head"
"""Prefix of the projection head's parameters; it is trained and saved, and never served."""
_OF_ONE_DATUM = ("embedding", "projection")


def new_head(hidden_size: int, outputs: int, seed: int) -> nn.Linear:
    """Make a linear projection head with a bias; its values depend on `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(hidden_size, outputs, device="cpu")


def run_embedding_pass(
    network: Network,
    head: nn.Module | None,
    parameters: Sequence[nn.Parameter],
    request: EmbeddingPass,
) -> ComputedPass:
    """Compute the outputs, and with `backward` the gradient of sum(output * given gradient).

    Nothing outside is changed: the parameters' `.grad` is None before and after.

    Raises:
        OperationFailed: an output or a gradient is not finite, or the model has no hidden states.
    """
    if not network.has_hidden_states:
        raise OperationFailed("this model's architecture gives no hidden states to embed with")
    run = _EmbeddingRun(network, head, request)
    taken = None
    try:
        if request.output in _OF_ONE_DATUM and request.backward:
            gradients = _given(request, network.device)
            values = run.backward(parameters, gradients)
            _check_finite(values)
            pairs = zip(values, gradients, strict=True)
            loss = sum(float((v * g.reshape(v.shape)).double().sum()) for v, g in pairs)
            outputs = [_output(request.output, value) for value in values]
        else:
            values = run.forward()
            _check_finite(values)
            outputs, loss, gradients = _batch_outputs(request, values)
            if request.backward:
                run.backward(parameters, gradients)
        if request.backward:
            taken = take_gradients(parameters)
    finally:
        for parameter in parameters:
            parameter.grad = None
    return ComputedPass(outputs, loss, 0, taken)


def embedding_metrics(passed: ComputedPass, request: EmbeddingPass) -> dict[str, float]:
    """Compute the metrics of a pass. contrastive_loss is one request: its `loss` is complete."""
    metrics = {
        "loss:sum": passed.loss,
        "num_tokens:sum": float(sum(len(datum.tokens) for datum in request.data)),
    }
    if request.output == "contrastive_loss":
        metrics["loss"] = passed.loss
    return metrics


class _EmbeddingRun:
    """Runs the datums of one request through the module, a micro-batch at a time."""

    def __init__(self, network: Network, head: nn.Module | None, request: EmbeddingPass) -> None:
        self._network = network
        self._head = head
        self._request = request
        tokens = [datum.tokens for datum in request.data]
        self._batches = plan(tokens, network.token_budget, sharing=network.sharing)

    def forward(self) -> list[Tensor]:
        """Computes pooled or projected hidden states of each datum, without gradient."""
        results = self._empty()
        with torch.no_grad():
            for batch in self._batches:
                for index, value in zip(datums_of(batch), self._values(batch), strict=True):
                    results[index] = value
        return results

    def backward(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]
    ) -> list[Tensor]:
        """Adds the gradient of sum(value * gradient) to each `.grad`; returns the values."""
        results = self._empty()
        for batch in self._batches:
            indices = datums_of(batch)
            with torch.enable_grad():
                values = self._values(batch)
            given = [gradients[i].reshape(v.shape) for i, v in zip(indices, values, strict=True)]
            torch.autograd.backward(values, given, inputs=list(parameters))
            for index, value in zip(indices, values, strict=True):
                results[index] = value.detach()
        return results

    def _empty(self) -> list[Tensor]:
        nothing = torch.empty(0, device=self._network.device)
        return [nothing] * len(self._request.data)

    def _values(self, batch: MicroBatch) -> list[Tensor]:
        computed = self._network.compute(batch)
        return [
            self._reduced(computed.hidden.index_select(0, on(computed.hidden.device, rows)))
            for rows in computed.rows
        ]

    def _reduced(self, hidden_TH: Tensor) -> Tensor:
        if self._request.output == "projection":
            assert self._head is not None, "a pass for a head is taken only where there is one"
            projected_TD: Tensor = self._head(hidden_TH)
            return projected_TD
        return hidden_TH.mean(0) if self._request.pooling == "mean" else hidden_TH[-1]


def _batch_outputs(
    request: EmbeddingPass, values: Sequence[Tensor]
) -> tuple[list[dict[str, NDArray[np.generic]]], float, list[Tensor]]:
    """Compute the datums' outputs, the loss, and its gradient with respect to `values`."""
    if request.output in _OF_ONE_DATUM:
        return [_output(request.output, value) for value in values], 0.0, []
    leaf_BH = torch.stack(list(values)).requires_grad_()
    with torch.enable_grad():
        unit_BH = normalize(leaf_BH, dim=-1)
        if request.output == "contrastive_loss":
            outputs: list[dict[str, NDArray[np.generic]]] = [{} for _ in values]
            loss = info_nce(unit_BH, request.queries, request.temperature)
        else:
            cosines_BB = unit_BH @ unit_BH.T
            outputs = [_output(request.output, row) for row in cosines_BB]
            if not request.backward:
                return outputs, 0.0, []
            loss = (cosines_BB * torch.stack(_given(request, leaf_BH.device))).sum()
    (gradient_BH,) = torch.autograd.grad(loss, leaf_BH)
    return outputs, float(loss.detach()), list(gradient_BH)


def info_nce(unit_BH: Tensor, queries: int, temperature: float) -> Tensor:
    """Average both directions' cross-entropies over cosine similarities (InfoNCE).

    Rows are Q queries, their Q documents in the same order, then extra documents. Query to document
    looks at all documents, document to query at the Q paired ones (van den Oord et al. 2018,
    arXiv:1807.03748; both directions as Radford et al. 2021, arXiv:2103.00020).
    """
    similarity_QD = unit_BH[:queries] @ unit_BH[queries:].T / temperature
    paired_Q = torch.arange(queries, device=unit_BH.device)
    to_documents = cross_entropy(similarity_QD, paired_Q)
    to_queries = cross_entropy(similarity_QD[:, :queries].T, paired_Q)
    return (to_documents + to_queries) / 2


def _given(request: EmbeddingPass, device: torch.device) -> list[Tensor]:
    """Collect the gradient of each datum's output, flat, as the client sent it."""
    name = GRADIENT_INPUTS[request.output]
    arrays = [cast("NDArray[np.float32]", datum.inputs[name]) for datum in request.data]
    return [on(device, array) for array in arrays]


def _check_finite(values: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise OperationFailed(
            "the model's hidden states are not finite: its weights have become infinite or NaN."
            " Load a saved state",
            error_class="NonFinite",
        )


def _output(name: str, value: Tensor) -> dict[str, NDArray[np.generic]]:
    kind = "projection" if name == "projection" else "embedding"
    return {kind: array_of(value)}
