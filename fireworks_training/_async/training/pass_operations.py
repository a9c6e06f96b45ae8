"""The operations of a training client that go over datums: checked, captured, ready to run.

Which datums, losses and outputs belong together is decided here; how a pass is sent is in `passes`.

A custom loss may take something else than logprobs: embeddings, projections, similarities. The
trainer computes the output of each datum, the caller's loss runs on it, and the gradient by the
output goes back as a loss input; the trainer computes the output again and differentiates through
it. Shapes, for datum i of T tokens, a hidden size H, a head of D outputs and B datums: embedding
`[H]`, projection `[T, D]`, cos_similarity_matrix `[B]`, row i of the matrix.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fireworks_training._async.runtime.worker import INLINE_TOKENS, off_loop
from fireworks_training._async.training.arguments import (
    check_datums,
    check_loss_name,
    loss_config,
)
from fireworks_training._async.training.context import Operation, OperationContext
from fireworks_training._async.training.custom_loss import require_torch
from fireworks_training._async.training.encoding import EncodingJob
from fireworks_training._async.training.passes import (
    Array,
    BuiltInLoss,
    CustomLoss,
    EncodedData,
    Inputs,
    Passes,
    combine,
    contract_inputs,
    given_inputs,
    output_of,
    target_inputs,
    with_loss,
)
from fireworks_training._checks import integer, number, one_of
from fireworks_training._core.operations import Role
from fireworks_training._wire.training.bodies import PassKind
from fireworks_training._wire.training.datums import (
    Captured,
    PassResult,
    capture,
    capture_all,
    count_tokens,
)
from fireworks_training.errors import InvalidArgument, ProtocolError
from fireworks_training.options import LossFunction, Output, Pooling

if TYPE_CHECKING:
    import tinker

    from fireworks_training.futures import APIFuture

    Datums = Sequence[tinker.Datum]
    PassFuture = APIFuture[tinker.ForwardBackwardOutput]

GRADIENTS_OF = {
    "embedding": "embedding_grads",
    "projection": "projection_grads",
    "cos_similarity_matrix": "embedding_grads",
}
"""The loss input that takes the gradient by each output."""

OUTPUT_FIELDS = {"embedding": "embedding", "projection": "projection"}
"""The field of the answer that holds an output; a row of the matrix comes as an embedding."""

OUTPUTS = ("logprobs", *GRADIENTS_OF)
POOLINGS = ("mean", "last")


class PassOperations:
    """Makes the operations over datums of one model.

    Args:
        passes: sends them.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._run = passes.run

    def built_in(
        self,
        kind: PassKind,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
    ) -> Operation[tinker.ForwardBackwardOutput]:
        """Make a `forward` or `forward_backward` with a built-in loss."""
        check_datums(data)
        check_loss_name(loss_fn)
        config = loss_config(loss_fn_config)
        # A plain forward needs the targets only, whatever loss the datum was made for.
        output = (config or {}).get("output", "logprobs")
        plain = kind == "forward" and loss_fn == "cross_entropy" and output == "logprobs"
        given = given_inputs if self._passes.masks else partial(contract_inputs, loss_fn)
        job = self._encoding(data, target_inputs if plain else given)
        role = Role.FORWARD if kind == "forward" else Role.GRADIENT
        return Operation(role, kind, self._run, (kind, job, BuiltInLoss.of(loss_fn, config)), job)

    def _encoding(
        self, data: Sequence[tinker.Datum], inputs: Inputs, *, single_request: bool = False
    ) -> EncodingJob[EncodedData]:
        """Capture datums that are needed for nothing but their encoding; a few are encoded now."""
        at_once = count_tokens(data) <= INLINE_TOKENS
        captured = [capture(d, copy=False) for d in data] if at_once else capture_all(data)
        return self._passes.encoding(
            captured, inputs, single_request=single_request, at_once=at_once
        )

    def projection(self, data: Sequence[tinker.Datum]) -> Operation[tinker.ForwardBackwardOutput]:
        """Make a forward whose output is the projection head's."""
        config = {"output": "projection", "pooling": "mean"}
        return self.built_in("forward", data, "cross_entropy", config)

    def contrastive(
        self,
        data: Sequence[tinker.Datum],
        *,
        num_queries: int,
        temperature: float,
        pooling: Pooling,
        num_extra_negatives: int,
    ) -> Operation[tinker.ForwardBackwardOutput]:
        """Make a forward_backward of InfoNCE, computed by the trainer."""
        check_datums(data)
        one_of("pooling", pooling, POOLINGS)
        for name, count in (
            ("num_queries", num_queries),
            ("num_extra_negatives", num_extra_negatives),
        ):
            integer(name, count, 0)
        if num_queries < 1 or num_extra_negatives < 0:
            raise InvalidArgument(
                f"num_queries={num_queries} must be at least 1 and num_extra_negatives="
                f"{num_extra_negatives} at least 0"
            )
        wanted = 2 * num_queries + num_extra_negatives
        if len(data) != wanted:
            raise InvalidArgument(
                f"data has {len(data)} datums; {num_queries} queries, as many documents and "
                f"{num_extra_negatives} extra negatives, in this order, are {wanted}"
            )
        if not number("temperature", temperature, 0.0) > 0:
            raise InvalidArgument(f"temperature={temperature} must be above 0")
        config = {
            "output": "contrastive_loss",
            "num_queries": num_queries,
            "temperature": temperature,
            "pooling": pooling,
            "num_extra_negatives": num_extra_negatives,
        }
        job = self._encoding(data, given_inputs, single_request=True)
        args = ("forward_backward", job, BuiltInLoss.of("cross_entropy", config))
        return Operation(Role.GRADIENT, "forward_backward_contrastive", self._run, args, job)

    def custom(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: LossFunction,
        *,
        loss_type_input: str,
        output: Output,
        pooling: Pooling,
        precomputed_forward: tinker.ForwardBackwardOutput | None,
    ) -> Operation[tinker.ForwardBackwardOutput]:
        """Make a forward, the caller's loss, and a backward."""
        require_torch()
        check_datums(data)
        if not callable(loss_fn):
            raise InvalidArgument(f"loss_fn must be callable, not {type(loss_fn).__name__}")
        one_of("loss_type_input", loss_type_input, ("logprobs",))
        one_of("output", output, OUTPUTS)
        one_of("pooling", pooling, POOLINGS)
        if precomputed_forward is not None and output != "logprobs":
            raise InvalidArgument(
                f"precomputed_forward holds logprobs, which {output=} has no use for"
            )
        datums = list(data)
        captured = capture_all(datums)
        loss = CustomLoss(loss_fn, datums, captured, contextvars.copy_context())
        run: Callable[..., Awaitable[tinker.ForwardBackwardOutput]]
        args: tuple[Any, ...]
        if output == "logprobs":
            job = self._passes.encoding(captured, target_inputs, keep=True)
            run, args = self._passes.run_custom, (job, loss, _precomputed(precomputed_forward))
        else:
            single_request = output == "cos_similarity_matrix"
            job = self._passes.encoding(captured, given_inputs, single_request=single_request)
            run, args = self._run_custom_output, (job, loss, {"output": output, "pooling": pooling})
        return Operation(Role.GRADIENT, "forward_backward_custom", run, args, job)

    async def _run_custom_output(
        self,
        context: OperationContext,
        job: EncodingJob[EncodedData],
        custom: CustomLoss,
        config: Mapping[str, str],
    ) -> tinker.ForwardBackwardOutput:
        """Carry out a forward, the caller's loss of an output, and a backward."""
        passes, output = self._passes, config["output"]
        encoded = await job.result()
        fields = BuiltInLoss(config=config)
        requests = passes.requests("forward", encoded.bodies, fields)
        answers = await context.send(requests, last=False)
        passes.usage.passed(job.tokens, trained=False)
        first = await off_loop(job.tokens, partial(combine, answers, encoded.chunks))
        values = [
            _output_value(answered, output, config["pooling"], i)
            for i, answered in enumerate(first.outputs)
        ]
        loss = await custom.run(values, context)

        def inputs(_: Captured, index: int) -> Mapping[str, Array]:
            return {GRADIENTS_OF[output]: loss.gradients[index]}

        # Rows of the matrix depend on each other; other outputs are each datum's own.
        single_request = output == "cos_similarity_matrix"
        backward = passes.encoding(custom.captured, inputs, single_request=single_request)
        await off_loop(job.tokens, backward.do)
        again = await backward.result()
        answers = await context.send(passes.requests("forward_backward", again.bodies, fields))
        passes.usage.passed(job.tokens, trained=True)
        second = combine(answers, again.chunks)
        outputs: list[dict[str, Any]] = [
            {OUTPUT_FIELDS.get(output, "embedding"): value} for value in values
        ]
        return output_of(with_loss(PassResult(second.output_type, outputs, second.metrics), loss))


def _precomputed(forward: tinker.ForwardBackwardOutput | None) -> list[Any] | None:
    """Copy the logprobs that the caller brought."""
    if forward is None:
        return None
    missing = [i for i, o in enumerate(forward.loss_fn_outputs) if "logprobs" not in o]
    if missing:
        raise InvalidArgument(f"precomputed_forward has no logprobs for datum {missing[0]}")
    return [output["logprobs"].to_numpy().copy() for output in forward.loss_fn_outputs]


def _output_value(fields: Mapping[str, Array], output: str, pooling: str, index: int) -> Array:
    """Read the output of one datum; an embedding that comes token by token is pooled here."""
    value = fields.get(OUTPUT_FIELDS.get(output, "embedding"), fields.get(output))
    if value is None:
        raise ProtocolError(f"datum {index}: the trainer answered no {output}")
    if output == "embedding" and value.ndim == 2:
        pooled: Array = value.mean(axis=0) if pooling == "mean" else value[-1]
        return pooled.astype(np.float32)
    return value
