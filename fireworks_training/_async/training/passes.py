"""Passes over datums: encoded, cut into requests, sent in one turn, the answers put together.

`forward` and `forward_backward` are one pass each. `forward_backward_custom` is a forward, the
caller's loss, and a backward, in one place in the line; the backward refers to the forward where
the trainer offers that, and else is a cross-entropy pass that has the same gradient. Which datums,
losses and outputs belong together is decided in `pass_operations`; bytes are made in
`_wire.training`.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fireworks_training._async.runtime.usage_meter import UsageMeter
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._async.runtime.worker import off_loop, with_pauses
from fireworks_training._async.training.client_config import ClientConfig
from fireworks_training._async.training.context import OperationContext
from fireworks_training._async.training.custom_loss import (
    LossResult,
    SpreadMeans,
    in_daemon_thread,
    run_loss,
)
from fireworks_training._async.training.data_plane import Answer
from fireworks_training._async.training.encoding import EncodingJob
from fireworks_training._async.training.requests import Request
from fireworks_training._core.chunking import combine_metrics, split
from fireworks_training._wire.training.bodies import PassKind, WireRequest
from fireworks_training._wire.training.datums import (
    ALL_MASKS,
    Captured,
    Encoding,
    PassResult,
    check_inputs,
    without_idle_weights,
)
from fireworks_training._wire.training.dialects import (
    ACCEPT,
    Dialect,
    decode_result,
)
from fireworks_training.errors import InvalidDatum, ProtocolError

if TYPE_CHECKING:
    import tinker

    from fireworks_training.options import LossFunction

Array = npt.NDArray[Any]
Inputs = Callable[[Captured, int], Mapping[str, Array]]
"""Selects the loss inputs of a datum that go to the trainer."""

logger = logging.getLogger(__name__)

_ACCEPT = {"Accept": ACCEPT}


@dataclass(slots=True)
class EncodedData:
    """The datums of a pass, encoded and cut into requests.

    Attributes:
        bodies: the encoded datums of each request.
        chunks: the ranges of datums, one a request.
        responses: how many targets have a weight.
        lengths: how many logprobs each datum's answer has.
        inputs: the loss inputs that were encoded, where the pass needs them again.
    """

    bodies: tuple[bytes, ...]
    chunks: tuple[range, ...]
    responses: float
    lengths: tuple[int | None, ...] = ()
    inputs: Sequence[Mapping[str, Array]] = ()


def given_inputs(datum: Captured, index: int) -> Mapping[str, Array]:
    """All loss inputs of a datum."""
    return datum.arrays(index)


def target_inputs(datum: Captured, index: int) -> Mapping[str, Array]:
    """Targets and weights, all that a forward needs: other inputs stay here."""
    return datum.targets(index)


def contract_inputs(loss_fn: str, datum: Captured, index: int) -> Mapping[str, Array]:
    """Loss inputs for a server whose losses with advantages take weights only where they matter."""
    return without_idle_weights(datum.arrays(index), loss_fn)


@dataclass(frozen=True, slots=True)
class BuiltInLoss:
    """A built-in loss by its name and options, one of which may name another output of the pass."""

    name: str = "cross_entropy"
    config: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any] | None) -> BuiltInLoss:
        """Make the loss; all operations that take it without options share one object."""
        return _plain_loss(name) if config is None else cls(name, config)


@dataclass(frozen=True, slots=True)
class CustomLoss:
    """A caller's loss function, and the datums that it is called with.

    Attributes:
        function: the caller's.
        data: the datums as the caller gave them.
        captured: what they held at the call.
        caller_context: the context that the function runs in.
    """

    function: LossFunction
    data: Sequence[tinker.Datum]
    captured: Sequence[Captured]
    caller_context: contextvars.Context

    async def run(self, values: Sequence[Array], context: OperationContext) -> LossResult:
        """Call the function in a thread of its own, with the trainer's output of each datum."""
        context.hold_up(self.caller_context)
        return await log_if_slow(
            in_daemon_thread(
                lambda: run_loss(self.function, self.data, values),
                name="custom loss",
                context=self.caller_context,
            ),
            lambda: "your loss function, which holds up the operations behind it",
        )


