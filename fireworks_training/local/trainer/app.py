"""The trainer's HTTP application: routes, statuses, long polls.

Knows paths, which exception is which status, and how long a poll is held. Does not know the meaning
of a body (the codec does), order or execution.

Error bodies are `{"error", "error_class", "category"}`. A submit that is refused with 400 has taken
its place in the queue as a failed operation if it named one; 409 means that the place holds another
operation, 429 that the queue is too long, 410 that the model is not here any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from aiohttp import hdrs, web

from fireworks_training._wire.training.compression import ENCODING, decompress
from fireworks_training.errors import ProtocolError
from fireworks_training.local import results
from fireworks_training.local.store.snapshots import FreeBytes, disk_free_bytes
from fireworks_training.local.trainer.queue.leases import UnknownForward
from fireworks_training.local.trainer.queue.line import Closed, QueueLimits, Taken, TooFarAhead
from fireworks_training.local.trainer.queue.operations import OperationFailed, Submission
from fireworks_training.local.trainer.run.hosted import CreateModel, Gone, UnknownRequest
from fireworks_training.local.trainer.run.models import ModelFactory
from fireworks_training.local.trainer.service import MAX_MODELS, LimitReached, TrainerService
from fireworks_training.local.trainer.settings import TrainerSettings
from fireworks_training.local.trainer.wire import json_codec, proto_codec
from fireworks_training.local.trainer.wire.datums import ModelLimits
from fireworks_training.local.trainer.wire.json_codec import JSON, encode_failure
from fireworks_training.local.trainer.wire.json_fields import Malformed, identifier, parse, whole

_log = logging.getLogger("fireworks_training.local.trainer")

MAX_BODY = 64 << 20
MAX_JSON = 1 << 20
HOLD_S = 30.0
PARSE_INLINE_BYTES = 64 << 10
"""Larger bodies are decoded in a thread, so that polls and heartbeats go on meanwhile."""
STOP_TORCH_S = 2.0

_SERVICE = web.AppKey("service", TrainerService)
_FACTORY = web.AppKey("factory", ModelFactory)
_HOLD = web.AppKey("hold", float)
STOP = web.AppKey("stop", asyncio.Event)
"""Event that ends the worker: set on shutdown, or because it can't go on."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def create_app(
    settings: TrainerSettings,
    *,
    hold_s: float = HOLD_S,
    limits: QueueLimits | None = None,
    free_bytes: FreeBytes = disk_free_bytes,
) -> web.Application:
    """Builds the application of one trainer job.

    The base model is loaded during start-up; from then on every route answers.

    Args:
        hold_s: seconds for which a poll for a result is held open.
        limits: bounds of each model's queue.
        free_bytes: how to measure free space (a fake in tests).
    """
    app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors])
    app[_HOLD] = hold_s

    async def running(app: web.Application) -> AsyncIterator[None]:
        app[STOP] = asyncio.Event()
        service = TrainerService(
            JSON,
            encode_failure,
            time.monotonic,
            limits,
            settings.session_timeout_s,
            atomic_steps=settings.atomic_steps,
            max_models=settings.max_models or MAX_MODELS,
            fits=lambda more: app[_FACTORY].fits(more),
        )
        app[_SERVICE] = service
        app[_FACTORY] = await service.torch.run(lambda: ModelFactory(settings, free_bytes))
        tasks = [
            asyncio.create_task(service.run(), name="trainer line"),
            asyncio.create_task(service.watch_sessions(), name="silent sessions"),
        ]
        for task in tasks:
            task.add_done_callback(lambda ended: _ended(app, ended))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await service.stop(STOP_TORCH_S)

    app.cleanup_ctx.append(running)
    app.on_shutdown.append(_stop)
    _add_routes(app)
    return app


async def _stop(app: web.Application) -> None:
    app[STOP].set()


