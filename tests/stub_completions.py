"""A completions server for tests: real HTTP, scripted faults, and a count of what it sees."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import orjson
from aiohttp import web

Behaviour = Callable[
    ["CompletionServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]
]


def event(payload: object, *, kind: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    data = payload if isinstance(payload, bytes) else orjson.dumps(payload)
    return head + b"data: " + data + b"\n\n"


def tokens_of(body: dict[str, Any]) -> list[int]:
    """What the server samples: as many tokens as asked for, the last ids of the prompt on."""
    start = body["prompt"][-1] + 1
    return list(range(start, start + body["max_tokens"]))


def token_chunk(token: int, *, logprobs: bool, **extra: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": f"<{token}>"}
    if logprobs:
        entry = {"token_id": token, "logprob": -token / 8, "sampling_logprob": -token / 16}
        choice["logprobs"] = {"content": [entry | extra]}
    return {"id": "cmpl-1", "choices": [choice]}


def last_chunk(body: dict[str, Any], ids: list[int], **perf: Any) -> dict[str, Any]:
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
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def complete(
    server: CompletionServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """A whole completion, token by token."""
    response = await open_stream(request)
    ids = tokens_of(body)
    for token in ids:
        await response.write(event(token_chunk(token, logprobs=bool(body.get("logprobs")))))
    await response.write(event(last_chunk(body, ids)) + event(b"[DONE]"))
    await response.write_eof()
    return response


def status(code: int, body: object = None, **headers: str) -> Behaviour:
    """An answer with an error status."""

    async def answer(
        server: CompletionServer, request: web.Request, sent: dict[str, Any]
    ) -> web.StreamResponse:
        data = body if isinstance(body, bytes) else orjson.dumps(body or {})
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=code, body=data, headers=named)

    return answer


def stream(*pieces: object, end: bool = True) -> Behaviour:
    """A stream of these pieces (bytes as they are, others as events), then its end, or a reset."""

    async def answer(
        server: CompletionServer, request: web.Request, sent: dict[str, Any]
    ) -> web.StreamResponse:
        response = await open_stream(request)
        for piece in pieces:
            await response.write(piece if isinstance(piece, bytes) else event(piece))
        if end:
            await response.write_eof()
        else:
            assert request.transport is not None
            request.transport.abort()
        return response

    return answer


async def hang_before_headers(
    server: CompletionServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Never answers; counts as generating until the client goes away."""
    server.reached.set()
    await server.until_the_client_leaves()
    raise AssertionError


async def hang_mid_stream(
    server: CompletionServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Sends a token, and then nothing until the client goes away."""
    response = await open_stream(request)
    await response.write(event(token_chunk(5, logprobs=False)))
    server.reached.set()
    await server.until_the_client_leaves()
    raise AssertionError


async def pause_mid_stream(
    server: CompletionServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Sends the first token, waits for `go_on`, sends the rest."""
    response = await open_stream(request)
    first, *rest = tokens_of(body)
    await response.write(event(token_chunk(first, logprobs=True)))
    server.reached.set()
    await server.go_on.wait()
    for token in rest:
        await response.write(event(token_chunk(token, logprobs=True)))
    await response.write(event(last_chunk(body, [first, *rest])) + event(b"[DONE]"))
    await response.write_eof()
    return response


async def hang_headers_only(
    server: CompletionServer, request: web.Request, body: dict[str, Any]
) -> web.StreamResponse:
    """Sends headers, and no byte of the stream."""
    await open_stream(request)
    server.reached.set()
    await server.until_the_client_leaves()
    raise AssertionError


class CompletionServer:
    """What it was asked, what it does about it, and who is connected.

    Attributes:
        script: behaviours of the first requests, in order.
        otherwise: behaviour of the requests after those.
        bodies, headers: of each request, in order.
        peers: ports of the clients' connections, one entry a connection.
        generating: requests that are being answered.
        left: requests whose client went away before the answer's end.
        peak: most requests answered at once.
        reached: a behaviour that hangs has come to where it does.
        go_on: lets `pause_mid_stream` go on.
        idle: nothing is being answered.
    """

    def __init__(self) -> None:
        self.url = ""
        self.script: list[Behaviour] = []
        self.otherwise: Behaviour = complete
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.peers: set[int] = set()
        self.generating = 0
        self.left = 0
        self.peak = 0
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()
        self.idle = asyncio.Event()

    async def until_the_client_leaves(self) -> None:
        await asyncio.Event().wait()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.bodies.append(body)
        self.headers.append(request.headers)
        assert request.transport is not None
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


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[CompletionServer]:
    server = CompletionServer()
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/inference/v1/completions", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def serving_in_a_thread() -> Iterator[CompletionServer]:
    """The server on a loop of its own, for tests that block theirs or have none."""
    ready: queue.Queue[tuple[CompletionServer, asyncio.AbstractEventLoop]] = queue.Queue()
    end = asyncio.Event()

    async def serve() -> None:
        async with serving() as server:
            ready.put((server, asyncio.get_running_loop()))
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    server, loop = ready.get(timeout=10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
