"""A completions server with scripted answers and faults, which counts what it sees.

A `Behaviour` answers one request. The vocabulary: `complete` (a whole completion, of made-up
tokens), `completes(tokens, text)`, `status(429, Retry_After="1")`, `stream(piece, ..., end=False)`
(a cut), and `hang_before_headers`, `hang_headers_only`, `hang_mid_stream`, `pause_mid_stream`.
Write your own from `open_stream`, `event`, `token_chunk` and `last_chunk`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from fireworks_training._wire.completions.request import PATH
from fireworks_training.testing.loopback_server import LoopbackServer

Behaviour = Callable[
    ["CompletionsServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]
]
"""Answers a request: takes the server, the request and its JSON body, and returns the response."""


# -- pieces of a stream ----------------------------------------------------------------------------


def event(payload: object, *, kind: str | None = None) -> bytes:
    """Encode one server-sent event; bytes go into it as they are, anything else as JSON."""
    head = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    data = payload if isinstance(payload, bytes) else orjson.dumps(payload)
    return head + b"data: " + data + b"\n\n"


def tokens_of(body: Mapping[str, Any]) -> list[int]:
    """Make up a completion: as many tokens as asked for, the ids after the prompt's last one."""
    start = body["prompt"][-1] + 1
    return list(range(start, start + body["max_tokens"]))


def token_chunk(token: int, *, logprobs: bool, **extra: Any) -> dict[str, Any]:
    """Build the chunk of one token, with the text `<id>`.

    Args:
        token: its id; the logprob is `-token / 8`, the one of sampling `-token / 16`.
        logprobs: whether the chunk has them.
        **extra: further fields beside the logprobs.
    """
    choice: dict[str, Any] = {"index": 0, "text": f"<{token}>"}
    if logprobs:
        entry = {"token_id": token, "logprob": -token / 8, "sampling_logprob": -token / 16}
        choice["logprobs"] = {"content": [entry | extra]}
    return {"id": "cmpl-1", "choices": [choice]}


def last_chunk(body: Mapping[str, Any], ids: Sequence[int], **perf: Any) -> dict[str, Any]:
    """Build the chunk that ends a completion, finished by its length.

    Args:
        body: the request.
        ids: all tokens of the completion.
        **perf: figures beside the usual ones in `perf_metrics`; durations in seconds.
    """
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "raw_output": {"prompt_token_ids": body["prompt"], "completion_token_ids": ids},
    }
    return {
        "id": "cmpl-1",
        "choices": [choice],
        "usage": {"completion_tokens": len(ids)},
        "perf_metrics": {"prefill-queue-duration": 0.0, "prompt-tokens": len(body["prompt"])}
        | perf,
    }


async def open_stream(request: web.Request) -> web.StreamResponse:
    """Send the headers of a stream."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


# -- behaviours ------------------------------------------------------------------------------------


async def complete(
    server: CompletionsServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Answer a whole completion of made-up tokens, one event a token."""
    response = await open_stream(request)
    ids = tokens_of(body)
    for token in ids:
        await response.write(event(token_chunk(token, logprobs=bool(body.get("logprobs")))))
    return await _finish(server, response, body, ids)


def completes(tokens: Sequence[int], text: str, *, finish_reason: str = "stop") -> Behaviour:
    """Answer a completion of these tokens, each with a logprob of -1.0.

    Args:
        tokens: ids of the completion, at least one.
        text: the whole text; it comes with the first token.
        finish_reason: "stop", "length" or "tool_calls".
    """

    async def answer(
        server: CompletionsServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        response = await open_stream(request)
        for place, token in enumerate(tokens):
            figures = {"logprob": -1.0, "sampling_logprob": -1.0}
            chunk = token_chunk(token, logprobs=bool(body.get("logprobs")), **figures)
            chunk["choices"][0]["text"] = "" if place else text
            await response.write(event(chunk))
        return await _finish(server, response, body, tokens, finish_reason)

    return answer


async def _finish(
    server: CompletionsServer,
    response: web.StreamResponse,
    body: dict[str, Any],
    ids: Sequence[int],
    finish_reason: str = "length",
) -> web.StreamResponse:
    served = {} if server.snapshot is None else {"snapshot-identity": server.snapshot}
    last = last_chunk(body, ids, **served)
    last["choices"][0]["finish_reason"] = finish_reason
    await response.write(event(last) + event(b"[DONE]"))
    await response.write_eof()
    return response


def status(code: int, body: object = None, **headers: str) -> Behaviour:
    """Answer with an HTTP status and no completion.

    Args:
        code: the status.
        body: JSON, or bytes as they are; an empty object unless given.
        **headers: with underscores for dashes, such as `Retry_After="1"` (seconds).
    """

    async def answer(
        server: CompletionsServer, request: web.Request, sent: dict[str, Any]
    ) -> web.StreamResponse:
        data = body if isinstance(body, bytes) else orjson.dumps(body or {})
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=code, body=data, headers=named)

    return answer


