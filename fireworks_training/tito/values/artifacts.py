"""Trajectory artifacts as bytes: a magic number, then compressed JSON.

Equal artifacts give equal bytes, and the layout is that of the other SDK, version 1, so that either
reads the other's files. It knows the layout only; what the values mean is `records`'.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar, cast

from fireworks_training.models import SampledServerAttempt, ServerMetrics
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.metrics import TITODistribution, TITOMetricSummary
from fireworks_training.tito.values.records import (
    TITOCallRecord,
    TITOResponseAttempt,
    TITOSegmentResult,
    TITOTrajectoryArtifact,
    TITOTurn,
)
from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant

MAGIC = b"TITOART\x01"
VERSION = 1
MAX_BYTES = 1 << 30
"""Of the JSON: a file that unpacks to more is refused."""

OWN_METRICS = ("request_id", "snapshot_identity", "snapshot_distance")
"""Fields of `ServerMetrics` that the other SDK has not: they stand beside it."""

T = TypeVar("T")


def packed(artifact: TITOTrajectoryArtifact) -> bytes:
    """See `TITOTrajectoryArtifact.pack`."""
    value = {"schema_version": VERSION, **_value(artifact)}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return MAGIC + zlib.compress(text.encode(), 6)


def unpacked(payload: bytes) -> TITOTrajectoryArtifact:
    """See `TITOTrajectoryArtifact.unpack`."""
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
        return _artifact(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise TITOError(
            "tito_artifact_invalid", 400, f"this is no trajectory artifact: {error}"
        ) from error


def _value(value: Any) -> Any:
    """JSON of the records, by their fields."""
    if isinstance(value, ServerMetrics):
        return _fields(value, without=OWN_METRICS)
    if isinstance(value, (TITOTurn, SampledServerAttempt)):
        return {**_fields(value), **_own_metrics(value.server_metrics)}
    if is_dataclass(value):
        return _fields(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value).items()
        return {name: _value(item) for name, item in items}
    if isinstance(value, (tuple, list)):
        return [_value(item) for item in cast(Sequence[Any], value)]
    return value


def _fields(value: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    names = (field.name for field in fields(value) if field.name not in without)
    return {name: _value(getattr(value, name)) for name in names}


def _own_metrics(metrics: ServerMetrics | None) -> dict[str, Any]:
    if metrics is None:
        return {}
    return {"server_metrics_more": {name: getattr(metrics, name) for name in OWN_METRICS}}


def _artifact(raw: Mapping[str, Any]) -> TITOTrajectoryArtifact:
    distributions = {
        name: TITODistribution(**values) for name, values in raw["metrics"]["distributions"].items()
    }
    counters = MappingProxyType(dict(raw["metrics"]["counters"]))
    return _made(
        TITOTrajectoryArtifact,
        raw,
        metadata=MappingProxyType(dict(raw["metadata"])),
        segments=tuple(
            _made(TITOSegmentResult, segment, turns=tuple(map(_turn, segment["turns"])))
            for segment in raw["segments"]
        ),
        calls=tuple(
            _made(TITOCallRecord, call, server_attempts=_attempts(call)) for call in raw["calls"]
        ),
        response_attempts=tuple(_made(TITOResponseAttempt, a) for a in raw["response_attempts"]),
        metrics=TITOMetricSummary(counters, MappingProxyType(distributions)),
    )


def _turn(raw: Mapping[str, Any]) -> TITOTurn:
    return _made(
        TITOTurn,
        raw,
        request=_request(raw["request"]),
        assistant=_assistant(raw["assistant"]),
        server_metrics=_metrics(raw),
        server_attempts=_attempts(raw),
    )


def _request(raw: Mapping[str, Any]) -> TITOChatRequest:
    body = raw.get("wire_request_body")
    # Keys are sorted in the file; templates see the order in which the agent sent them.
    wire = json.loads(body) if body is not None else raw.get("wire_request")
    return _made(TITOChatRequest, raw, wire_request=wire)


def _assistant(raw: Mapping[str, Any]) -> TITOParsedAssistant:
    response = raw.get("response_message", raw["message"])
    parsed = TITOParsedAssistant(response, raw["output_kind"], raw["parser_fallback"])
    if dict(parsed.message) != raw["message"]:
        raise ValueError("a message is not that of its response")
    return parsed


def _attempts(raw: Mapping[str, Any]) -> tuple[SampledServerAttempt, ...]:
    attempts = raw.get("server_attempts") or ()
    return tuple(_made(SampledServerAttempt, a, server_metrics=_metrics(a)) for a in attempts)


def _metrics(raw: Mapping[str, Any]) -> ServerMetrics | None:
    if raw.get("server_metrics") is None:
        return None
    return _made(ServerMetrics, {**raw["server_metrics"], **raw.get("server_metrics_more", {})})


def _made(kind: type[T], raw: Mapping[str, Any], **given: Any) -> T:
    """A record of its fields in JSON; lists become tuples."""
    known = {field.name for field in fields(cast(Any, kind)) if field.init}
    values = {name: _tuples(value) for name, value in raw.items() if name in known}
    return kind(**{**values, **given})


def _tuples(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(_tuples(item) for item in cast(Sequence[object], value))
