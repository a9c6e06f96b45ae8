"""The two dialects of passes, JSON and protobuf: which one a trainer gets, and its requests.

Both have one shape: `encode_datum` for each datum, then one request a chunk, put together when its
id is known. How arrays become bytes is in `json_passes` and `protobuf`; all other operations are
JSON in either dialect (`bodies`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np

from fireworks_training._wire.training import json_passes, protobuf
from fireworks_training._wire.training.bodies import PassKind, WireRequest
from fireworks_training._wire.training.compression import ENCODING, compress
from fireworks_training._wire.training.datums import Array, Encoding, PassResult
from fireworks_training.errors import NotSupported

JSON_TYPE = "application/json"
ACCEPT = f"{protobuf.CONTENT_TYPE}, {JSON_TYPE}"
"""The forms that a result may have; the answer's content type names its own."""


class PassFields(TypedDict):
    """The fields of a pass beside its datums."""

    loss_fn: str
    loss_fn_config: Mapping[str, Any] | None
    model_id: str
    seq_id: int


class BackwardFields(TypedDict):
    """The fields of a backward beside its gradients."""

    model_id: str
    seq_id: int
    forward_seq_id: int


class Dialect(Protocol):
    """Writes the requests of passes; `name` is "json" or "protobuf"."""

    @property
    def name(self) -> str: ...

    @property
    def compresses(self) -> bool:
        """Whether `encode_pass` and `encode_backward` compress, which takes time."""
        ...

    def encode_datum(
        self, tokens: Sequence[int], inputs: Mapping[str, Array], index: int, /
    ) -> Encoding:
        """Encode one datum, by itself."""
        ...

    def encode_gradient(self, gradient: Array, /) -> Encoding:
        """Encode the gradient by the logprobs of one datum, by itself."""
        ...

    def join(self, datums: Iterable[Encoding], /) -> bytes:
        """Put the datums or gradients of one chunk end to end."""
        ...

    def encode_pass(self, kind: PassKind, data: bytes, **fields: Unpack[PassFields]) -> WireRequest:
        """Encode one chunk of a pass, of joined datums."""
        ...

    def encode_backward(self, data: bytes, **fields: Unpack[BackwardFields]) -> WireRequest:
        """Encode a backward by an earlier forward's logprobs, of joined gradients."""
        ...


@dataclass(frozen=True, slots=True)
class JsonDialect:
    """Writes Fireworks JSON; `comms` "v2" marks the requests of servers that asked for it."""

    comms: str = "v1"
    name: str = "json"
    compresses: bool = False

    encode_datum = staticmethod(json_passes.encode_datum)
    encode_gradient = staticmethod(json_passes.encode_gradient)
    join = staticmethod(json_passes.join)

    def encode_pass(self, kind: PassKind, data: bytes, **fields: Unpack[PassFields]) -> WireRequest:
        body = json_passes.encode_request(kind, data, comms=self.comms, **fields)
        return WireRequest(kind, body, {"Content-Type": JSON_TYPE})

    def encode_backward(self, data: bytes, **fields: Unpack[BackwardFields]) -> WireRequest:
        body = json_passes.encode_backward(data, **fields)
        return WireRequest("backward", body, {"Content-Type": JSON_TYPE})


@dataclass(frozen=True, slots=True)
class ProtobufDialect:
    """Writes Tinker protobuf; `compresses` it in zstd for servers that ask for it."""

    compresses: bool = False
    name: str = "protobuf"

    encode_datum = staticmethod(protobuf.encode_datum)
    encode_gradient = staticmethod(protobuf.encode_gradient)
    join = staticmethod(protobuf.join)

    def encode_pass(self, kind: PassKind, data: bytes, **fields: Unpack[PassFields]) -> WireRequest:
        # One path for both kinds: whether it is only a forward stands in the message.
        return self._encoded("forward_backward", protobuf.encode_request(kind, data, **fields))

    def encode_backward(self, data: bytes, **fields: Unpack[BackwardFields]) -> WireRequest:
        return self._encoded("backward", protobuf.encode_backward(data, **fields))

    def _encoded(self, path: str, body: tuple[bytes, ...]) -> WireRequest:
        if not self.compresses:
            return WireRequest(path, body, {"Content-Type": protobuf.CONTENT_TYPE})
        headers = {"Content-Type": protobuf.CONTENT_TYPE, "Content-Encoding": ENCODING}
        return WireRequest(path, (compress(b"".join(body)),), headers)


def choose(
    asked: str | None,
    *,
    wire: Sequence[str],
    comms: str,
    zstd: bool = False,
    json_alone: bool = False,
) -> Dialect:
    """Choose the dialect for a trainer.

    Args:
        asked: the one that the caller wants, "json" or "protobuf"; None leaves the choice.
        wire: the dialects that the trainer lists; empty where it lists none.
        comms: the version of JSON that it asks for.
        zstd: whether it asks for compressed requests in protobuf.
        json_alone: whether a trainer of its kind takes JSON alone where it lists nothing.

    Raises:
        NotSupported: the trainer lists its dialects, and that is not among them; or it lists
            none, and is of a kind that takes JSON alone.
    """
    if asked is not None and wire and asked not in wire:
        raise NotSupported(f"dialect={asked!r}: this trainer takes {', '.join(wire)}")
    if asked == "protobuf" and json_alone and not wire:
        raise NotSupported(
            "dialect='protobuf': this trainer lists no dialects, and Fireworks trainers that list "
            "none take JSON; leave dialect out"
        )
    if asked == "protobuf" or (asked is None and "protobuf" in wire):
        return ProtobufDialect(zstd)
    return JsonDialect(comms)


def filler_pass(dialect: Dialect, model_id: str, seq_id: int) -> WireRequest:
    """Write a forward that changes nothing, for the place of a refused request in the line."""
    nothing: dict[str, Array] = {
        "target_tokens": np.zeros(1, np.int64),
        "weights": np.zeros(1, np.float32),
    }
    return dialect.encode_pass(
        "forward",
        dialect.join([dialect.encode_datum((0,), nothing, 0)]),
        loss_fn="cross_entropy",
        loss_fn_config=None,
        model_id=model_id,
        seq_id=seq_id,
    )


def decode_result(payload: Mapping[str, Any] | bytes, most: int | None = None) -> PassResult:
    """Read the answer of a pass: a JSON object, or the bytes of a protobuf message.

    Args:
        most: datums that were asked for; None: any number.

    Raises:
        ProtocolError: it is not such an answer.
    """
    if isinstance(payload, bytes):
        return protobuf.decode_result(payload, most)
    return json_passes.decode_result(payload)
