"""Datums in JSON: decodes lists of numbers to arrays.

Knows the JSON shapes of chunks and tensors, dense and sparse. Does not know requests, nor which
values fit a model or a loss (`datums` does).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fireworks_training.local.trainer.queue.operations import OperationFailed
from fireworks_training.local.trainer.wire.datums import RawDatum, RawTensor, dense_from_csr
from fireworks_training.local.trainer.wire.json_fields import allow

_SPARSE = ("sparse_crow_indices", "sparse_col_indices")


def decode_datum(value: object) -> RawDatum:
    """Decode a datum's arrays.

    Raises:
        OperationFailed: it does not have the form of a datum.
    """
    if not isinstance(value, dict) or not isinstance(value.get("loss_fn_inputs"), dict):
        raise OperationFailed("it must have model_input and loss_fn_inputs")
    allow(value, ("model_input", "loss_fn_inputs"), "a datum")
    given: dict[str, object] = value["loss_fn_inputs"]
    tensors = {
        name: decode_tensor(tensor, name) for name, tensor in given.items() if tensor is not None
    }
    return RawDatum(_tokens(value.get("model_input")), tensors)


def _tokens(model_input: object) -> NDArray[np.int64]:
    if not isinstance(model_input, dict) or not isinstance(model_input.get("chunks"), list):
        raise OperationFailed("model_input must be an object with chunks")
    allow(model_input, ("chunks",), "model_input")
    tokens: list[object] = []
    for chunk in model_input["chunks"]:
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            raise OperationFailed(
                "this trainer takes text only: every chunk must be of type encoded_text"
            )
        if not isinstance(chunk.get("tokens"), list):
            raise OperationFailed("an encoded_text chunk must have a list of tokens")
        tokens += chunk["tokens"]
    return _integers(tokens, "tokens")


def _integers(values: object, name: str) -> NDArray[np.int64]:
    array = _array(values, name)
    if array.size and array.dtype.kind != "i":
        raise OperationFailed(f"{name} must hold integers")
    return array.astype(np.int64, copy=False)


def _array(values: object, name: str) -> NDArray[np.generic]:
    if not isinstance(values, list):
        raise OperationFailed(f"{name} must be a flat list of numbers")
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise OperationFailed(f"{name} must be a flat list of numbers") from error
    if array.ndim != 1 or array.dtype.kind not in "if":
        hint = "; null stands for NaN in JSON" if None in values else ""
        raise OperationFailed(f"{name} must be a flat list of finite numbers{hint}")
    return array


def decode_tensor(value: object, name: str) -> RawTensor:
    """Decode a tensor: int64 for target_tokens; float32, or int64 made so, for any other name.

    Raises:
        OperationFailed: it does not have the form of a tensor.
    """
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise OperationFailed(f"{name} must be a tensor with data, dtype and shape")
    allow(value, ("data", "dtype", "shape", *_SPARSE), f"{name} (a tensor)")
    shape = _shape(value.get("shape"), name)
    dtype = value.get("dtype")
    allowed = ("int64",) if name == "target_tokens" else ("float32", "int64")
    if dtype not in allowed:
        raise OperationFailed(f"{name} must have dtype {' or '.join(allowed)}")
    with np.errstate(over="ignore"):
        numbers = _integers if dtype == "int64" else _array
        data = numbers(value["data"], name)
        if name != "target_tokens":
            data = data.astype(np.float32)
    crow, columns = (value.get(key) for key in _SPARSE)
    if crow is None and columns is None:
        return RawTensor(data, shape)
    return dense_from_csr(
        data, _integers(crow, _SPARSE[0]), _integers(columns, _SPARSE[1]), shape or (), name
    )


def _shape(value: object, name: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 31
        for size in value
    ):
        raise OperationFailed(f"the shape of {name} must be a list of sizes")
    return tuple(value)
