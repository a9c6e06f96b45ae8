"""A proxy in front of a platform or a trainer that spoils chosen messages of the data plane.

Messages are the submits and polls of operations, counted in the order they arrive; `spoil` says
which of them meet which fault. A fault strikes once: what is sent again passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

FAULTS = ("drop", "duplicate", "delay", "reset", "408", "429", "500", "502", "500 after")
"""drop: executed, and the connection cut before the answer. reset: cut before it is executed.
duplicate: executed twice. A status is answered in the server's stead; "after": once it has executed
the request."""

PASSED_ON = ("Content-Type", "Content-Encoding", "X-API-Key", "Authorization", "Accept")
QUIET = ("session_heartbeat", "create_session", "create_model", "get_info", "finish")
DELAY = 0.05


@dataclass
class FaultProxy:
    """Passes requests on to a server, and spoils the messages that it was told to.

    Attributes:
        target: the URL behind it.
        spoil: faults by message, counted from `restart`.
        seen: messages since then.
        struck: faults that have struck since then.
    """

    target: str
    spoil: dict[int, str] = field(default_factory=dict)
    seen: int = 0
    struck: list[str] = field(default_factory=list)
    _session: ClientSession | None = None

    def restart(self, spoil: dict[int, str]) -> None:
        """Count messages from 0 again."""
        self.spoil, self.seen, self.struck = dict(spoil), 0, []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve; yields the URL."""
        app = web.Application(client_max_size=1 << 28)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        server = TestServer(app)
        await server.start_server()
        async with ClientSession(auto_decompress=False) as self._session:
            try:
                yield str(server.make_url("")).rstrip("/")
            finally:
                await server.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        fault = None
        counted = "/api/v1/" in request.path and request.method == "POST"
        if counted and not request.path.endswith(QUIET):
            fault = self.spoil.pop(self.seen, None)
            self.seen += 1
        if fault is None:
            return await self._forward(request, body)
        self.struck.append(fault)
        if fault == "reset":
            return _cut(request)
        if fault.isdigit():
            return web.json_response({"error": "spoilt"}, status=int(fault))
        if fault == "delay":
            await asyncio.sleep(DELAY)  # long enough for the messages behind it to overtake
        answer = await self._forward(request, body)
        if fault == "duplicate":
            answer = await self._forward(request, body)
        if fault == "drop":
            return _cut(request)
        if fault.endswith("after"):
            return web.json_response({"error": "spoilt"}, status=int(fault.split()[0]))
        return answer

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        assert self._session is not None
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        async with self._session.request(
            request.method, self.target + request.raw_path, data=body, headers=headers
        ) as answer:
            content = await answer.read()
            kept = {n: answer.headers[n] for n in ("Content-Type",) if n in answer.headers}
            return web.Response(status=answer.status, body=content, headers=kept)


def _cut(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()
