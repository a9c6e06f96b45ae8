"""Writes and reads passes in Tinker protobuf, requests and results.

Arrays go as their bytes, so nothing becomes a Python number on the way, and are copied once, into
the body of their request. It is put together from datums that were encoded before, each as a
request of nothing else: the concatenation of protobuf messages is one message with the repeated
fields of all. Both sides of the wire are here: our client encodes what our trainer decodes, and
each meets foreign counterparts.

Arrays are little-endian. Token ids are int32; loss inputs and outputs float32 or int64 (an answer
may also bring int32, widened, and bfloat16, the upper half of a float32).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from fireworks_training._wire.training import framing, schema
from fireworks_training._wire.training.datums import Encoding, PassResult
from fireworks_training._wire.training.framing import FLOAT32, INT64
from fireworks_training.errors import InvalidArgument, InvalidDatum, NotSupported, ProtocolError

Array = npt.NDArray[Any]
ConfigValue = float | str

CONTENT_TYPE = "application/x-protobuf"
INT32, BFLOAT16 = 3, 4
"""The values of the schema's DType that only answers may have."""

_WIDTH = {FLOAT32: "<f4", INT64: "<i8", INT32: "<i4", BFLOAT16: "<u2"}
BACKWARD, GRADIENTS = "backward", "gradients"
"""Loss name and loss input of `encode_backward`."""

MAX_DENSE = 1 << 26
"""Elements that the sparse tensors of a request may have, all together, once they are dense: a
shape costs its sender nothing."""


@dataclass(frozen=True, slots=True)
class DatumArrays:
    """A datum that was read, as arrays.

    Attributes:
        tokens: int32 `[T]`, the model input.
        inputs: the loss inputs by name; float32 or int64, dense, in their shapes. Read-only views
            of the request.
    """

    tokens: npt.NDArray[np.int32]
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class PassRequest:
    """A request that was read; its `seq_id` is 0 where the sender gave none."""

    kind: Literal["forward", "forward_backward"]
    model_id: str
    seq_id: int
    data: Sequence[DatumArrays]
    loss_fn: str
    loss_fn_config: Mapping[str, ConfigValue]


# -- requests ------------------------------------------------------------------------------------


def encode_datum(tokens: Sequence[int], inputs: Mapping[str, Array], index: int) -> Encoding:
    """Encode one datum, as a request that has nothing else; to be joined with others.

    Args:
        tokens: of the model input.
        inputs: arrays by name, any numeric dtype; integers go as int64, others as float32.
        index: its place in the caller's list, for messages.

    Raises:
        InvalidDatum: a token id that is no int32.
    """
    try:
        ids = framing.token_bytes(tokens)
    except struct.error as error:
        raise InvalidDatum(
            f"datum {index}: token ids must be int32: {error}", index=index
        ) from error
    return framing.datum_parts(ids, inputs)


def encode_gradient(gradient: Array) -> Encoding:
    """Encode the gradient by the logprobs of one datum; to be joined with others."""
    return encode_datum((), {GRADIENTS: gradient}, 0)


def join(datums: Iterable[Encoding]) -> bytes:
    """Put datums from `encode_datum` end to end, as the body of a request has them."""
    return b"".join([part for datum in datums for part in datum.parts])


def encode_request(
    kind: Literal["forward", "forward_backward"],
    data: bytes,
    *,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
    model_id: str,
    seq_id: int,
) -> tuple[bytes, ...]:
    """Write the body of one chunk of a pass, in pieces; `data` is from `join`.

    Raises:
        InvalidArgument: a config value that is neither a number nor text.
    """
    message = schema.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=loss_fn, forward_only=kind == "forward"
    )
    for name, value in (loss_fn_config or {}).items():
        if isinstance(value, str) and schema.TYPED_OPTIONS:
            message.loss_fn_config_v2[name].text = value
        elif isinstance(value, (int, float)):
            # Older servers know only the map of numbers.
            message.loss_fn_config[name] = float(value)
            if schema.TYPED_OPTIONS:
                message.loss_fn_config_v2[name].number = float(value)
        else:
            raise InvalidArgument(
                f"loss_fn_config[{name!r}] is a {type(value).__name__}; the protobuf dialect "
                "takes numbers and text"
            )
    return message.SerializeToString(), data


