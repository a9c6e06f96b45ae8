"""The Fireworks JSON dialect, server side: request bodies to operations, results to bodies.

Knows field names and which of them are allowed. Does not know HTTP, the queue, or how anything is
computed. `proto_codec` does the same for passes in the other dialect, whose failures and other
operations are JSON too.

Wrong content is refused here, before an operation is queued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import cast

import numpy as np
import orjson
from numpy.typing import NDArray

from fireworks_training._core.operations import Role
from fireworks_training.local.model.optimizer import NORMALIZATIONS, AdamSettings
from fireworks_training.local.trainer.queue.line import Failure
from fireworks_training.local.trainer.queue.operations import (
    Answer,
    BackwardRequest,
    DiscardGradients,
    EncodedResult,
    Operation,
    OperationFailed,
    OptimStep,
    PassOutputs,
    Submission,
)
from fireworks_training.local.trainer.wire import json_states
from fireworks_training.local.trainer.wire.counts import check_json
from fireworks_training.local.trainer.wire.datums import ModelLimits, RawPass, make_pass
from fireworks_training.local.trainer.wire.json_datums import decode_datum, decode_tensor
from fireworks_training.local.trainer.wire.json_fields import (
    Body,
    Malformed,
    allow,
    identifier,
    number,
    parse,
    text,
    whole,
)


def _pass(body: Body, limits: ModelLimits, *, backward: bool) -> Operation:
    key = "forward_backward_input" if backward else "forward_input"
    inner = body.get(key)
    if not isinstance(inner, dict):
        raise OperationFailed(f"{key} must be an object with data and loss_fn")
    allow(body, ("model_id", "seq_id", "comms", "type", key), "the request")
    allow(inner, ("data", "loss_fn", "loss_fn_config"), key)
    config = inner.get("loss_fn_config") or {}
    if not isinstance(config, dict):
        raise OperationFailed("loss_fn_config must be an object")
    data = inner.get("data")
    datums = [partial(decode_datum, value) for value in data] if isinstance(data, list) else []
    return make_pass(RawPass(text(inner, "loss_fn"), config, datums, backward), limits)


def _backward(body: Body, limits: ModelLimits) -> BackwardRequest:
    del limits
    allow(body, ("model_id", "seq_id", "type", "forward_seq_id", "gradients"), "backward")
    gradients = body.get("gradients")
    if not isinstance(gradients, list):
        raise OperationFailed("gradients must be a list of tensors, one a datum of the forward")
    tensors = [decode_tensor(value, f"gradients[{i}]") for i, value in enumerate(gradients)]
    return BackwardRequest(
        whole(body, "forward_seq_id", least=1),
        [(tensor.values, tensor.shape) for tensor in tensors],
    )


def _adam(body: Body) -> AdamSettings:
    allow(body, ("type", "emit_grad_norm_metrics", *_ADAM_DEFAULTS), "adam_params")
    values = {key: number(body, key, default) for key, default in _ADAM_DEFAULTS.items()}
    for key, value in values.items():
        low, high = _ADAM_RANGES[key]
        if not low <= value <= high:
            raise OperationFailed(f"{key} is {value}; it must be from {low} to {high}")
    if values["beta1"] == 1 or values["beta2"] == 1:
        raise OperationFailed("beta1 and beta2 must be below 1")
    if body.get("emit_grad_norm_metrics") not in (None, "off", "basic", False):
        raise OperationFailed(
            "emit_grad_norm_metrics takes off or basic here: detailed is not yet supported;"
            " grad_norm is always reported"
        )
    return AdamSettings(**values)


# Within these a step can't overflow on its way, which would leave it half done; and an eps that is
# 0 in fp32 would turn a weight without gradient into NaN.
_ADAM_RANGES = {
    "learning_rate": (0.0, 1e6),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "eps": (1e-30, 1e6),
    "weight_decay": (0.0, 1e6),
    "grad_clip_norm": (0.0, 1e30),
}
_ADAM_DEFAULTS = {f.name: cast(float, f.default) for f in fields(AdamSettings)}


def _optim_step(body: Body, limits: ModelLimits) -> Operation:
    del limits
    key = "grad_accumulation_normalization"
    allow(body, ("model_id", "seq_id", "type", "adam_params", key), "optim_step")
    adam = body.get("adam_params")
    if not isinstance(adam, dict):
        raise OperationFailed("adam_params must be an object; only AdamW is supported")
    wanted = body.get(key) or "none"
    for normalization in NORMALIZATIONS:
        if normalization == wanted:
            return OptimStep(_adam(adam), normalization)
    raise OperationFailed(f"{key} must be one of {', '.join(NORMALIZATIONS)}")


def _discard_gradients(body: Body, limits: ModelLimits) -> Operation:
    del limits
    allow(body, ("model_id", "seq_id", "type"), "discard_gradients")
    return DiscardGradients()


_DECODERS: Mapping[str, tuple[Role, Callable[[Body, ModelLimits], Operation | BackwardRequest]]] = {
    "forward": (Role.FORWARD, partial(_pass, backward=False)),
    "forward_backward": (Role.GRADIENT, partial(_pass, backward=True)),
    "backward": (Role.GRADIENT, _backward),
    "optim_step": (Role.OPTIM, _optim_step),
    "save_weights": (Role.SAVE, json_states.save_weights),
    "load_weights": (Role.LOAD, json_states.load_weights),
    "load_adapter": (Role.LOAD, json_states.load_adapter),
    "save_weights_for_sampler": (Role.SAVE, json_states.save_weights_for_sampler),
    "discard_gradients": (Role.DISCARD, _discard_gradients),
}
KINDS = tuple(_DECODERS)
OUTPUT_TYPE = "ArrayRecord"


def submission(kind: str, raw: bytes, limits_of: Callable[[str], ModelLimits]) -> Submission:
    """Decode a request: its operation, or the refusal of it, with its place in the queue.

    Args:
        kind: one of KINDS.
        limits_of: finds the limits of a model by its id; its exceptions pass through.

    Raises:
        Malformed: it names no model or no place.
    """
    check_json(raw)
    body = parse(raw)
    model_id = identifier(body, "model_id")
    seq_id = whole(body, "seq_id", least=1, refusal=Malformed)
    limits = limits_of(model_id)
    role, decode = _DECODERS[kind]
    operation = decoded(kind, lambda: decode(body, limits))
    digest = digest_of(kind, body)
    return Submission(model_id, seq_id, digest, role, operation, len(raw), JSON)


def decoded(
    kind: str, decode: Callable[[], Operation | BackwardRequest]
) -> Operation | BackwardRequest | OperationFailed:
    """Decode an operation; a refusal is returned, to take the operation's place in the queue."""
    try:
        return decode()
    except OperationFailed as refusal:
        if kind == "backward":
            raise  # takes no place: the client sends the whole pass under the same seq_id
        return refusal.with_traceback(None)


