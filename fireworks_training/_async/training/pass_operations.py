"""The operations of a training client that go over datums: checked, captured, ready to run.

How a pass is sent is in `passes`; which datums, losses and outputs belong together is decided here.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fireworks_training._async.runtime.worker import INLINE_TOKENS
from fireworks_training._async.training.arguments import check_datums, loss_config
from fireworks_training._async.training.custom_loss import require_torch
from fireworks_training._async.training.encoding import EncodingJob
from fireworks_training._async.training.outputs import GRADIENTS_OF, run_custom_output
from fireworks_training._async.training.passes import (
    BuiltInLoss,
    EncodedData,
    Inputs,
    Passes,
    given_inputs,
    target_inputs,
)
from fireworks_training._async.training.queue import Operation
from fireworks_training._checks import one_of
from fireworks_training._core.operations import Role
from fireworks_training._wire.training.bodies import PassKind
from fireworks_training._wire.training.datums import capture, count_tokens
from fireworks_training.errors import InvalidArgument
from fireworks_training.options import LossFunction
from fireworks_training.options import Output as Output
from fireworks_training.options import Pooling as Pooling

if TYPE_CHECKING:
    import tinker

    from fireworks_training.futures import APIFuture

    Datums = Sequence[tinker.Datum]
    PassFuture = APIFuture[tinker.ForwardBackwardOutput]

OUTPUTS = ("logprobs", *GRADIENTS_OF)
POOLINGS = ("mean", "last")


class PassOperations:
    """The passes of one model.

    Args:
        passes: how they are sent.
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
        """`forward` or `forward_backward` with a built-in loss."""
        check_datums(data)
        if not isinstance(loss_fn, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(
                f"loss_fn must be the name of a built-in loss, not {type(loss_fn).__name__}; a "
                "function goes to forward_backward_custom"
            )
        config = loss_config(loss_fn_config)
        # Of a datum made for another loss, a plain forward needs only what it is about.
        output = (config or {}).get("output", "logprobs")
        plain = kind == "forward" and loss_fn == "cross_entropy" and output == "logprobs"
        piece = self._piece(data, target_inputs if plain else given_inputs)
        role = Role.FORWARD if kind == "forward" else Role.GRADIENT
        return Operation(
            role, kind, self._run, (kind, piece, BuiltInLoss.of(loss_fn, config)), piece
        )

    def _piece(
        self, data: Sequence[tinker.Datum], inputs: Inputs, *, whole: bool = False
    ) -> EncodingJob[EncodedData]:
        """Datums that nothing but their encoding is wanted of: a few are encoded at once."""
        at_once = count_tokens(data) <= INLINE_TOKENS
        captured = [capture(datum, copy=not at_once) for datum in data]
        return self._passes.piece(captured, inputs, whole=whole, at_once=at_once)

    def projection(self, data: Sequence[tinker.Datum]) -> Operation[tinker.ForwardBackwardOutput]:
        """A forward whose output is the projection head's."""
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
        """A forward_backward of InfoNCE, computed by the trainer."""
        check_datums(data)
        one_of("pooling", pooling, POOLINGS)
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
        if not temperature > 0:
            raise InvalidArgument(f"temperature={temperature} must be above 0")
        config = {
            "output": "contrastive_loss",
            "num_queries": num_queries,
            "temperature": temperature,
            "pooling": pooling,
            "num_extra_negatives": num_extra_negatives,
        }
        piece = self._piece(data, given_inputs, whole=True)
        args = ("forward_backward", piece, BuiltInLoss.of("cross_entropy", config))
        return Operation(Role.GRADIENT, "forward_backward_contrastive", self._run, args, piece)

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
        """A forward, the caller's loss, and a backward."""
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
        datums, context = list(data), contextvars.copy_context()
        captured = [capture(datum) for datum in datums]
        if output == "logprobs":
            piece = self._passes.piece(captured, target_inputs, keep=True)
            run = partial(
                self._passes.run_custom,
                data=datums,
                loss_fn=loss_fn,
                captured=captured,
                piece=piece,
                context=context,
                precomputed=_brought(precomputed_forward),
            )
        else:
            whole = output == "cos_similarity_matrix"
            piece = self._passes.piece(captured, given_inputs, whole=whole)
            run = partial(
                run_custom_output,
                self._passes,
                data=datums,
                loss_fn=loss_fn,
                captured=captured,
                piece=piece,
                context=context,
                config={"output": output, "pooling": pooling},
            )
        return Operation(Role.GRADIENT, "forward_backward_custom", run, ahead=piece)


def _brought(forward: tinker.ForwardBackwardOutput | None) -> list[Any] | None:
    """Copies of the logprobs that the caller brought."""
    if forward is None:
        return None
    missing = [i for i, o in enumerate(forward.loss_fn_outputs) if "logprobs" not in o]
    if missing:
        raise InvalidArgument(f"precomputed_forward has no logprobs for datum {missing[0]}")
    return [output["logprobs"].to_numpy().copy() for output in forward.loss_fn_outputs]
