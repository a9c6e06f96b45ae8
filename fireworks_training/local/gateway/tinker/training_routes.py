"""Routes of the Tinker API that make sessions and train: check bodies, and pass them on.

Knows which requests are about a run, and where a body names it. Does not know sessions and the way
to a run's trainer (`training`), nor the bodies that it passes on.
"""

from __future__ import annotations

import re
from typing import cast

import orjson
import zstandard
from aiohttp import hdrs, web

from fireworks_training.local.gateway.control_plane.trainer_proxy import exchange
from fireworks_training.local.gateway.inference.registry import ModelEntry
from fireworks_training.local.gateway.tinker.training import TRAINING
from fireworks_training.local.gateway.web.bodies import (
    INLINE_BYTES,
    RAW,
    SAMPLING_BYTES,
    object_field,
    optional_text,
    parse_object,
    read_bytes,
    read_object,
    required_text,
)
from fireworks_training.local.gateway.web.problems import HttpProblem, model_lost

FINISHES = ("success", "errored", "interrupted")
MAX_TEXT = 4096
_ZSTD = "zstd"


def add_routes(app: web.Application) -> None:
    """Register sessions and training; the app holds `TRAINING`."""
    router = app.router
    router.add_get("/api/v1/healthz", _ok)
    for name, handler in {
        "client/config": _client_config,
        "telemetry": _telemetry,
        "create_session": _create_session,
        "session_heartbeat": _heartbeat,
        "sessions/{session_id}/finish": _finish,
        "create_model": _create_model,
        "load_weights": _load_weights,
    }.items():
        router.add_post(f"/api/v1/{name}", handler)
    for kind in _OF_A_RUN:
        router.add_post(f"/api/v1/{kind}", _pass_to_run)


_OF_A_RUN = (
    "get_info",
    "unload_model",
    "forward",
    "forward_backward",
    "backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "discard_gradients",
)


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _client_config(request: web.Request) -> web.Response:
    """Show what differs from the clients' defaults."""
    await read_bytes(request)
    return web.json_response(request.app[TRAINING].offered)


async def _telemetry(request: web.Request) -> web.Response:
    """Accept telemetry, so that official clients work, and drop it."""
    await read_bytes(request, SAMPLING_BYTES)
    return web.json_response({"status": "accepted"})


async def _create_session(request: web.Request) -> web.Response:
    body = await read_object(request)
    name = optional_text(body, "display_name", MAX_TEXT)
    metadata = object_field(body, "user_metadata")
    if len(orjson.dumps(metadata)) > MAX_TEXT:
        raise HttpProblem(400, f"user_metadata must be an object of at most {MAX_TEXT} bytes")
    shown = {key: str(value) for key, value in metadata.items()}
    session_id = await request.app[TRAINING].create_session(name, shown)
    return web.json_response({"session_id": session_id, "type": "create_session"})


async def _heartbeat(request: web.Request) -> web.Response:
    await request.app[TRAINING].heartbeat(required_text(await read_object(request), "session_id"))
    return web.json_response({"type": "session_heartbeat"})


async def _finish(request: web.Request) -> web.Response:
    body = await read_object(request)
    reason, detail = body.get("reason"), optional_text(body, "detail")
    given = cast("dict[str, object]", reason).get("type") if isinstance(reason, dict) else None
    if given not in (None, *FINISHES):
        raise HttpProblem(400, f"reason: its type must be one of {', '.join(FINISHES)}")
    await request.app[TRAINING].finish(
        request.match_info["session_id"], str(given or "success"), detail and detail[:MAX_TEXT]
    )
    return web.json_response({})


async def _create_model(request: web.Request) -> web.StreamResponse:
    raw, body = await read_bytes(request), await read_object(request)
    training = request.app[TRAINING]
    return await _begin_run(request, raw, body, training.model(required_text(body, "base_model")))