def digest_of(kind: str, body: Body) -> bytes:
    """Hash a request's content, whatever the order of its keys."""
    try:
        canonical = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
    except (
        orjson.JSONEncodeError
    ):  # a whole number beyond 64 bits: refused, with a digest of its own
        canonical = json.dumps(body, sort_keys=True).encode()
    return hashlib.blake2b(canonical, digest_size=16, person=kind[:16].encode()).digest()


# -- results -------------------------------------------------------------------------------------


class JsonCodec:
    """Encodes results as JSON objects."""

    def encode(self, result: PassOutputs | Answer) -> EncodedResult:
        """Encode a result as the body of a 200 answer."""
        if isinstance(result, Answer):
            return EncodedResult(orjson.dumps(result.fields))
        outputs = [
            {name: _tensor(array) for name, array in output.items()} for output in result.outputs
        ]
        body = {
            "loss_fn_output_type": OUTPUT_TYPE,
            "loss_fn_outputs": outputs,
            "metrics": result.metrics,
        }
        return EncodedResult(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY))


JSON = JsonCodec()


def _tensor(array: NDArray[np.generic]) -> dict[str, object]:
    return {
        "data": array.reshape(-1),
        "dtype": "int64" if array.dtype.kind == "i" else "float32",
        "shape": array.shape,
    }


def encode_failure(failure: Failure, request_id: str) -> EncodedResult:
    """Encode a failure as the body of a 200 answer; a retry of the poll gets the same."""
    body: dict[str, object] = {
        "error": failure.message,
        "category": failure.category,
        "error_class": failure.error_class,
        "request_id": request_id,
    }
    if failure.cause is not None:
        body["cause"] = {
            "error": failure.cause.message,
            "category": failure.cause.category,
            "error_class": failure.cause.error_class,
            "seq_id": failure.cause_seq_id,
        }
    return EncodedResult(orjson.dumps(body))
