"""A server with the Tinker API and nothing else: it refuses requests that tinker's types refuse.

Behind it the platform's trainer does the work; what only that offers is left out of its answers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pydantic
from aiohttp import web
from tinker import types
from tinker.types.client_config_request import ClientConfigRequest
from tinker.types.create_model_request import CreateModelRequest
from tinker.types.create_session_request import CreateSessionRequest
from tinker.types.get_info_request import GetInfoRequest
from tinker.types.load_weights_request import LoadWeightsRequest
from tinker.types.optim_step_request import OptimStepRequest
from tinker.types.save_weights_for_sampler_request import SaveWeightsForSamplerRequest
from tinker.types.save_weights_request import SaveWeightsRequest
from tinker.types.session_heartbeat_request import SessionHeartbeatRequest
from tinker.types.unload_model_request import UnloadModelRequest

from tests.conftest import RunningPlatform

PROTOBUF = "application/x-protobuf"
ASKED: dict[str, type[pydantic.BaseModel] | None] = {
    "client/config": ClientConfigRequest,
    "create_session": CreateSessionRequest,
    "session_heartbeat": SessionHeartbeatRequest,
    "create_model": CreateModelRequest,
    "get_info": GetInfoRequest,
    "optim_step": OptimStepRequest,
    "save_weights": SaveWeightsRequest,
    "load_weights": LoadWeightsRequest,
    "save_weights_for_sampler": SaveWeightsForSamplerRequest,
    "unload_model": UnloadModelRequest,
    "retrieve_future": types.FutureRetrieveRequest,
    "get_server_capabilities": None,
    "forward_backward": None,
}
"""Lists the routes and the types of their JSON bodies; None: protobuf, or no body."""
MADE = ("type", "model_id", "request_id", "base_model")


@asynccontextmanager
async def tinker_server(platform: RunningPlatform) -> AsyncIterator[tuple[str, Counter[str]]]:
    """Serve before a platform; yields the URL, and the requests by route and `refused <route>`."""
    counts: Counter[str] = Counter()
    session = aiohttp.ClientSession(auto_decompress=False)

    async def answer(request: web.Request) -> web.Response:
        route, body = request.path.removeprefix("/api/v1/"), await request.read()
        counts[route] += 1
        if (wrong := _wrong(route, request.content_type, body)) is not None:
            counts[f"refused {route}"] += 1
            return web.json_response({"detail": wrong}, status=404 if route not in ASKED else 422)
        headers = {k: v for k, v in request.headers.items() if k in ("X-API-Key", "Content-Type")}
        url = platform.base_url + request.raw_path
        async with session.request(request.method, url, headers=headers, data=body) as upstream:
            told, kind = await upstream.read(), upstream.headers.get("Content-Type", "")
            passed = {"Content-Type": kind}
            return web.Response(body=_plain(told, kind), status=upstream.status, headers=passed)

    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", counts
    finally:
        await runner.cleanup()
        await session.close()


def _wrong(route: str, content_type: str, body: bytes) -> str | None:
    if route not in ASKED:
        return "no such route"
    kind = ASKED[route]
    if kind is None:
        return None if not body or content_type == PROTOBUF else "protobuf is wanted"
    try:
        kind.model_validate(json.loads(body))
    except ValueError as error:
        return str(error)
    return None


def _plain(told: bytes, kind: str) -> bytes:
    """Take the fields that only the platform has out of an answer to create_model."""
    if "json" not in kind:
        return told
    said: Any = json.loads(told)
    if isinstance(said, dict) and said.get("type") == "create_model":
        return json.dumps({name: said[name] for name in MADE if name in said}).encode()
    return told
