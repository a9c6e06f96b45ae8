"""A control plane whose answers a test writes down, route by route."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer


class StubPlane:
    """Answers by path from `rows`; keeps every request as (method, path with query, body)."""

    def __init__(self, **rows: Any) -> None:
        self.rows: dict[str, list[Any]] = {
            "GET /v1/accounts": [{"accounts": [{"name": "accounts/me"}]}]
        }
        self.seen: list[tuple[str, str, Any]] = []

    def answer(self, route: str, *answers: Any) -> None:
        """The answers of a route, one a request; the last one stays. An int is a status."""
        self.rows[route] = list(answers)

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.method, request.raw_path, body))
        answers = self.rows.get(f"{request.method} {request.path}")
        if not answers:
            return web.json_response({"error": {"message": "nothing there"}}, status=404)
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, tuple):
            return web.json_response(answer[1], status=answer[0])
        return web.json_response(answer)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve; the base URL."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")
