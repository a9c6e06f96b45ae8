"""A proxy that writes down what an official client and the platform say to each other.

Only with FIREWORKS_RECORD_WIRE=1; then `tests/wire/recorded/<name>.json` is written anew. Keys are
left out, and what differs from run to run stays: the replay puts its own ids in their place.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tests.conftest import RunningPlatform
from tests.end_to_end.support import model_folder

SWITCH = "FIREWORKS_RECORD_WIRE"
RECORDED = Path(__file__).parent.parent / "wire" / "recorded"
_KEPT_HEADERS = ("content-type", "content-encoding", "accept", "fireworks-deployment")
_DROPPED = ("host", "content-length", "transfer-encoding", "connection", "accept-encoding")
_QUIET = ("/api/v1/telemetry", "/api/v1/session_heartbeat")


def text_of(body: bytes, content_type: str) -> dict[str, Any]:
    """A body as JSON can hold it."""
    if "json" in content_type or content_type.startswith("text/"):
        return {"text": body.decode()}
    return {"base64": base64.b64encode(body).decode()}


@dataclass(frozen=True)
class Exchange:
    """A request as it came, with its body, and the answer that it got."""

    request: web.Request
    body: bytes
    status: int
    content_type: str
    answer: bytes


@asynccontextmanager
async def passing(
    platform: RunningPlatform, see: Callable[[Exchange], object]
) -> AsyncIterator[str]:
    """The URL of a proxy that shows every exchange with a platform to `see`."""
    session = aiohttp.ClientSession(auto_decompress=False)

    async def pass_on(request: web.Request) -> web.Response:
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        async with session.request(
            request.method, f"{platform.base_url}{request.raw_path}", headers=headers, data=body
        ) as upstream:
            answer = await upstream.read()
            kind = upstream.headers.get("content-type", "")
            see(Exchange(request, body, upstream.status, kind, answer))
            passed = {k: v for k, v in upstream.headers.items() if k.lower() not in _DROPPED}
            return web.Response(body=answer, status=upstream.status, headers=passed)

    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{tail:.*}", pass_on)
    runner = web.AppRunner(app, auto_decompress=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
        await session.close()


@asynccontextmanager
async def recording(platform: RunningPlatform, name: str) -> AsyncIterator[str | None]:
    """The URL of a recording proxy, or None when nothing is recorded."""
    if not os.environ.get(SWITCH):
        yield None
        return
    exchanges: list[dict[str, Any]] = []

    def note(seen: Exchange) -> None:
        request = seen.request
        waiting = seen.status == 503 or b'"try_again"' in seen.answer[:200]
        if request.path in _QUIET or request.method == "GET" or waiting:
            return
        kept = {k.lower(): v for k, v in request.headers.items() if k.lower() in _KEPT_HEADERS}
        exchanges.append(
            {
                "method": request.method,
                "path": request.raw_path,
                "headers": kept,
                "request": text_of(seen.body, request.content_type),
                "status": seen.status,
                "content_type": seen.content_type.partition(";")[0],
                "answer": text_of(seen.answer, seen.content_type),
            }
        )

    async with passing(platform, note) as url:
        yield url
    RECORDED.mkdir(exist_ok=True)
    text = json.dumps(exchanges, indent=1).replace(str(model_folder()), "{MODEL}")
    (RECORDED / f"{name}.json").write_text(text + "\n")
