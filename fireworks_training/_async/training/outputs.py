"""Custom losses over something else than logprobs: embeddings, projections, similarities.

The trainer computes the output of each datum, the caller's loss runs on it, and the gradient by the
output goes back as a loss input; the trainer computes the output again and differentiates through
it. Shapes, for datum i of T tokens, a hidden size H, a head of D outputs and B datums: embedding
`[H]`, projection `[T, D]`, cos_similarity_matrix `[B]`, row i of the matrix.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fireworks_training._async.runtime.worker import off_loop
from fireworks_training._async.training.encoding import EncodingJob
from fireworks_training._async.training.passes import (
    Array,
    BuiltInLoss,
    EncodedData,
    Passes,
    combine,
    output_of,
    run_in_thread,
    with_loss,
)
from fireworks_training._async.training.queue import OperationContext
from fireworks_training._wire.training.datums import Captured, PassResult
from fireworks_training.errors import ProtocolError

if TYPE_CHECKING:
    import tinker

    from fireworks_training._async.training.custom_loss import LossFunction

GRADIENTS_OF = {
    "embedding": "embedding_grads",
    "projection": "projection_grads",
    "cos_similarity_matrix": "embedding_grads",
}
"""The loss input that takes the gradient by each output."""

FIELDS = {"embedding": "embedding", "projection": "projection"}
"""The field of the answer that holds an output; a row of the matrix comes as an embedding."""


async def run_custom_output(
    passes: Passes,
    turn: OperationContext,
    *,
    data: Sequence[tinker.Datum],
    loss_fn: LossFunction,
    captured: Sequence[Captured],
    piece: EncodingJob[EncodedData],
    context: contextvars.Context,
    config: Mapping[str, str],
) -> tinker.ForwardBackwardOutput:
    """A pass with the caller's loss, by the output that `config` names."""
    output = config["output"]
    encoded = await piece.result()
    losses = BuiltInLoss(config=config)
    answers = await turn.send(passes.requests("forward", encoded.bodies, losses), last=False)
    passes.usage.passed(piece.tokens, trained=False)
    first = await off_loop(piece.tokens, partial(combine, answers, encoded.chunks))
    values = [
        _value(fields, output, config["pooling"], i) for i, fields in enumerate(first.outputs)
    ]
    loss = await run_in_thread(loss_fn, data, values, turn, context)

    def inputs(_: Captured, index: int) -> Mapping[str, Array]:
        return {GRADIENTS_OF[output]: loss.gradients[index]}

    backward = passes.piece(captured, inputs, whole=len(encoded.chunks) == 1)
    await off_loop(piece.tokens, backward.do)
    again = await backward.result()
    requests = passes.requests("forward_backward", again.bodies, losses)
    answers = await turn.send(requests)
    passes.usage.passed(piece.tokens, trained=True)
    second = combine(answers, again.chunks)
    outputs: list[dict[str, Any]] = [{FIELDS.get(output, "embedding"): v} for v in values]
    return output_of(with_loss(PassResult(second.output_type, outputs, second.metrics), loss))


def _value(fields: Mapping[str, Array], output: str, pooling: str, index: int) -> Array:
    """The output of one datum; an embedding that comes token by token is pooled here."""
    value = fields.get(FIELDS.get(output, "embedding"), fields.get(output))
    if value is None:
        raise ProtocolError(f"datum {index}: the trainer answered no {output}")
    if output == "embedding" and value.ndim == 2:
        pooled: Array = value.mean(axis=0) if pooling == "mean" else value[-1]
        return pooled.astype(np.float32)
    return value
