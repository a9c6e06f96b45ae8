"""Requests that no client sends: for every route, with values that somebody might."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fireworks_training._wire.training.compression import compress

SESSION = f"ts-{'0' * 32}"
_IDS = [
    "local", "j1", "d1", "tiny", "a" * 300, "..", "%2e%2e", "%00", "%ff", "*", "-", "é", "a:b",
    SESSION, f"{SESSION}:train:0", f"{SESSION}:sampler:0", "weights", "sampler_weights", "step-1",
]  # fmt: skip
_NAMES = [
    "session_id", "model_id", "seq_id", "model_seq_id", "base_model", "model_path", "path",
    "sampling_session_id", "sampling_session_seq_id", "request_id", "num_samples", "prompt",
    "sampling_params", "tokens", "chunks", "type", "target", "timeout", "prev_cursor", "reason",
    "detail", "statuses", "reasons", "limit", "cursor", "display_name", "user_metadata",
    "lora_config", "rank", "ttl_seconds", "tinker_path", "model", "max_tokens", "top_k",
    "temperature", "stop", "logprobs", "n", "seed", "baseModel", "trainingConfig",
    "maxContextLength", "displayName", "minReplicaCount", "maxReplicaCount", "identity", "name",
    "incremental_snapshot_metadata", "inline_bytes", "retrieved_request_ids",
    "forward_backward_input", "data", "top_p", "echo",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 0.5, -0.0, 1e308, "", "a", "tiny",
    "accounts/local/models/tiny", "x" * 5000, "\0", "é\u2028", SESSION, f"{SESSION}:train:0",
    f"{SESSION}:sampler:0", f"tinker://{SESSION}:train:0/weights/a", "active", "client_finished",
    "success", "sampling_session", "model", "encoded_text", [], {}, [[]], ["success"], [1, 2, 3],
]  # fmt: skip
_RAW = [
    b"", b"{", b"null", b"[]", b"\xff\xfe", b'"' + b"a" * 70000 + b'"', b"[" * 100_000,
    b'{"a":' * 5000, b"1" * 50_000, b'{"timeout":1' + b"0" * 400 + b"}", b'{"a":NaN}',
    b'{"a":1e999}', b'{"a":"\\ud800"}', b"{}" * 40_000,
    b'{"x":[' + b"{}," * 60_000 + b"0]}", b"\0" * 1000,
]  # fmt: skip
_LEFT_OUT = ("/local/v1/faults", "/local/v1/limits", "/boom")
"""Routes that make the platform fail on purpose, which they do."""


@dataclass(frozen=True)
class FuzzedRequest:
    """A request: path with the query, body, and headers beside the key."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict[str, str])


class _Source(random.Random):
    known: list[str]

    def value(self) -> Any:
        return self.choice(self.known if self.known and self.random() < 0.3 else _VALUES)

    def id(self) -> str:
        return self.choice(self.known if self.known and self.random() < 0.4 else _IDS)


def routes_of(app: web.Application) -> list[tuple[str, str]]:
    """Methods and path patterns of an application, without those that fail on purpose."""
    found: set[tuple[str, str]] = set()
    for route in app.router.routes():
        info = route.resource.get_info() if route.resource is not None else {}
        path = info.get("path") or info.get("formatter") or ""
        if path and not path.startswith(_LEFT_OUT):
            found.add((route.method if route.method != "*" else "POST", path))
    return sorted(found)


def requests(
    routes: list[tuple[str, str]], seed: int, count: int, known: Sequence[str] = ()
) -> Iterator[FuzzedRequest]:
    """So many requests, over all routes in turn; the same for one seed.

    Args:
        known: ids of what is there, which get behind the first look.
    """
    source = _Source(seed)
    source.known = list(known)
    for index in range(count):
        method, pattern = routes[index % len(routes)]
        if source.random() < 0.05:
            method = source.choice(["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
        headers: dict[str, str] = {}
        body = b"" if method in ("GET", "HEAD") else _body(source, headers)
        yield FuzzedRequest(method, _path(source, pattern), body, headers)


def _path(source: _Source, pattern: str) -> str:
    parts: list[str] = []
    for part in pattern.split("/"):
        named = "{" in part
        parts.append(source.id() if named else part)
    path = "/".join(parts)
    if source.random() < 0.2:
        name = source.choice(["limit", "offset", "pageSize", "pageToken", "rlorTrainerJobId"])
        path += f"?{name}={source.choice(['0', '-1', '1' * 400, 'a', '%00', '', '5'])}"
    return path


def _body(source: _Source, headers: dict[str, str]) -> bytes:
    kind = source.random()
    if kind < 0.15:
        headers["Content-Type"] = "application/x-protobuf"
        if source.random() < 0.5:
            headers["Content-Encoding"] = "zstd"
            return compress(bytes(source.choice([10, 1 << 16, 1 << 24])))
        return source.randbytes(source.randrange(200))
    if kind < 0.35:
        return source.choice(_RAW)
    headers["Content-Type"] = "application/json"
    return json.dumps(_value(source, 3, whole=True)).encode()


def _value(source: _Source, depth: int, whole: bool = False) -> Any:
    if depth == 0 or (not whole and source.random() < 0.6):
        return source.value()
    if not whole and source.random() < 0.3:
        return [_value(source, depth - 1) for _ in range(source.randrange(4))]
    names = source.sample(_NAMES, source.randrange(1, 12))
    return {name: _value(source, depth - 1) for name in names}
