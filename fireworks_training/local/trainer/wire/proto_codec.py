"""The Tinker protobuf dialect, server side: passes to operations, results to bytes.

Knows the meaning of a decoded message; the messages themselves are in `_wire.training.protobuf`.
One route takes forward and forward_backward, told apart by a flag. Does not know HTTP or how
anything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fireworks_training._core.operations import Role
from fireworks_training._wire.training import protobuf, schema
from fireworks_training._wire.training.datums import PassResult as WireResult
from fireworks_training.errors import InvalidArgument, NotSupported, ProtocolError
from fireworks_training.local.trainer.queue.operations import (
    Answer,
    BackwardRequest,
    EncodedResult,
    Operation,
    OperationFailed,
    PassOutputs,
    Submission,
)
from fireworks_training.local.trainer.wire.counts import check_message
from fireworks_training.local.trainer.wire.datums import (
    ModelLimits,
    RawDatum,
    RawPass,
    RawTensor,
    make_pass,
)
from fireworks_training.local.trainer.wire.json_codec import JSON, OUTPUT_TYPE, decoded
from fireworks_training.local.trainer.wire.json_fields import Malformed

CONTENT_TYPE = protobuf.CONTENT_TYPE


def submission(kind: str, raw: bytes, limits_of: Callable[[str], ModelLimits]) -> Submission:
    """Decode a message: its pass, or the refusal of it, with its place in the queue.

    Args:
        kind: the route; that of `backward` takes the same message, with the gradient of each datum
            as its only loss input, and `forward_seq_id` in the settings.
        limits_of: finds the limits of a model by its id; its exceptions pass through.

    Raises:
        Malformed: the bytes are no such message, or it names no place.
    """
    check_message(raw, schema.ForwardBackwardRequest.DESCRIPTOR)
    try:
        request = protobuf.decode_request(raw)
    except (ProtocolError, NotSupported, InvalidArgument) as error:
        raise Malformed(str(error)) from error
    if request.seq_id < 1:
        raise Malformed("seq_id must be a whole number from 1")
    limits = limits_of(request.model_id)
    backward = kind != "forward" and request.kind == "forward_backward"

    def decode() -> Operation | BackwardRequest:
        if kind == "backward":
            return _backward(request)
        datums = [partial(_raw, datum) for datum in request.data]
        raw_pass = RawPass(request.loss_fn, request.loss_fn_config, datums, backward)
        return make_pass(raw_pass, limits)

    role = Role.GRADIENT if backward else Role.FORWARD
    return Submission(
        request.model_id,
        request.seq_id,
        _digest(kind, request),
        role,
        decoded(kind, decode),
        len(raw),
        PROTOBUF,
    )


def _raw(datum: protobuf.DatumArrays) -> RawDatum:
    tensors = {name: _tensor(name, array) for name, array in datum.inputs.items()}
    return RawDatum(datum.tokens.astype(np.int64), tensors)


def _backward(request: protobuf.PassRequest) -> BackwardRequest:
    forward = request.loss_fn_config.get("forward_seq_id")
    if not isinstance(forward, float) or not forward.is_integer() or forward < 1:
        raise OperationFailed("forward_seq_id must be a whole number from 1")
    if any(len(datum.inputs) != 1 for datum in request.data):
        raise OperationFailed("every datum of a backward has one loss input, its gradient")
    gradients = [_tensor(*next(iter(datum.inputs.items()))) for datum in request.data]
    return BackwardRequest(int(forward), [(g.values, g.shape) for g in gradients])


def _tensor(name: str, array: NDArray[np.generic]) -> RawTensor:
    if name != "target_tokens":
        array = array.astype(np.float32, copy=False)  # masks may come as integers
    elif array.dtype.kind != "i":
        raise OperationFailed(f"{name} must have dtype int64")
    # A copy: the message's arrays are views that can't be written to, which torch does not take.
    return RawTensor(array.reshape(-1).copy(), array.shape)


def _digest(kind: str, request: protobuf.PassRequest) -> bytes:
    """Hash the content: a map's entries come in any order."""
    digest = hashlib.blake2b(digest_size=16, person=b"protobuf pass")
    parts = (kind, request.kind, request.loss_fn, sorted(request.loss_fn_config.items()))
    digest.update(repr(parts).encode())
    for datum in request.data:
        digest.update(len(datum.tokens).to_bytes(8, "little"))
        digest.update(datum.tokens.data)
        for name, array in sorted(datum.inputs.items()):
            digest.update(repr((name, array.dtype.str, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


class ProtobufCodec:
    """Encodes results of passes as messages, and those of other operations as JSON."""

    def encode(self, result: PassOutputs | Answer) -> EncodedResult:
        """Encode a result as the body of a 200 answer."""
        if isinstance(result, Answer):
            return JSON.encode(result)
        outputs = [dict(output) for output in result.outputs]
        body = protobuf.encode_result(WireResult(OUTPUT_TYPE, outputs, dict(result.metrics)))
        return EncodedResult(body, CONTENT_TYPE)


PROTOBUF = ProtobufCodec()