@dataclass(frozen=True, slots=True)
class Passes:
    """Encodes and sends the passes of one model.

    Attributes:
        model_id: the model.
        dialect: writes the requests.
        backward: whether the trainer takes a backward by an earlier forward.
        usage: counts the tokens of finished passes.
        limits: what one request may hold.
        means: notices losses whose mean is that of a call and not of the step.
        masks: whether the trainer's losses with advantages take weights whatever they are.
    """

    model_id: str
    dialect: Dialect
    backward: bool = False
    masks: bool = True
    usage: UsageMeter = field(default_factory=lambda: UsageMeter(time.monotonic))
    limits: ClientConfig = field(default_factory=ClientConfig)
    means: SpreadMeans = field(default_factory=SpreadMeans)

    def encoding(
        self,
        data: Sequence[Captured],
        inputs: Inputs,
        *,
        single_request: bool = False,
        keep: bool = False,
        at_once: bool = False,
    ) -> EncodingJob[EncodedData]:
        """The job that encodes the datums of a pass, before its turn comes.

        Args:
            inputs: selects the loss inputs of a datum that are sent.
            single_request: the datums depend on each other, and must go in one request.
            keep: the pass needs the inputs again.
            at_once: encode now.
        """
        tokens = sum(map(_length, data))
        job = EncodingJob(partial(self._encode, data, inputs, single_request, keep), tokens)
        if at_once:
            job.do()
        return job

    def _encode(
        self, data: Sequence[Captured], inputs: Inputs, single_request: bool, keep: bool
    ) -> EncodedData:
        if not data:
            raise InvalidDatum("no datums: a pass needs at least one")
        arrays = [inputs(datum, index) for index, datum in enumerate(data)]
        if any(
            "advantages" in datum.tensors and ALL_MASKS.isdisjoint(datum.tensors) for datum in data
        ):
            _note_rows_without_mask(self.model_id)
        pairs = with_pauses(zip(data, arrays, strict=True))
        datums = [self._datum(d, a, i) for i, (d, a) in enumerate(pairs)]
        sizes = [datum.size for datum in datums]
        limits = self.limits
        chunks = split(sizes, max_datums=limits.max_datums, max_bytes=limits.max_bytes)
        if single_request and len(chunks) > 1:
            size = sum(sizes)
            raise InvalidDatum(
                f"{len(datums)} datums of {size} bytes do not fit in one request, which they must: "
                f"their outputs depend on each other. Take at most {limits.max_datums} datums and "
                f"{limits.max_bytes} bytes."
            )
        return EncodedData(
            tuple([self.dialect.join(datums[chunk.start : chunk.stop]) for chunk in chunks]),
            tuple(chunks),
            _response_tokens(arrays),
            tuple([None if (t := a.get("target_tokens")) is None else t.size for a in arrays]),
            arrays if keep else (),
        )

    def _datum(self, datum: Captured, arrays: Mapping[str, Array], index: int) -> Encoding:
        tokens = datum.tokens(index)
        check_inputs(arrays, len(tokens), index)
        return self.dialect.encode_datum(tokens, arrays, index)

    async def run(
        self,
        context: OperationContext,
        kind: PassKind,
        job: EncodingJob[EncodedData],
        loss: BuiltInLoss,
    ) -> tinker.ForwardBackwardOutput:
        """Carry out a pass with a built-in loss."""
        encoded = await job.result()
        answers = await context.send(self.requests(kind, encoded.bodies, loss))
        self.usage.passed(job.tokens, trained=kind == "forward_backward")
        counted = loss.name == "cross_entropy"
        return await off_loop(job.tokens, partial(_finish, answers, encoded, counted))

    async def run_custom(
        self,
        context: OperationContext,
        job: EncodingJob[EncodedData],
        custom: CustomLoss,
        precomputed: Sequence[Array] | None,
    ) -> tinker.ForwardBackwardOutput:
        """Carry out a forward, the caller's loss of the logprobs, and a backward."""
        encoded = await job.result()
        first: PassResult | None = None
        if precomputed is None:
            requests = self.requests("forward", encoded.bodies, BuiltInLoss())
            answers = await context.send(requests, last=False)
            self.usage.passed(job.tokens, trained=False)
            first = await off_loop(
                job.tokens, partial(combine, answers, encoded.chunks, encoded.lengths)
            )
            logprobs = _logprobs(first.outputs, encoded.inputs)
        else:
            logprobs = _checked(precomputed, encoded.inputs)
        forward_ids = context.sent
        loss = await custom.run(logprobs, context)
        self.means.note(context.step, custom.function)
        linear = partial(self._linearised, custom.captured, encoded.inputs, loss.gradients)
        if self.backward and forward_ids:
            bodies = await off_loop(
                job.tokens, partial(self._gradients, loss.gradients, encoded.chunks)
            )
            requests = [
                self._by_forward(forward_id, body, partial(linear, chunk))
                for forward_id, body, chunk in zip(forward_ids, bodies, encoded.chunks, strict=True)
            ]
        else:
            bodies = await off_loop(job.tokens, lambda: [*map(linear, encoded.chunks)])
            requests = self.requests("forward_backward", bodies, BuiltInLoss())
        answers = await context.send(requests)
        self.usage.passed(job.tokens, trained=True)

        def finish() -> tinker.ForwardBackwardOutput:
            second = combine(answers, encoded.chunks, encoded.lengths)
            answers.clear()
            if not any(second.outputs):  # a backward need not repeat what the forward answered
                outputs = first.outputs if first is not None else second.outputs
                second = PassResult(second.output_type, outputs, second.metrics)
            return output_of(with_loss(second, loss))

        return await off_loop(job.tokens, finish)

    def _linearised(
        self,
        captured: Sequence[Captured],
        inputs: Sequence[Mapping[str, Array]],
        gradients: Sequence[Array],
        chunk: range,
    ) -> bytes:
        """Encode a cross-entropy pass whose gradient is the loss's: weights -dL/dlogprob."""
        return self.dialect.join(
            self._datum(
                captured[i],
                {"target_tokens": inputs[i]["target_tokens"], "weights": -gradients[i]},
                i,
            )
            for i in chunk
        )

    def _gradients(self, gradients: Sequence[Array], chunks: Sequence[range]) -> list[bytes]:
        encoded = [self.dialect.encode_gradient(gradient) for gradient in gradients]
        return [self.dialect.join(encoded[chunk.start : chunk.stop]) for chunk in chunks]

    def _by_forward(self, forward_id: int, body: bytes, linear: Callable[[], bytes]) -> Request:
        def make(seq_id: int) -> WireRequest:
            return self.dialect.encode_backward(
                body, model_id=self.model_id, seq_id=seq_id, forward_seq_id=forward_id
            )

        def fallback(seq_id: int) -> WireRequest:
            return self._chunk("forward_backward", linear(), BuiltInLoss(), seq_id)

        return Request(make, _ACCEPT, fallback, self._effort(body))

    def requests(self, kind: PassKind, bodies: Sequence[bytes], loss: BuiltInLoss) -> list[Request]:
        """Make one request for each body."""
        return [
            Request(partial(self._chunk, kind, body, loss), _ACCEPT, tokens=self._effort(body))
            for body in bodies
        ]

    def _effort(self, body: bytes) -> int:
        """The effort to make a request of a body, in tokens: nothing, or that of compressing it."""
        return len(body) // 16 if self.dialect.compresses else 0

    def _chunk(self, kind: PassKind, body: bytes, loss: BuiltInLoss, seq_id: int) -> WireRequest:
        return self.dialect.encode_pass(
            kind,
            body,
            loss_fn=loss.name,
            loss_fn_config=loss.config,
            model_id=self.model_id,
            seq_id=seq_id,
        )


