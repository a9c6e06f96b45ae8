"""Serves OpenAI's chat route for each trajectory over HTTP, behind that trajectory's key.

It knows HTTP, server-sent events and clients that leave. It does not know how a call is carried
out: `turns` does.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from aiohttp import web

from fireworks_training._async.runtime.threads import in_thread
from fireworks_training.tito.evidence.failures import as_tito_error
from fireworks_training.tito.turns.trajectory import Trajectory
from fireworks_training.tito.values.errors import TITOError, invalid
from fireworks_training.tito.values.records import TITOCallResult
from fireworks_training.tito.values.requests import TITOChatRequest

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Bytes of a request at most: histories are long, and tokens are bounded by the context anyway."""

AUTHENTICATED: web.RequestKey[Trajectory] = web.RequestKey("trajectory", Trajectory)
"""Holds the trajectory whose key a request has."""

STARTED = web.RequestKey("started", bool)
"""Is set when the head of the answer may have been sent."""

_PATH = re.compile(r"^/trajectories/([A-Za-z0-9_.-]+)/")

logger = logging.getLogger("fireworks_training.tito")


class TrajectoryFinder(Protocol):
    """Finds trajectories and their keys."""

    def key_of(self, trajectory_id: str) -> str | None:
        """Give the key of a trajectory that is open, or ended recently."""
        ...

    def get(self, trajectory_id: str) -> Trajectory:
        """Find the trajectory."""
        ...


def application(
    registry: TrajectoryFinder, keepalive_seconds: Callable[[], float]
) -> web.Application:
    """Make the application. Every path, an unknown one too, needs the key of its trajectory."""

    @web.middleware
    async def authenticated(request: web.Request, handler: Any) -> web.StreamResponse:
        found = _PATH.match(request.path)
        wanted = registry.key_of(found[1]) if found else None
        if found is None or wanted is None or not _has_key(request, wanted):
            return error_answer(
                TITOError("invalid_api_key", 401, "no trajectory of that id has this key")
            )
        request[AUTHENTICATED] = registry.get(found[1])
        try:
            answer: web.StreamResponse = await handler(request)
        except web.HTTPException as error:
            return error_answer(TITOError("tito_not_found", error.status, _no_route(request)))
        except Exception as error:
            if request.get(STARTED) or isinstance(error, ConnectionError):
                raise  # a second answer would pass for that of the next request
            failure = as_tito_error(error, "answer")
            if failure is not error:
                logger.error("a request could not be answered: %s", failure)
            return error_answer(failure)
        return answer

    async def chat(request: web.Request) -> web.StreamResponse:
        return await _chat(request, request[AUTHENTICATED], keepalive_seconds())

    async def models(request: web.Request) -> web.Response:
        return _models(request[AUTHENTICATED])

    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[authenticated])
    app.router.add_post("/trajectories/{id}/v1/chat/completions", chat)
    app.router.add_get("/trajectories/{id}/v1/models", models)
    return app


def _has_key(request: web.Request, wanted: str) -> bool:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    # Bytes that are not UTF-8 come as surrogates.
    return hmac.compare_digest(given.encode(errors="surrogateescape"), wanted.encode())


def _no_route(request: web.Request) -> str:
    routes = "POST .../v1/chat/completions and GET .../v1/models"
    if request.path.endswith("/responses"):
        return (
            f"this endpoint has no Responses route, only {routes}: use the client's "
            "chat.completions (an agents library: its chat-completions model)"
        )
    return f"no {request.method} route of this name: this endpoint has {routes}"


def error_answer(error: TITOError) -> web.Response:
    """Write OpenAI's error body, with headers by which a client decides about a retry."""
    return web.json_response(
        error.openai_body(),
        status=error.status,
        headers={
            "x-should-retry": "true" if error.should_retry else "false",
            "x-fireworks-error-origin": error.origin,
            "x-fireworks-error-code": error.code,
        },
    )


def _models(trajectory: Trajectory) -> web.Response:
    try:
        trajectory.require_active()
    except TITOError as error:
        return error_answer(error)
    names = dict.fromkeys(("policy", trajectory.model))
    rows = [{"id": n, "object": "model", "created": 0, "owned_by": "fireworks"} for n in names]
    return web.json_response({"object": "list", "data": rows})


@dataclass(frozen=True, slots=True)
class _ChatCall:
    """Holds a chat request, whether its answer is streamed, and whether that has a usage chunk."""

    request: TITOChatRequest
    stream: bool
    usage: bool