def _ended(app: web.Application, task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        _log.critical("the trainer's line stopped; the worker ends", exc_info=task.exception())
        app[STOP].set()


def _add_routes(app: web.Application) -> None:
    router = app.router
    router.add_get("/internal/alive", _alive)
    router.add_get("/api/v1/healthz", _healthz)
    router.add_get("/api/v1/get_server_capabilities", _server_capabilities)
    router.add_get("/api/v1/list_checkpoints", _list_checkpoints)
    for name, handler in {
        "client/config": _client_config,
        "telemetry": _telemetry,
        "create_session": _create_session,
        "session_heartbeat": _session_heartbeat,
        "sessions/{session_id}/finish": _finish_session,
        "create_model": _create_model,
        "get_info": _get_info,
        "unload_model": _unload_model,
        "retrieve_future": _retrieve_future,
        "retrieve_futures": _retrieve_futures,
    }.items():
        router.add_post(f"/api/v1/{name}", handler)
    router.add_post("/internal/sessions", _adopt_session)
    router.add_post("/api/v1/load_weights", _load_weights)
    for kind in json_codec.KINDS:
        if kind != "load_weights":
            router.add_post(f"/api/v1/{kind}", _submitter(kind))


# -- errors --------------------------------------------------------------------------------------


_REFUSALS: Mapping[type[Exception], tuple[int, str]] = {
    Malformed: (400, "Malformed"),
    LimitReached: (400, "TooMany"),
    UnknownRequest: (404, "NotFound"),
    UnknownForward: (404, "UnknownForward"),
    Taken: (409, "Conflict"),
    Closed: (410, "ModelUnloaded"),
    TooFarAhead: (429, "TooFarAhead"),
}
"""Status and `error_class` of the exceptions that have no class of their own in their body."""


def _error(status: int, message: str, error_class: str, category: str = "user") -> web.Response:
    headers = {"Retry-After": "1"} if status == 429 else None
    body = {"error": message, "error_class": error_class, "category": category}
    return web.json_response(body, status=status, headers=headers)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except tuple(_REFUSALS) as error:
        status, error_class = _REFUSALS[type(error)]
        return _error(status, str(error), error_class)
    except OperationFailed as error:
        return _error(400, str(error), error.error_class, error.category)
    except Gone as error:
        return _error(410, str(error), error.error_class)
    except web.HTTPRequestEntityTooLarge:
        message = f"the body is larger than {MAX_BODY} bytes: send fewer datums at a time"
        return _error(413, message, "TooLarge")
    except web.HTTPException as error:
        return _error(error.status, error.reason, "HttpError")
    except Exception as error:
        _log.exception("%s failed", request.path)
        return _error(500, f"the trainer failed: {type(error).__name__}", "Internal", "server")


# -- service and sessions ------------------------------------------------------------------------


async def _alive(request: web.Request) -> web.StreamResponse:
    """Sends a response without end: its reader sees at once when the process dies."""
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"alive\n")
    await request.app[STOP].wait()
    return response


