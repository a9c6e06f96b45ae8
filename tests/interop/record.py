"""A proxy that writes down what an official client and the platform say to each other.

Only with FIREWORKS_RECORD_WIRE=1; then `tests/wire/recorded/<name>.json` is written anew. Keys are
left out, and what differs from run to run stays: the replay puts its own ids in their place.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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


@asynccontextmanager
async def recording(platform: RunningPlatform, name: str) -> AsyncIterator[str | None]:
    """The URL of a recording proxy, or None when nothing is recorded."""
    if not os.environ.get(SWITCH):
        yield None
        return
    exchanges: list[dict[str, Any]] = []
    session = aiohttp.ClientSession(auto_decompress=False)

    async def pass_on(request: web.Request) -> web.Response:
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        async with session.request(
            request.method, f"{platform.base_url}{request.raw_path}", headers=headers, data=body
        ) as upstream:
            answer = await upstream.read()
            kind = upstream.headers.get("content-type", "")
            waiting = upstream.status == 503 or b'"try_again"' in answer[:200]
            if request.path not in _QUIET and request.method != "GET" and not waiting:
                exchanges.append(
                    {
                        "method": request.method,
                        "path": request.raw_path,
                        "headers": {
                            k.lower(): v
                            for k, v in request.headers.items()
                            if k.lower() in _KEPT_HEADERS
                        },
                        "request": text_of(body, request.content_type),
                        "status": upstream.status,
                        "content_type": kind.partition(";")[0],
                        "answer": text_of(answer, kind),
                    }
                )
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
    RECORDED.mkdir(exist_ok=True)
    text = json.dumps(exchanges, indent=1).replace(str(model_folder()), "{MODEL}")
    (RECORDED / f"{name}.json").write_text(text + "\n")
