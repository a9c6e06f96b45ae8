"""Passes over datums: encode, cut into requests, send in one turn, put the answers together.

Three operations are made of it: `forward`, `forward_backward`, and `forward_backward_custom`, which
is a forward, the caller's loss, and a backward, in one place in the line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from fireworks_training._async.custom_loss import LossResult, in_daemon_thread, run_loss
from fireworks_training._async.operations import Request, Turn
from fireworks_training._async.patience import speaking
from fireworks_training._core.chunking import combine_metrics, split
from fireworks_training._wire.datums import PassResult, decode_pass, encode_datum, tensor_array
from fireworks_training._wire.training import EncodedDatum, PassKind, pass_body
from fireworks_training.errors import InvalidDatum, ProtocolError

if TYPE_CHECKING:
    import tinker

    from fireworks_training._async.custom_loss import LossFunction

T = TypeVar("T")

INLINE_TOKENS = 2048
"""Tokens that are encoded or decoded on the loop; more go to a thread, which costs about 0.1 ms."""


@dataclass(frozen=True, slots=True)
class Passes:
    """How passes of one model are sent.

    Attributes:
        model_id: the model.
        comms: "v2" if the trainer asked for it, else "v1".
    """

    model_id: str
    comms: str

    async def run(
        self,
        turn: Turn,
        kind: PassKind,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
    ) -> tinker.ForwardBackwardOutput:
        """One built-in pass."""
        # Of a datum made for another loss, a plain forward needs only what it is about.
        plain = kind == "forward" and loss_fn == "cross_entropy"
        datums = await _off_loop(
            _tokens(data),
            lambda: _encode_all(
                data, [_targets(d, i) for i, d in enumerate(data)] if plain else None
            ),
        )
        chunks = split([len(datum.text) for datum in datums])
        result = await self._send(turn, kind, datums, chunks, loss_fn, loss_fn_config, last=True)
        if loss_fn == "cross_entropy" and kind == "forward_backward":
            counted = float(sum(datum.loss_tokens for datum in datums))
            result.metrics.setdefault("response_tokens", counted)
        return _output(result)

    async def run_custom(
        self, turn: Turn, data: Sequence[tinker.Datum], loss_fn: LossFunction
    ) -> tinker.ForwardBackwardOutput:
        """A pass with the caller's loss."""
        tokens = _tokens(data)
        inputs = await _off_loop(tokens, lambda: [_targets(d, i) for i, d in enumerate(data)])
        forward = await _off_loop(tokens, lambda: _encode_all(data, inputs))
        # Both passes are cut at the same places, so that a chunk's logprobs meet its gradients.
        chunks = split([len(datum.text) for datum in forward])
        first = await self._send(
            turn, "forward", forward, chunks, "cross_entropy", None, last=False
        )
        logprobs = _logprobs(first, inputs)
        loss = await speaking(
            in_daemon_thread(lambda: run_loss(loss_fn, data, logprobs), name="custom loss"),
            lambda: "your loss function, which holds up the operations behind it",
        )
        weighted = [
            {"target_tokens": given["target_tokens"], "weights": -gradient}
            for given, gradient in zip(inputs, loss.gradients, strict=True)
        ]
        backward = await _off_loop(tokens, lambda: _encode_all(data, weighted))
        second = await self._send(
            turn, "forward_backward", backward, chunks, "cross_entropy", None, last=True
        )
        return _output(_with_loss(second, loss))

    async def _send(
        self,
        turn: Turn,
        kind: PassKind,
        datums: Sequence[EncodedDatum],
        chunks: Sequence[range],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
        *,
        last: bool,
    ) -> PassResult:
        def body_of(chunk: range) -> Callable[[int], bytes]:
            return lambda seq_id: pass_body(
                kind,
                datums[chunk.start : chunk.stop],
                loss_fn=loss_fn,
                loss_fn_config=loss_fn_config,
                model_id=self.model_id,
                seq_id=seq_id,
                comms=self.comms,
            )

        requests = [Request(kind, body_of(chunk)) for chunk in chunks]
        payloads = await turn.send(requests, last=last)
        size = sum(len(datum.text) for datum in datums) // 8
        return await _off_loop(size, lambda: _combine(payloads, chunks))


async def _off_loop(tokens: int, work: Callable[[], T]) -> T:
    return work() if tokens <= INLINE_TOKENS else await asyncio.to_thread(work)


def _tokens(data: Sequence[tinker.Datum]) -> int:
    return sum(datum.model_input.length for datum in data)


def _encode_all(
    data: Sequence[tinker.Datum],
    inputs: Sequence[Mapping[str, npt.NDArray[Any]]] | None = None,
) -> list[EncodedDatum]:
    if not data:
        raise InvalidDatum("no datums: a pass needs at least one")
    return [
        encode_datum(datum, index, replace=inputs[index] if inputs is not None else None)
        for index, datum in enumerate(data)
    ]


def _targets(datum: tinker.Datum, index: int) -> dict[str, npt.NDArray[Any]]:
    """Targets and weights of a datum, all that a forward needs; other inputs stay here."""
    if "target_tokens" not in datum.loss_fn_inputs:
        raise InvalidDatum(
            f"datum {index} has no 'target_tokens': the tokens whose logprobs are wanted",
            index=index,
        )
    targets = tensor_array(datum.loss_fn_inputs["target_tokens"])
    given = datum.loss_fn_inputs.get("weights")
    weights = np.zeros(targets.shape, np.float32) if given is None else tensor_array(given)
    return {"target_tokens": targets, "weights": weights}


def _logprobs(
    result: PassResult, inputs: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[npt.NDArray[np.float32]]:
    logprobs: list[npt.NDArray[np.float32]] = []
    for index, (output, given) in enumerate(zip(result.outputs, inputs, strict=True)):
        values = output.get("logprobs")
        shape = given["target_tokens"].shape
        if values is None or values.size != given["target_tokens"].size:
            count = "no" if values is None else str(values.size)
            raise ProtocolError(
                f"datum {index}: the trainer answered {count} logprobs for targets of shape {shape}"
            )
        logprobs.append(values.reshape(shape))
    return logprobs


def _combine(payloads: Sequence[Mapping[str, Any]], chunks: Sequence[range]) -> PassResult:
    parts = [decode_pass(payload) for payload in payloads]
    for part, chunk in zip(parts, chunks, strict=True):
        if len(part.outputs) != len(chunk):
            raise ProtocolError(
                f"the trainer answered {len(part.outputs)} outputs for {len(chunk)} datums"
            )
    return PassResult(
        parts[0].output_type,
        [output for part in parts for output in part.outputs],
        combine_metrics([part.metrics for part in parts], [len(chunk) for chunk in chunks]),
    )


def _with_loss(result: PassResult, loss: LossResult) -> PassResult:
    """The server's metrics with the caller's: its `loss:sum` is that of the surrogate."""
    metrics = dict(result.metrics)
    if "loss:sum" in metrics:
        metrics["surrogate_loss:sum"] = metrics["loss:sum"]
    metrics["loss:sum"] = loss.loss
    metrics.update(loss.metrics)
    return PassResult(result.output_type, result.outputs, metrics)


def _output(result: PassResult) -> tinker.ForwardBackwardOutput:
    from tinker import ForwardBackwardOutput, TensorData

    return ForwardBackwardOutput(
        loss_fn_output_type=result.output_type,
        loss_fn_outputs=[
            {name: TensorData.from_numpy(array) for name, array in output.items()}
            for output in result.outputs
        ],
        metrics=result.metrics,
    )