def stream(*pieces: object, end: bool = True) -> Behaviour:
    """Answer with a stream of these pieces, then end it properly or reset the connection.

    Args:
        *pieces: bytes are sent as they are, anything else as the JSON of an event.
        end: False resets the connection after the last piece.
    """

    async def answer(
        server: CompletionsServer, request: web.Request, sent: dict[str, Any]
    ) -> web.StreamResponse:
        response = await open_stream(request)
        for piece in pieces:
            await response.write(piece if isinstance(piece, bytes) else event(piece))
        if end:
            await response.write_eof()
        elif request.transport is not None:
            request.transport.abort()
        return response

    return answer


async def hang_before_headers(
    server: CompletionsServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Never answer; the request counts as generating until its client goes away."""
    return await server.hang()


async def hang_headers_only(
    server: CompletionsServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Send headers, and no byte of the stream until the client goes away."""
    await open_stream(request)
    return await server.hang()


async def hang_mid_stream(
    server: CompletionsServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Send one token, and then nothing until the client goes away."""
    response = await open_stream(request)
    await response.write(event(token_chunk(5, logprobs=False)))
    return await server.hang()


async def pause_mid_stream(
    server: CompletionsServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Send the first token, wait for `server.go_on`, send the rest."""
    response = await open_stream(request)
    first, *rest = tokens_of(body)
    await response.write(event(token_chunk(first, logprobs=True)))
    server.reached.set()
    await server.go_on.wait()
    for token in rest:
        await response.write(event(token_chunk(token, logprobs=True)))
    return await _finish(server, response, body, [first, *rest])


# -- the server ------------------------------------------------------------------------------------


@dataclass(eq=False)
class CompletionsServer(LoopbackServer):
    """Answers completions requests as scripted, and notes them and their connections.

    Attributes:
        script: behaviours of the first requests, in the order they arrive; each is used up.
        otherwise: behaviour of all requests after those.
        snapshot: identity of the snapshot that completions say they were sampled from, or None.
        bodies, headers: JSON body and HTTP headers of each request, in the order of arrival.
        peers: ports of the clients' connections: as many as there were connections.
        generating: requests that are being answered now.
        left: requests whose client went away before the answer's end.
        peak: most requests that were answered at once.
        reached: set when a behaviour that hangs or pauses has come to where it does.
        go_on: set it to let `pause_mid_stream` go on.
        idle: set while nothing is being answered, after the first request.
    """

    script: list[Behaviour] = field(default_factory=list[Behaviour])
    otherwise: Behaviour = complete
    snapshot: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], init=False)
    headers: list[Mapping[str, str]] = field(default_factory=list[Mapping[str, str]], init=False)
    peers: set[int] = field(default_factory=set[int], init=False)
    generating: int = field(default=0, init=False)
    left: int = field(default=0, init=False)
    peak: int = field(default=0, init=False)
    reached: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    go_on: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    idle: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def hang(self) -> web.StreamResponse:
        """Set `reached` and wait until the client goes away; for behaviours of your own."""
        self.reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request by the script."""
        if request.path != PATH or request.transport is None:
            return web.Response(status=404)
        body: dict[str, Any] = orjson.loads(await request.read())
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.peers.add(request.transport.get_extra_info("peername")[1])
        behave = self.script.pop(0) if self.script else self.otherwise
        self.generating += 1
        self.peak = max(self.peak, self.generating)
        self.idle.clear()
        try:
            return await behave(self, request, body)
        except asyncio.CancelledError:
            self.left += 1
            raise
        except ConnectionResetError:
            self.left += 1
            return web.Response()
        finally:
            self.generating -= 1
            if not self.generating:
                self.idle.set()
