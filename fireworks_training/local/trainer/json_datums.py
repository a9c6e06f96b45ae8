"""Datums in JSON: tokens and tensors, checked against the model and the loss.

Knows: shapes, dtypes, lengths, the vocabulary. Does not know requests. A refusal says what is wrong
with which field, and never quotes tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fireworks_training.local.losses import Loss
from fireworks_training.local.trainer.json_fields import allow
from fireworks_training.local.trainer.operations import Datum, OperationFailed


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a datum has to fit.

    Attributes:
        vocab_size: token ids run from 0 to one less.
        context_length: tokens that a sequence may have.
        lora: whether the model trains an adapter.
    """

    vocab_size: int
    context_length: int
    lora: bool


def _tokens(model_input: object, limits: ModelLimits) -> NDArray[np.int64]:
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
    ids = _integers(tokens, "tokens")
    if not 1 <= len(ids) <= limits.context_length:
        raise OperationFailed(
            f"it has {len(ids)} tokens; this trainer takes 1 to {limits.context_length}"
        )
    _check_vocabulary(ids, "tokens", limits)
    return ids


def _check_vocabulary(ids: NDArray[np.int64], name: str, limits: ModelLimits) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= limits.vocab_size:
        raise OperationFailed(
            f"{name} has ids outside the model's vocabulary of {limits.vocab_size}: tokenize with"
            " service.get_tokenizer()"
        )


def _integers(values: list[object], name: str) -> NDArray[np.int64]:
    array = _array(values, name)
    if array.size and array.dtype.kind != "i":
        raise OperationFailed(f"{name} must hold integers")
    return array.astype(np.int64, copy=False)


def _array(values: list[object], name: str) -> NDArray[np.generic]:
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise OperationFailed(f"{name} must be a flat list of numbers") from error
    if array.ndim != 1 or array.dtype.kind not in "if":
        hint = "; null stands for NaN in JSON" if None in values else ""
        raise OperationFailed(f"{name} must be a flat list of finite numbers{hint}")
    return array


def _tensor(value: object, name: str, length: int) -> NDArray[np.generic]:
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise OperationFailed(f"{name} must be a tensor with data, dtype and shape")
    allowed = ("data", "dtype", "shape")
    allow(value, allowed, f"{name} (a dense tensor)")
    data: list[object] = value["data"]
    shape = value.get("shape")
    if len(data) != length or (shape is not None and shape != [length]):
        raise OperationFailed(
            f"{name} has {len(data)} entries of shape {shape}; it must have one for each of the"
            f" {length} tokens"
        )
    integral = name == "target_tokens"
    if value.get("dtype") != ("int64" if integral else "float32"):
        raise OperationFailed(f"{name} must have dtype {'int64' if integral else 'float32'}")
    if integral:
        return _integers(data, name)
    with np.errstate(over="ignore"):
        array = _array(data, name).astype(np.float32)
    if not np.isfinite(array).all():
        raise OperationFailed(f"{name} has entries that are not finite numbers")
    return array


def decode_datum(value: object, loss: Loss, loss_name: str, limits: ModelLimits) -> Datum:
    if not isinstance(value, dict) or not isinstance(value.get("loss_fn_inputs"), dict):
        raise OperationFailed("it must have model_input and loss_fn_inputs")
    allow(value, ("model_input", "loss_fn_inputs"), "a datum")
    tokens = _tokens(value.get("model_input"), limits)
    given: dict[str, object] = value["loss_fn_inputs"]
    allow(given, loss.inputs, f"loss {loss_name!r}")
    missing = [name for name in ("target_tokens", *loss.required) if given.get(name) is None]
    if missing:
        raise OperationFailed(f"loss {loss_name!r} needs loss_fn_inputs {', '.join(missing)}")
    inputs = {
        name: _tensor(tensor, name, len(tokens))
        for name, tensor in given.items()
        if tensor is not None
    }
    _check_vocabulary(cast("NDArray[np.int64]", inputs["target_tokens"]), "target_tokens", limits)
    inputs.setdefault("weights", np.ones(len(tokens), np.float32))
    return Datum(tokens, inputs)
