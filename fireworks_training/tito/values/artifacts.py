"""Packs trajectory artifacts into bytes, and reads them again: a magic number, compressed JSON.

Equal artifacts give equal bytes, and the layout is that of the other SDK, version 1, so that either
reads the other's files. It knows where the JSON differs from the records' fields; what the fields
mean, and of which types they are, stands in `records`.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.messages import canonical_message, json_text

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAGIC = b"TITOART\x01"
VERSION = 1
MAX_BYTES = 1 << 30
"""Bytes of the JSON at most: a file that unpacks to more is refused."""

OWN_METRICS = ("request_id", "snapshot_identity", "snapshot_distance")
"""Fields of `ServerMetrics` that the other SDK lacks: they are written beside it."""

T = TypeVar("T")


def packed(artifact: object) -> bytes:
    """Pack a `TITOTrajectoryArtifact`; see its `pack`."""
    from pydantic_core import to_jsonable_python

    value: dict[str, Any] = to_jsonable_python(artifact, fallback=dict)  # of read-only mappings
    for row in _rows_with_metrics(value):
        if (metrics := row["server_metrics"]) is not None:
            row["server_metrics_more"] = {name: metrics.pop(name) for name in OWN_METRICS}
    text = json_text({"schema_version": VERSION, **value})
    return MAGIC + zlib.compress(text.encode(), 6)


def unpacked(payload: bytes, kind: type[T]) -> T:
    """Read packed bytes as an artifact of the class `kind`; see `TITOTrajectoryArtifact.unpack`."""
    from pydantic import ValidationError

    try:
        if not payload.startswith(MAGIC):
            raise ValueError("it does not begin as one")
        reader = zlib.decompressobj()
        text = reader.decompress(payload[len(MAGIC) :], MAX_BYTES)
        if reader.unconsumed_tail or not reader.eof:
            raise ValueError("it is cut off, or too large")
        raw: Any = json.loads(text)
        if raw.get("schema_version") != VERSION:
            raise ValueError(f"it has version {raw.get('schema_version')!r}, not {VERSION}")
        artifact: T = _adapter(cast(Any, kind)).validate_python(_as_fields(raw))
    except ValidationError as error:  # its own text may hold a prompt
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _invalid(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise _invalid(str(error)) from error
    return artifact


def _invalid(reason: str) -> TITOError:
    return TITOError("tito_artifact_invalid", 400, f"this is no trajectory artifact: {reason}")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _as_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Change the JSON of an artifact in place, into the fields that the records' classes take."""
    for row in _rows_with_metrics(raw):
        if (metrics := row.get("server_metrics")) is not None:
            metrics |= row.get("server_metrics_more", {})
            # The other SDK notes whether there was one; this one, which.
            if isinstance(metrics.get("transport_error"), bool):
                metrics["transport_error"] = "transport" if metrics["transport_error"] else None
    for turn in _turns(raw):
        request, assistant = turn["request"], turn["assistant"]
        if (body := request.get("wire_request_body")) is not None:
            # Keys are sorted in the file; templates see the order in which the agent sent them.
            request["wire_request"] = json.loads(body)
        response = assistant.get("response_message", assistant["message"])
        if canonical_message(response)[0] != assistant["message"]:
            raise ValueError("a message is not that of its response")
        assistant["message"] = response
    return raw


def _turns(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [turn for segment in raw["segments"] for turn in segment["turns"]]


def _rows_with_metrics(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield each object that has `server_metrics`: turns, and attempts of turns and calls."""
    turns = _turns(raw)
    yield from turns
    for holder in (*turns, *raw["calls"]):
        yield from holder.get("server_attempts") or ()