async def _chat(
    request: web.Request, trajectory: Trajectory, keepalive: float
) -> web.StreamResponse:
    started = time.time()
    prepared = asyncio.Event()
    try:
        with trajectory.reading():
            wanted = await _read(request)
        key = request.headers.get("Idempotency-Key")
        call = trajectory.start(wanted.request, idempotency_key=key, prepared=prepared)
    except TITOError as error:
        await trajectory.refused(error, started)
        return error_answer(error)
    trajectory.answer_under_way()
    answer = _AnswerWriter(request, trajectory, call)
    try:
        if wanted.stream:
            return await answer.streamed(prepared, keepalive, usage=wanted.usage)
        return await answer.whole()
    except TITOError as error:
        return error_answer(error)
    except BaseException:
        # The agent has left, or the server stops: nobody can use the answer.
        await answer.drop()
        raise


async def _read(request: web.Request) -> _ChatCall:
    try:
        body = (await request.read()).decode()
        payload: Any = await in_thread(json.loads, body)
    except web.HTTPRequestEntityTooLarge:
        raise TITOError(
            "tito_request_too_large", 413, f"the body has more than {MAX_BODY_BYTES} bytes"
        ) from None
    except (ValueError, RecursionError):
        raise invalid("the body is no JSON, or nested too deeply") from None
    if not isinstance(payload, dict):
        raise invalid("the body must be a JSON object")
    fields = cast(dict[str, Any], payload)
    options: Any = fields.get("stream_options") or {}
    usage = isinstance(options, Mapping) and bool(cast(Any, options).get("include_usage"))
    wanted = TITOChatRequest.from_openai(fields, wire_request_body=body)
    return _ChatCall(wanted, bool(fields.get("stream")), usage)


class _AnswerWriter:
    """Sends the answer of one call to its agent, and notes whether it got there."""

    def __init__(
        self, request: web.Request, trajectory: Trajectory, call: asyncio.Task[TITOCallResult]
    ) -> None:
        self._request = request
        self._trajectory = trajectory
        self._call = call
        self._written = False

    async def whole(self) -> web.StreamResponse:
        """Send the answer as one JSON body."""
        result = await self._result()
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        self._request[STARTED] = True
        await response.prepare(self._request)
        await response.write(_json(result.response))
        await self._end(response, result)
        return response

    async def streamed(
        self, prepared: asyncio.Event, keepalive: float, *, usage: bool
    ) -> web.StreamResponse:
        """Send server-sent events: comments while the answer is sampled, then the answer.

        The message is parsed as a whole, so it comes in one piece; until then comments keep proxies
        and clients from giving up.
        """
        call = self._call
        ready = asyncio.create_task(prepared.wait())
        try:
            await asyncio.wait([call, ready], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if call.done() and not prepared.is_set():
            await self._result()  # refused: still a plain answer with its own status
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        self._request[STARTED] = True
        await response.prepare(self._request)
        while not (await asyncio.wait([call], timeout=keepalive))[0]:
            await response.write(b": keepalive\n\n")
            self._trajectory.measured.count("transport/keepalives_sent")
        try:
            result = await self._result()
        except TITOError as error:
            await response.write(b"event: error\ndata: " + _json(error.openai_body()) + b"\n\n")
            await response.write_eof()
            return response
        for chunk in _chunks(result.response, usage=usage):
            await response.write(b"data: " + _json(chunk) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        await self._end(response, result)
        return response

    async def drop(self) -> None:
        """Cancel the call of an agent that has left; a turn that it made counts as ambiguous."""
        self._call.cancel()
        (outcome,) = await asyncio.gather(self._call, return_exceptions=True)
        # An agent that has read its answer may leave before that is noted.
        if isinstance(outcome, TITOCallResult) and not self._written:
            await self._trajectory.emitted(outcome.turn_id, "ambiguous")

    async def _result(self) -> TITOCallResult:
        """Await the call's result; a call that the trajectory's end cancelled raises a 410."""
        await asyncio.wait([self._call])
        if self._call.cancelled():
            raise TITOError("tito_trajectory_closed", 410, "the trajectory ended under this call")
        return self._call.result()

    async def _end(self, response: web.StreamResponse, result: TITOCallResult) -> None:
        await response.write_eof()
        self._written = True
        await self._trajectory.emitted(result.turn_id, "completed")


def _chunks(answer: Mapping[str, Any], *, usage: bool) -> list[dict[str, Any]]:
    (choice,) = answer["choices"]
    message = dict(choice["message"])
    if message.get("tool_calls"):
        calls = enumerate(message["tool_calls"])
        message["tool_calls"] = [{**call, "index": index} for index, call in calls]
    common = {name: answer[name] for name in ("id", "created", "model")}
    common["object"] = "chat.completion.chunk"
    deltas: list[tuple[Any, Any]] = [(message, None), ({}, choice["finish_reason"])]
    chunks = [
        {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        for delta, reason in deltas
    ]
    chunks[0]["choices"][0]["logprobs"] = choice["logprobs"]
    return [*chunks, {**common, "choices": [], "usage": answer["usage"]}] if usage else chunks


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), separators=(",", ":"), ensure_ascii=False).encode()