async def _load_weights(request: web.Request) -> web.StreamResponse:
    """Load weights into a run that is there, or as the beginning of a new one."""
    raw, body = await read_bytes(request), await read_object(request)
    if body.get("session_id") is None:
        return await _pass_to_run(request)
    training = request.app[TRAINING]
    named = body.get("base_model")
    if not isinstance(named, str):
        note = training.store.run(
            required_text(body, "path").removeprefix("tinker://").partition("/")[0]
        )
        if note is None:
            raise HttpProblem(404, f"no checkpoint {required_text(body, 'path')[:200]!r}")
        named = note.base_model
        body["base_model"] = named
        raw = orjson.dumps(body)
    return await _begin_run(request, raw, body, training.model(named))


async def _begin_run(
    request: web.Request, raw: bytes, body: dict[str, object], entry: ModelEntry
) -> web.StreamResponse:
    training = request.app[TRAINING]
    session_id = required_text(body, "session_id")
    training.session(session_id)
    id_, trainer = await training.trainer_of_model(entry)
    await training.adopt(session_id, id_, trainer)
    training.note_run(f"{session_id}:train:{body.get('model_seq_id')}", id_)
    return await exchange(request, trainer, id_, request.rel_url.raw_path, raw)


async def _pass_to_run(request: web.Request) -> web.StreamResponse:
    raw = request[RAW] if RAW in request else await request.read()
    return await pass_to_trainer(request, raw, _run_of(request, raw))


async def pass_to_trainer(request: web.Request, raw: bytes, run: str) -> web.StreamResponse:
    """Pass one request to the trainer of a run, and its answer back."""
    found = await request.app[TRAINING].trainer_of_run(run)
    if found is None:
        return model_lost(
            f"no trainer holds {run[:100]!r}: the process that held it is gone. Make a new training"
            " client from a saved state"
        )
    id_, trainer = found
    return await exchange(request, trainer, id_, request.rel_url.raw_path, raw)


def _run_of(request: web.Request, raw: bytes) -> str:
    """Return the run that a body is about: `model_id` in JSON, the first field of a protobuf
    message."""
    if request.content_type != "application/x-protobuf":
        return _model_id_of(raw)
    head = raw[:512]
    if request.headers.get(hdrs.CONTENT_ENCODING) == _ZSTD:
        try:
            with zstandard.ZstdDecompressor().stream_reader(raw) as reader:
                head = reader.read(512)
        except zstandard.ZstdError:
            raise HttpProblem(400, "the body is no zstd, as its Content-Encoding says") from None
    # Field 1, length-delimited; a run's name is shorter than 128 bytes.
    if len(head) < 2 or head[0] != 0x0A or head[1] > 0x7F:
        raise HttpProblem(400, "the message does not begin with the model_id")
    return head[2 : 2 + head[1]].decode("ascii", "replace")


def _model_id_of(raw: bytes) -> str:
    """Return the `model_id` of a body in JSON; a large one is searched for it, and not parsed.

    What is found only chooses the trainer: that one parses the body, and goes by what it reads.
    """
    if len(raw) <= INLINE_BYTES:
        return required_text(parse_object(raw), "model_id")
    found: set[bytes] = set()
    at = raw.find(_MODEL_ID)
    for _ in range(_MOST_NAMES):
        if at < 0:
            break
        value = _NAMED.match(raw, at)
        if value is not None:
            found.add(value[1])
        at = raw.find(_MODEL_ID, at + len(_MODEL_ID))
    if len(found) != 1 or at >= 0:
        raise HttpProblem(400, "model_id must be a non-empty string, given once")
    return found.pop().decode()


_MODEL_ID = b'"model_id"'
_NAMED = re.compile(rb'"model_id"[ \t\r\n]*:[ \t\r\n]*"([!#-\[\]-~]{1,200})"')
_MOST_NAMES = 16
"""Places of a body that are looked at: a run's name stands in one."""
