"""The JSON requests of the trainer's data plane, all but the passes, and how answers are read.

The whole protocol of sessions, models, saves and steps is written here; passes over datums are in
`json_passes` and `protobuf`, batch polls in `batch_polls`. Knows nothing of connections, retries or
the order of operations, and does without numpy, so that a service is made without loading it.

Each function writes the body of the request that its docstring names. That of an operation is
written before its turn, and gets its `seq_id` when it is sent (`with_seq_id`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import orjson

from fireworks_training.errors import ProtocolError
from fireworks_training.models import Snapshot, SnapshotKind

PassKind = Literal["forward", "forward_backward"]


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request as it goes out over HTTP: its path, its body, whole or in pieces, and headers."""

    path: str
    body: bytes | tuple[bytes, ...]
    headers: Mapping[str, str] | None = None


PROTOCOL_VERSION = "0.23.0"
"""Version of the trainer's protocol that is spoken, which servers compare with the oldest one they
take. The SDK's own version is in the User-Agent."""


# -- sessions and models ---------------------------------------------------------------------------


def client_config() -> dict[str, Any]:
    """Ask how a trainer wants its requests."""
    return {"sdk_version": PROTOCOL_VERSION}


def create_session(tags: Sequence[str], user_metadata: Mapping[str, str]) -> dict[str, Any]:
    """Open a session."""
    return {
        "tags": tags,
        "user_metadata": dict(user_metadata),
        "sdk_version": PROTOCOL_VERSION,
        "type": "create_session",
    }


def heartbeat(session_id: str) -> bytes:
    """Keep a session alive."""
    return orjson.dumps({"session_id": session_id, "type": "session_heartbeat"})


def create_model(
    session_id: str,
    base_model: str,
    lora_config: Mapping[str, Any] | None,
    *,
    base_only: bool = False,
    user_metadata: Mapping[str, str] | None = None,
) -> bytes:
    """Make a model; its number is still missing, so that equal bytes ask for equal models.

    Args:
        lora_config: of the adapter: its rank, which layers it has, its seed; None for `base_only`.
        base_only: the base model without an adapter.
        user_metadata: noted with the model.
    """
    return orjson.dumps(
        {
            "session_id": session_id,
            "base_model": base_model,
            **({"lora_config": lora_config} if lora_config is not None else {}),
            **({"base_only": True} if base_only else {}),
            **({"user_metadata": dict(user_metadata)} if user_metadata else {}),
            "type": "create_model",
        }
    )


def with_model_seq_id(body: bytes, model_seq_id: int) -> bytes:
    """Add the model's number in its session to the body of `create_model`."""
    return b'%b,"model_seq_id":%d}' % (body[:-1], model_seq_id)


def get_info(model_id: str) -> dict[str, Any]:
    """Ask for the facts of a model."""
    return {"model_id": model_id, "type": "get_info"}


def retrieve_future(request_id: str) -> bytes:
    """Poll for the result of one request."""
    return orjson.dumps({"request_id": request_id, "allow_metadata_only": False})


# -- operations ------------------------------------------------------------------------------------


def with_seq_id(path: str, body: bytes, seq_id: int) -> WireRequest:
    """Make the request of an operation that has its place in the model's line."""
    return WireRequest(path, b'%b,"seq_id":%d}' % (body[:-1], seq_id))


def _operation(kind: str, model_id: str, **fields: object) -> bytes:
    """Write the body of an operation, but for its `seq_id`; fields that are None are left out."""
    given = {name: value for name, value in fields.items() if value is not None}
    return orjson.dumps({**given, "type": kind, "model_id": model_id})


def optim_step(model_id: str, adam_params: Mapping[str, Any], normalization: str | None) -> bytes:
    """Apply the gradients held, divided as `normalization` says."""
    return _operation(
        "optim_step",
        model_id,
        adam_params=adam_params,
        grad_accumulation_normalization=normalization,
    )


def save_weights(model_id: str, name: str, *, overwrite: bool, ttl_seconds: int | None) -> bytes:
    """Save weights and optimizer; a time to live is sent only if there is one."""
    return _operation(
        "save_weights", model_id, path=name, overwrite=overwrite, ttl_seconds=ttl_seconds
    )


def load_weights(model_id: str, path: str, *, optimizer: bool, access_token: str | None) -> bytes:
    """Load a saved state, with its optimizer or without."""
    return _operation(
        "load_weights",
        model_id,
        path=path,
        optimizer=optimizer,
        weights_access_token=access_token,
    )


def load_adapter(model_id: str, adapter_path: str) -> bytes:
    """Load the weights of an adapter."""
    return orjson.dumps({"adapter_path": adapter_path, "model_id": model_id})


def save_weights_for_sampler(
    model_id: str,
    path: str,
    *,
    checkpoint_type: str | None,
    export_precision: str | None,
    ttl_seconds: int | None = None,
) -> bytes:
    """Save a snapshot that a deployment can load; Tinker servers know no checkpoint types."""
    return _operation(
        "save_weights_for_sampler",
        model_id,
        path=path,
        export_precision=export_precision,
        checkpoint_type=checkpoint_type,
        ttl_seconds=ttl_seconds,
    )


def unload_model(model_id: str) -> bytes:
    """Free the trainer's memory; to a Tinker server it is no operation, and takes no `seq_id`."""
    return _operation("unload_model", model_id)


def discard_gradients(model_id: str, seq_id: int) -> WireRequest:
    """Drop the gradients of a failed step, in the place of its `optim_step`."""
    body = {"model_id": model_id, "seq_id": seq_id}
    return WireRequest("discard_gradients", orjson.dumps(body))


def failing_pass(model_id: str, seq_id: int) -> WireRequest:
    """Make a pass without datums: a trainer that enforces steps takes it as failed."""
    nothing = {"data": (), "loss_fn": "cross_entropy"}
    body = {"model_id": model_id, "seq_id": seq_id, "forward_backward_input": nothing}
    return WireRequest("forward_backward", orjson.dumps(body))


# -- answers ---------------------------------------------------------------------------------------


def decode_snapshot(payload: Mapping[str, Any]) -> Snapshot:
    """Read the answer of a sampler save; servers that name only a path give an identity alone.

    Raises:
        ProtocolError: there is no path.
    """
    path = payload.get("path")
    if not isinstance(path, str) or not path:
        raise ProtocolError("the trainer saved sampler weights but named no path")
    written = payload.get("snapshot")
    if not isinstance(written, Mapping):
        return Snapshot(path)
    fields = cast(Mapping[str, Any], written)
    return Snapshot(
        identity=str(fields.get("identity", path)),
        kind=cast("SnapshotKind | None", fields.get("kind")),
        predecessor=fields.get("predecessor"),
        bytes=fields.get("bytes"),
        sha256=fields.get("sha256"),
        timings=fields.get("timings"),
    )