def encode_backward(
    data: bytes, *, model_id: str, seq_id: int, forward_seq_id: int
) -> tuple[bytes, ...]:
    """Write a `backward` by an earlier forward's logprobs (an extension of ours), in pieces.

    The message is that of a pass, with loss_fn "backward" and config `forward_seq_id`; datum i has
    no model input, and one loss input `gradients` in the shape of its targets: dL/dlogprob.
    """
    return encode_request(
        "forward_backward",
        data,
        loss_fn=BACKWARD,
        loss_fn_config={"forward_seq_id": forward_seq_id},
        model_id=model_id,
        seq_id=seq_id,
    )


def decode_request(body: bytes) -> PassRequest:
    """Read a request of `forward_backward`, or of `forward` (the same message with a flag).

    Raises:
        ProtocolError: the bytes are no such message, or its arrays contradict themselves.
        NotSupported: a chunk that is not text.
    """
    try:
        message = schema.ForwardBackwardRequest.FromString(body)
    except DecodeError as error:
        raise ProtocolError(f"the body is not a ForwardBackwardRequest: {error}") from error
    data: list[DatumArrays] = []
    room = MAX_DENSE
    for index, datum in enumerate(message.data):
        data.append(_decode_datum(datum, index, room))
        room -= sum(
            data[-1].inputs[name].size
            for name, tensor in datum.loss_fn_inputs.items()
            if tensor.WhichOneof("encoding") == "sparse_csr"
        )
    config: dict[str, ConfigValue] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    return PassRequest(
        kind="forward" if message.forward_only else "forward_backward",
        model_id=message.model_id,
        seq_id=message.seq_id,
        data=data,
        loss_fn=message.loss_fn,
        loss_fn_config=config,
    )


def _decode_datum(datum: schema.Datum, index: int, room: int) -> DatumArrays:
    pieces: list[bytes] = []
    for chunk in datum.model_input:
        kind = chunk.WhichOneof("chunk")
        if kind != "encoded_text":
            raise NotSupported(
                f"datum {index}: chunks of type {kind!r} are not supported; only text"
            )
        pieces.append(chunk.encoded_text.tokens)
    tokens = _numbers(b"".join(pieces), INT32, f"datum {index}: tokens").astype(
        np.int32, copy=False
    )
    inputs = {
        name: decode_tensor(tensor, f"datum {index}: {name!r}", max_dense=room)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return DatumArrays(tokens, inputs)


# -- tensors -------------------------------------------------------------------------------------


def decode_tensor(tensor: schema.Tensor, what: str, *, max_dense: int = MAX_DENSE) -> Array:
    """Read a tensor into an array, float32 or int64, dense where the tensor is sparse.

    Args:
        what: names it in messages.
        max_dense: elements that a sparse one may have once it is dense.

    Raises:
        ProtocolError: lengths, shape and indices do not fit each other.
    """
    shape = list(tensor.shape)
    if tensor.WhichOneof("encoding") == "sparse_csr":
        return _decode_sparse(tensor, shape, what, max_dense)
    values = _numbers(tensor.dense, tensor.dtype, what)
    try:
        return values.reshape(shape) if shape else values
    except ValueError as error:
        raise ProtocolError(f"{what}: {values.size} elements of shape {shape}") from error


def _decode_sparse(tensor: schema.Tensor, shape: list[int], what: str, max_dense: int) -> Array:
    csr = tensor.sparse_csr
    values = _numbers(csr.values, tensor.dtype, what)
    crow = _numbers(csr.crow_indices, INT64, f"{what}: row pointers")
    columns = _numbers(csr.col_indices, INT64, f"{what}: column indices")
    fits = (
        len(shape) == 2
        and min(shape) >= 0
        and shape[0] * shape[1] <= max_dense
        and crow.size == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == values.size == columns.size
        and bool((np.diff(crow) >= 0).all())
        and bool(((columns >= 0) & (columns < shape[1])).all())
    )
    if not fits:
        raise ProtocolError(
            f"{what}: {values.size} values, {crow.size} row pointers and {columns.size} column "
            f"indices are not a sparse tensor of shape {shape} (at most {max_dense} elements)"
        )
    dense = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(crow)), columns] = values
    return dense


