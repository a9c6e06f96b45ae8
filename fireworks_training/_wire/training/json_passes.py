"""Writes passes in Fireworks JSON, and reads their results into arrays.

A datum is encoded once, by itself, so that requests can be cut by their true size and a retry sends
the same bytes. Arrays go to text without becoming Python numbers one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from fireworks_training._wire.training.bodies import PassKind
from fireworks_training._wire.training.datums import Array, Encoding, PassResult
from fireworks_training.errors import InvalidDatum, ProtocolError

_I8, _F4 = np.dtype(np.int64), np.dtype(np.float32)
_BITS = (0.0, 1.0)
_MASK = np.frombuffer(b"0.0,1.0,", "S4")
_MASK_LENGTH = 256
"""Shorter masks are formatted faster than they are looked up."""


def encode_tensor(array: Array) -> dict[str, object]:
    """Convert a tensor for `orjson.dumps` with `OPT_SERIALIZE_NUMPY`."""
    wanted, name = (_I8, "int64") if array.dtype.kind in "iu" else (_F4, "float32")
    data = array if array.dtype == wanted else array.astype(wanted)
    if not data.flags.c_contiguous or data.ndim != 1:
        data = np.ascontiguousarray(data).reshape(-1)
    text = _mask(data) if wanted is _F4 else None
    return {"data": data if text is None else text, "dtype": name, "shape": array.shape}


def _mask(data: Array) -> orjson.Fragment | None:
    """Look up the text of an array of zeros and ones, as most weights are."""
    # The ends first: advantages and logprobs begin with zeros, too.
    if data.size < _MASK_LENGTH or data[0] not in _BITS or data[-1] not in _BITS:
        return None
    if not ((data == 0) | (data == 1)).all():
        return None
    return orjson.Fragment(b"[%b]" % _MASK[data.astype(np.intp)].tobytes()[:-1])


def encode_datum(tokens: Sequence[int], inputs: Mapping[str, Array], index: int) -> Encoding:
    """Encode one datum; to be joined with others.

    Args:
        tokens: of the model input.
        inputs: arrays by name, any numeric dtype; integers go as int64, others as float32.
        index: its place in the caller's list, for messages.

    Raises:
        InvalidDatum: a token id that is no integer.
    """
    try:
        text = orjson.dumps(
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
                "loss_fn_inputs": {name: encode_tensor(array) for name, array in inputs.items()},
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
    except TypeError as error:
        raise InvalidDatum(f"datum {index} can't be sent: {error}", index=index) from error
    return Encoding(len(text), (text,))


def encode_gradient(gradient: Array) -> Encoding:
    """Encode the gradient by the logprobs of one datum; to be joined with others."""
    text = orjson.dumps(encode_tensor(gradient), option=orjson.OPT_SERIALIZE_NUMPY)
    return Encoding(len(text), (text,))


def join(datums: Iterable[Encoding]) -> bytes:
    """Join datums or gradients for the body of a request."""
    return b",".join([part for datum in datums for part in datum.parts])


def encode_request(
    kind: PassKind,
    data: bytes,
    *,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
    model_id: str,
    seq_id: int,
    comms: str,
) -> tuple[bytes, ...]:
    """Write the body of one chunk of a pass, in pieces; `data` is from `join`."""
    config = b"" if loss_fn_config is None else b',"loss_fn_config":' + orjson.dumps(loss_fn_config)
    marker = b',"comms":"v2"' if comms == "v2" else b""
    field = b"forward_input" if kind == "forward" else b"forward_backward_input"
    name, model = orjson.dumps(loss_fn), orjson.dumps(model_id)
    return (
        b'{"%b":{"data":[' % field,
        data,
        b'],"loss_fn":%b%b},"model_id":%b,"seq_id":%d%b}' % (name, config, model, seq_id, marker),
    )


def encode_backward(
    data: bytes, *, model_id: str, seq_id: int, forward_seq_id: int
) -> tuple[bytes, ...]:
    """Write a `backward` by an earlier forward's logprobs, in pieces; `data` is from `join`."""
    model = orjson.dumps(model_id)
    return (
        b'{"gradients":[',
        data,
        b'],"forward_seq_id":%d,"model_id":%b,"seq_id":%d}' % (forward_seq_id, model, seq_id),
    )


def decode_result(payload: Mapping[str, Any]) -> PassResult:
    """Read the answer of a pass.

    Raises:
        ProtocolError: it is not such an answer.
    """
    try:
        outputs = [
            {name: _array(value) for name, value in record.items()}
            for record in payload["loss_fn_outputs"]
        ]
        metrics = {str(name): float(value) for name, value in payload["metrics"].items()}
        return PassResult(str(payload["loss_fn_output_type"]), outputs, metrics)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ProtocolError(
            f"the trainer's answer to a pass is not a ForwardBackwardOutput: {error!r}"
        ) from error


def _array(value: Mapping[str, Any]) -> Array:
    dtype = np.int64 if value["dtype"] == "int64" else np.float32
    array = np.asarray(value["data"], dtype=dtype)
    shape = value.get("shape")
    return array if shape is None else array.reshape(shape)