@lru_cache(maxsize=256)
def _note_rows_without_mask(model_id: str) -> None:
    """Say once for a model that rows came whose mask the trainer has to guess."""
    logger.warning(
        "model %s: rows with advantages came without 'weights', the mask that says which tokens "
        "count: the trainer takes its own view of them. The datum builders write it",
        model_id,
    )


@lru_cache(maxsize=64)
def _plain_loss(name: str) -> BuiltInLoss:
    return BuiltInLoss(name)


def _length(datum: Captured) -> int:
    return sum(len(getattr(chunk, "tokens", ())) for chunk in datum.chunks)


def _response_tokens(inputs: Sequence[Mapping[str, Array]]) -> float:
    """Count the targets with a weight; all, K a position for `[T, K]`, where there are none."""
    return float(
        sum(
            np.count_nonzero(given["weights"])
            if "weights" in given
            else given["target_tokens"].size
            for given in inputs
            if "target_tokens" in given
        )
    )


def _logprobs(
    outputs: Sequence[Mapping[str, Array]], inputs: Sequence[Mapping[str, Array]]
) -> list[Array]:
    """Take the logprobs of each datum, in the shape of its targets."""
    logprobs: list[Array] = []
    for index, (output, given) in enumerate(zip(outputs, inputs, strict=True)):
        values = output.get("logprobs")
        shape = given["target_tokens"].shape
        if values is None or values.size != given["target_tokens"].size:
            count = "no" if values is None else str(values.size)
            raise ProtocolError(
                f"datum {index}: the trainer answered {count} logprobs for targets of shape {shape}"
            )
        logprobs.append(values.reshape(shape))
    return logprobs


