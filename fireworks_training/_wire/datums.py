"""Datums in Fireworks JSON: encoded one by one, and what comes back for them decoded.

A datum is encoded once, by itself, so that requests can be cut by their true size and a retry sends
the same bytes. Numbers go from numpy to text and back without becoming Python objects one by one.
What is checked here is what a server can't explain as well: lengths, NaN, kinds of chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import orjson

from fireworks_training._wire.training import EncodedDatum
from fireworks_training.errors import InvalidDatum, NotSupported, ProtocolError

Array = npt.NDArray[Any]
_NUMPY = orjson.OPT_SERIALIZE_NUMPY


class TensorLike(Protocol):
    """What this module needs of `tinker.TensorData`."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> list[int] | None: ...

    @property
    def sparse_crow_indices(self) -> list[int] | None: ...

    @property
    def sparse_col_indices(self) -> list[int] | None: ...

    def to_numpy(self) -> Array: ...


class DatumLike(Protocol):
    """What this module needs of `tinker.Datum`."""

    @property
    def model_input(self) -> Any: ...

    @property
    def loss_fn_inputs(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class PassResult:
    """The answer of one pass: per-datum arrays and metrics."""

    output_type: str
    outputs: list[dict[str, Array]]
    metrics: dict[str, float]


def input_tokens(datum: DatumLike, index: int) -> list[int]:
    """The token ids of a datum's model input.

    Raises:
        NotSupported: it has chunks that are not text.
        InvalidDatum: it is empty.
    """
    tokens: list[int] = []
    for chunk in datum.model_input.chunks:
        kind = getattr(chunk, "type", type(chunk).__name__)
        if kind != "encoded_text":
            raise NotSupported(
                f"datum {index}: chunks of type {kind!r} are not supported; only text"
            )
        tokens.extend(chunk.tokens)
    if not tokens:
        raise InvalidDatum(f"datum {index} has no input tokens", index=index)
    return tokens


def encode_datum(
    datum: DatumLike, index: int, *, replace: Mapping[str, Array] | None = None
) -> EncodedDatum:
    """Check one datum and encode it.

    Args:
        datum: a `tinker.Datum`; each loss input has as many rows as the model input has tokens.
        index: its place in the caller's list, for messages.
        replace: loss inputs to send instead of the datum's own (all of them).

    Raises:
        InvalidDatum: lengths that differ, or values that are not finite.
        NotSupported: something other than text.
    """
    tokens = input_tokens(datum, index)
    arrays = replace
    if arrays is None:
        arrays = {name: tensor_array(t) for name, t in datum.loss_fn_inputs.items()}
    inputs: dict[str, object] = {}
    for name, array in arrays.items():
        _check(name, array, len(tokens), index)
        inputs[name] = {
            "data": np.ascontiguousarray(array).reshape(-1),
            "dtype": "int64" if array.dtype.kind in "iu" else "float32",
            "shape": list(array.shape),
        }
    text = orjson.dumps(
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
            "loss_fn_inputs": inputs,
        },
        option=_NUMPY,
    )
    weights = arrays.get("weights")
    counted = len(tokens) if weights is None else int(np.count_nonzero(weights))
    return EncodedDatum(text, counted)


def tensor_array(tensor: TensorLike) -> Array:
    """The dense array of a `tinker.TensorData`, in its shape, as int64 or float32."""
    dtype = np.int64 if tensor.dtype == "int64" else np.float32
    if tensor.sparse_crow_indices is None:
        return tensor.to_numpy().astype(dtype, copy=False)
    rows, columns = cast(list[int], tensor.shape)
    dense = np.zeros((rows, columns), dtype=dtype)
    crow = np.asarray(tensor.sparse_crow_indices)
    row_of = np.repeat(np.arange(rows), np.diff(crow))
    dense[row_of, np.asarray(tensor.sparse_col_indices)] = tensor.to_numpy().reshape(-1)
    return dense


def _check(name: str, array: Array, length: int, index: int) -> None:
    if array.ndim == 0 or array.shape[0] != length:
        rows = "a single number" if array.ndim == 0 else f"{array.shape[0]} entries"
        raise InvalidDatum(
            f"datum {index}: {name!r} has {rows}, but model_input has {length} tokens. Entry t of "
            "each loss input belongs to predicting target t from the inputs up to t, so the "
            "lengths are equal (see data.py for builders that shift by one).",
            index=index,
        )
    if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        at = int(np.argwhere(~np.isfinite(array))[0][0])
        raise InvalidDatum(
            f"datum {index}: {name!r} is {array.reshape(length, -1)[at][0]} at position {at}; "
            "every value must be finite",
            index=index,
        )


def decode_pass(payload: Mapping[str, Any]) -> PassResult:
    """The answer of a pass.

    Raises:
        ProtocolError: it is not one.
    """
    try:
        outputs = [
            {name: _array(value) for name, value in record.items()}
            for record in payload["loss_fn_outputs"]
        ]
        metrics = {str(name): float(value) for name, value in payload["metrics"].items()}
        return PassResult(str(payload["loss_fn_output_type"]), outputs, metrics)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(
            f"the trainer's answer to a pass is not a ForwardBackwardOutput: {error!r}"
        ) from error


def _array(value: Mapping[str, Any]) -> Array:
    dtype = np.int64 if value["dtype"] == "int64" else np.float32
    array = np.asarray(value["data"], dtype=dtype)
    shape = value.get("shape")
    return array if shape is None else array.reshape(shape)