async def _healthz(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _server_capabilities(request: web.Request) -> web.Response:
    settings = request.app[_FACTORY].settings
    model = {
        "model_name": settings.base_model,
        "max_context_length": settings.max_context_length,
        "trainable": True,
        "sampleable": False,
    }
    return web.json_response({"supported_models": [model]})


async def _list_checkpoints(request: web.Request) -> web.Response:
    names = await asyncio.to_thread(request.app[_FACTORY].stores.states.names)
    return web.json_response({"checkpoints": names})


async def _client_config(_: web.Request) -> web.Response:
    return web.json_response({})


async def _telemetry(request: web.Request) -> web.Response:
    """Accepts and drops telemetry, so that official clients work."""
    await request.read()
    return web.json_response({"status": "accepted"})


async def _create_session(request: web.Request) -> web.Response:
    await _body(request)
    session_id = request.app[_SERVICE].create_session()
    return web.json_response({"session_id": session_id, "type": "create_session"})


async def _session_heartbeat(request: web.Request) -> web.Response:
    request.app[_SERVICE].heartbeat(identifier(await _body(request), "session_id"))
    return web.json_response({"type": "session_heartbeat"})


async def _finish_session(request: web.Request) -> web.Response:
    request.app[_SERVICE].finish_session(request.match_info["session_id"])
    return web.json_response({})


# -- models --------------------------------------------------------------------------------------


async def _create_model(request: web.Request) -> web.Response:
    body = await _body(request)
    return _created(request, body, request.app[_FACTORY].request(body))


def _created(request: web.Request, body: dict[str, object], wanted: CreateModel) -> web.Response:
    session_id = identifier(body, "session_id")
    model_seq_id = whole(body, "model_seq_id", refusal=Malformed)
    model_id = request.app[_SERVICE].create_model(session_id, model_seq_id, wanted)
    return web.json_response({"request_id": f"{model_id}:create", "model_id": model_id})


async def _adopt_session(request: web.Request) -> web.Response:
    """Adds a session that the gateway made for a client of the Tinker API."""
    request.app[_SERVICE].adopt_session(identifier(await _body(request), "session_id"))
    return web.json_response({})


async def _get_info(request: web.Request) -> web.Response:
    body = await _body(request)
    hosted = request.app[_SERVICE].model(identifier(body, "model_id"))
    factory = request.app[_FACTORY]
    name, lora = hosted.request.base_model, hosted.request.lora
    # A run's client loads its tokenizer itself, by this name: the directory is on this machine.
    tokenizer = str(factory.settings.model_path) if hosted.request.limits.tinker_run else name
    answer: dict[str, object] = {
        "model_id": hosted.model_id,
        "model_data": {
            "arch": factory.architecture,
            "model_name": name,
            "tokenizer_id": tokenizer,
        },
        "is_lora": lora is not None,
        "lora_rank": 0 if lora is None else lora.rank,
        "model_name": name,
        "type": "get_info",
    }
    return web.json_response(answer)


async def _unload_model(request: web.Request) -> web.Response:
    model_id = identifier(await _body(request), "model_id")
    request_id = request.app[_SERVICE].unload(model_id)
    return web.json_response({"request_id": request_id, "model_id": model_id})


# -- operations ----------------------------------------------------------------------------------


def _submitter(kind: str) -> Handler:
    async def submit(request: web.Request) -> web.Response:
        raw = await _content(request)
        service = request.app[_SERVICE]
        protobuf = request.content_type == proto_codec.CONTENT_TYPE
        if protobuf and kind not in _PROTOBUF_KINDS:
            raise web.HTTPUnsupportedMediaType(reason=f"{kind} takes JSON")

        def limits_of(model_id: str) -> ModelLimits:
            return service.model(model_id).request.limits

        def decode() -> Submission:
            decoder = proto_codec.submission if protobuf else json_codec.submission
            return decoder(kind, raw, limits_of)

        inline = len(raw) <= PARSE_INLINE_BYTES
        submission = decode() if inline else await asyncio.to_thread(decode)
        request_id = service.submit(submission)
        return web.json_response({"request_id": request_id, "model_id": submission.model_id})

    return submit


_PROTOBUF_KINDS = ("forward", "forward_backward", "backward")


async def _body(request: web.Request) -> dict[str, object]:
    return parse(await request.read())


async def _content(request: web.Request) -> bytes:
    """Reads and decompresses the body. The server's own decompression is off: it has no limit."""
    raw = await request.read()
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
    if encoding == "identity":
        return raw
    if encoding != ENCODING:
        raise web.HTTPUnsupportedMediaType(reason=f"Content-Encoding must be {ENCODING}")
    try:
        return await asyncio.to_thread(decompress, raw, limit=MAX_BODY)
    except ProtocolError as error:
        raise Malformed(str(error)) from None


async def _load_weights(request: web.Request) -> web.StreamResponse:
    """Loads a state into a model; a request with a session makes a new model of the state."""
    if request.content_length is not None and request.content_length > MAX_JSON:
        raise web.HTTPRequestEntityTooLarge(MAX_JSON, request.content_length)
    body = await _body(request)
    if body.get("session_id") is None:
        return await _submitter("load_weights")(request)
    wanted = request.app[_FACTORY].request_from_state(body)
    return _created(request, body, wanted)


async def _retrieve_future(request: web.Request) -> web.Response:
    request_id = identifier(await _body(request), "request_id")
    encoded = await request.app[_SERVICE].result(request_id, request.app[_HOLD])
    if encoded is None:
        return web.json_response(
            {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        )
    return web.Response(body=encoded.body, content_type=encoded.content_type)


async def _retrieve_futures(request: web.Request) -> web.Response:
    """Lists the results of one model since a cursor, in the form described in `local.results`."""
    try:
        poll = results.parse_poll(await request.read())
    except results.BadPoll as error:
        raise Malformed(str(error)) from None
    if not isinstance(poll.target, results.ModelTarget):
        raise Malformed("target: a trainer answers for its models; ask for type 'model'")
    service = request.app[_SERVICE]
    service.retrieved(poll.target.model_id, poll.retrieved_request_ids)
    completions, cursor = await service.ended(
        poll.target.model_id, poll.prev_cursor, poll.hold_s(request.app[_HOLD])
    )
    return web.json_response(results.answer(completions, cursor, poll.inline_bytes))