def _checked(precomputed: Sequence[Array], inputs: Sequence[Mapping[str, Array]]) -> list[Array]:
    """Check the logprobs that the caller brought, and give them the shapes of the targets."""
    if len(precomputed) != len(inputs):
        raise InvalidDatum(
            f"precomputed_forward has {len(precomputed)} outputs for {len(inputs)} datums"
        )
    shaped: list[Array] = []
    for index, (values, given) in enumerate(zip(precomputed, inputs, strict=True)):
        shape = given["target_tokens"].shape
        if values.size != given["target_tokens"].size:
            raise InvalidDatum(
                f"datum {index}: precomputed_forward has {values.size} logprobs for targets of "
                f"shape {shape}",
                index=index,
            )
        shaped.append(values.reshape(shape))
    return shaped


def combine(
    answers: Sequence[Answer], chunks: Sequence[range], lengths: Sequence[int | None] = ()
) -> PassResult:
    """Put the results of a pass's chunks together.

    Args:
        lengths: how many logprobs each datum has; None where that is not known.

    Raises:
        ProtocolError: an answer is none, has another number of datums or logprobs than was asked
            for, or holds a number that is not finite.
    """
    parts = [
        decode_result(answer, len(chunk)) for answer, chunk in zip(answers, chunks, strict=True)
    ]
    for part, chunk in zip(parts, chunks, strict=True):
        if len(part.outputs) != len(chunk):
            raise ProtocolError(
                f"the trainer answered {len(part.outputs)} outputs for {len(chunk)} datums"
            )
    outputs = [output for part in parts for output in part.outputs]
    for index, output in enumerate(outputs):
        _check_output(output, lengths[index] if lengths else None, index)
    return PassResult(
        parts[0].output_type,
        outputs,
        combine_metrics([part.metrics for part in parts], [len(chunk) for chunk in chunks]),
    )


def _check_output(output: Mapping[str, Array], length: int | None, index: int) -> None:
    for name, values in output.items():
        if name == "logprobs" and length is not None and values.size != length:
            raise ProtocolError(
                f"datum {index}: the trainer answered {values.size} logprobs for {length} targets"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ProtocolError(f"datum {index}: the trainer answered {name} that are not finite")


def _finish(
    answers: list[Answer], encoded: EncodedData, counted: bool
) -> tinker.ForwardBackwardOutput:
    """Read the result of a pass; `counted`: with its response tokens."""
    result = combine(answers, encoded.chunks, encoded.lengths)
    answers.clear()  # here, not on the loop: JSON's numbers take long to free
    if counted:
        result.metrics.setdefault("response_tokens", encoded.responses)
    return output_of(result)


def with_loss(result: PassResult, loss: LossResult) -> PassResult:
    """Add the caller's metrics to the server's, whose `loss:sum` is that of the surrogate."""
    metrics = dict(result.metrics)
    if "loss:sum" in metrics:
        metrics["surrogate_loss:sum"] = metrics["loss:sum"]
    metrics["loss:sum"] = loss.loss
    metrics.update(loss.metrics)
    return PassResult(result.output_type, result.outputs, metrics)


def output_of(result: PassResult) -> tinker.ForwardBackwardOutput:
    """Convert a result to tinker's type."""
    from tinker import ForwardBackwardOutput, TensorData

    return ForwardBackwardOutput(
        loss_fn_output_type=result.output_type,
        loss_fn_outputs=[
            {name: TensorData.from_numpy(array) for name, array in output.items()}
            for output in result.outputs
        ],
        metrics=result.metrics,
    )