def _numbers(data: bytes, dtype: int, what: str) -> Array:
    """Read the elements of an array's bytes, widened to float32 or int64."""
    width = _WIDTH.get(dtype)
    if width is None:
        raise ProtocolError(f"{what}: dtype {dtype} is none of {sorted(_WIDTH)}")
    try:
        values = np.frombuffer(data, dtype=width)
    except ValueError as error:
        raise ProtocolError(f"{what}: {len(data)} bytes are no whole elements") from error
    if dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64) if dtype == INT32 else values


# -- results -------------------------------------------------------------------------------------


def encode_result(result: PassResult) -> bytes:
    """Write a `ForwardBackwardOutput`; datums of equal fields and shapes share a record."""
    message = schema.ForwardBackwardOutput(
        loss_fn_output_type=result.output_type, metrics=result.metrics
    )
    start = 0
    layouts = [_layout(output) for output in result.outputs]
    for end in range(1, len(layouts) + 1):
        if end == len(layouts) or layouts[end] != layouts[start]:
            _add_record(message, result.outputs[start:end])
            start = end
    return message.SerializeToString()


def _layout(output: Mapping[str, Array]) -> list[tuple[str, bool, tuple[int, ...]]]:
    return [(name, a.dtype.kind in "iu", a.shape[1:]) for name, a in sorted(output.items())]


def _add_record(
    message: schema.ForwardBackwardOutput, outputs: Sequence[Mapping[str, Array]]
) -> None:
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(outputs))
    for name in outputs[0]:
        arrays = [output[name] for output in outputs]
        integral = arrays[0].dtype.kind in "iu"
        pieces = [a.astype("<i8" if integral else "<f4", copy=False).tobytes() for a in arrays]
        offsets = np.zeros(len(pieces) + 1, "<i8")
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        batched = record.fields[name]
        batched.data = b"".join(pieces)
        batched.offsets = offsets.tobytes()
        batched.dtype = cast("Any", INT64 if integral else FLOAT32)
        batched.trailing_shape.extend(arrays[0].shape[1:])


def decode_result(body: bytes, most: int | None = None) -> PassResult:
    """Read the answer of a pass; its arrays are views of one copy for each field and record.

    Args:
        most: datums that were asked for; an answer that claims more is none. None: any number.

    Raises:
        ProtocolError: the bytes are no `ForwardBackwardOutput`, or contradict themselves.
    """
    try:
        message = schema.ForwardBackwardOutput.FromString(body)
    except DecodeError as error:
        raise ProtocolError(f"the answer is not a ForwardBackwardOutput: {error}") from error
    outputs: list[dict[str, Array]] = []
    for record in message.loss_fn_outputs:
        fields = {name: _split(batched, name) for name, batched in record.fields.items()}
        # Senders of before `num_datums` leave it 0.
        count = record.num_datums or max((len(arrays) for arrays in fields.values()), default=0)
        if any(len(arrays) != count for arrays in fields.values()):
            raise ProtocolError(f"a field of the answer does not have {count} datums")
        # A record without fields has nothing but its word for its count.
        if most is not None and len(outputs) + count > most:
            raise ProtocolError(f"the trainer answered more outputs than the {most} datums sent")
        outputs += [{name: arrays[i] for name, arrays in fields.items()} for i in range(count)]
    kind = message.loss_fn_output_type.rpartition(":")[2] or "ArrayRecord"
    return PassResult(kind, outputs, dict(message.metrics))


def _split(batched: schema.BatchedTensor, name: str) -> list[Array]:
    """Split a field that holds the arrays of all datums end to end."""
    what = f"field {name!r} of the answer"
    # A copy, since callers own what they are given, and bytes are read-only.
    values = np.array(_numbers(batched.data, batched.dtype, what))
    trailing = tuple(batched.trailing_shape)
    offsets = _numbers(batched.offsets, INT64, f"{what}: offsets")
    ends, rest = np.divmod(offsets, np.dtype(_WIDTH[batched.dtype]).itemsize)
    fits = offsets.size and ends[0] == 0 and ends[-1] == values.size and not rest.any()
    if not fits or bool((np.diff(ends) < 0).any()):
        raise ProtocolError(f"{what}: its offsets do not tile its {values.size} elements")
    bounds = ends.tolist()
    try:
        return [
            values[start:end].reshape(-1, *trailing) if trailing else values[start:end]
            for start, end in pairwise(bounds)
        ]
    except ValueError as error:
        raise ProtocolError(f"{what}: rows of shape {list(trailing)} do not tile it") from error
