"""Requests and answers of the trainer data plane in Fireworks JSON, but for the datums in them.

A request's body is put together once its id is known, from parts that were encoded before. Nothing
here knows of connections, retries or the order of operations; nothing here needs numpy, so that a
service is built without loading it. Datums are in `_wire.datums`.

A second dialect has the same shapes: `encode_datum`, `pass_body`, `decode_pass`.
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
class EncodedDatum:
    """One datum as JSON text, and what the caller needs to know of it."""

    text: bytes
    loss_tokens: int


def pass_body(
    kind: PassKind,
    datums: Sequence[EncodedDatum],
    *,
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
    model_id: str,
    seq_id: int,
    comms: str,
) -> bytes:
    """The request of one chunk of `forward` or `forward_backward`."""
    config = b"" if loss_fn_config is None else b',"loss_fn_config":' + orjson.dumps(loss_fn_config)
    marker = b',"comms":"v2"' if comms == "v2" else b""
    return b"".join(
        (
            b'{"',
            b"forward_input" if kind == "forward" else b"forward_backward_input",
            b'":{"data":[',
            b",".join(datum.text for datum in datums),
            b'],"loss_fn":',
            orjson.dumps(loss_fn),
            config,
            b'},"model_id":',
            orjson.dumps(model_id),
            b',"seq_id":',
            str(seq_id).encode(),
            marker,
            b"}",
        )
    )


def filler_body(model_id: str, seq_id: int) -> bytes:
    """A forward that changes nothing: fills the place of a refused request in the server's line."""
    one = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": [0]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [0], "dtype": "int64", "shape": [1]},
            "weights": {"data": [0.0], "dtype": "float32", "shape": [1]},
        },
    }
    return orjson.dumps(
        {
            "forward_input": {"data": [one], "loss_fn": "cross_entropy"},
            "model_id": model_id,
            "seq_id": seq_id,
        }
    )


def decode_snapshot(payload: Mapping[str, Any]) -> Snapshot:
    """What a sampler save wrote; servers that do not tell give the identity alone.

    Raises:
        ProtocolError: there is no path.
    """
    path = payload.get("path")
    if not isinstance(path, str) or not path:
        raise ProtocolError("the trainer saved sampler weights but named no path")
    told = payload.get("snapshot")
    if not isinstance(told, Mapping):
        return Snapshot(path)
    fields = cast(Mapping[str, Any], told)
    return Snapshot(
        identity=str(fields.get("identity", path)),
        kind=cast("SnapshotKind | None", fields.get("kind")),
        predecessor=fields.get("predecessor"),
        bytes=fields.get("bytes"),
        sha256=fields.get("sha256"),
    )
