"""Flow control of our connections: what is not paused is not resumed, and what is goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.client_proto import ResponseHandler

from fireworks_training._async.http.quiet_handler import Connector, QuietResponseHandler

SIZE = 8 * 2**20


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    async def many_chunks(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for number in range(100):
            await response.write(b"%4d" % number)
        await response.write_eof()
        return response

    async def large(_: web.Request) -> web.Response:
        return web.Response(body=bytes(SIZE))

    app = web.Application()
    app.router.add_get("/chunks", many_chunks)
    app.router.add_get("/large", large)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


class Calls(list[str]):
    """What reaches aiohttp of pausing and resuming."""

    def __init__(self) -> None:
        self.paused = asyncio.Event()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    pause, resume = ResponseHandler.pause_reading, ResponseHandler.resume_reading

    def noted_pause(self: ResponseHandler) -> None:
        calls.append("pause")
        calls.paused.set()
        pause(self)

    def noted_resume(self: ResponseHandler, resume_parser: bool = True) -> None:
        calls.append("resume")
        resume(self, resume_parser)

    monkeypatch.setattr(ResponseHandler, "pause_reading", noted_pause)
    monkeypatch.setattr(ResponseHandler, "resume_reading", noted_resume)
    return calls


async def test_chunks_that_come_as_they_are_read_resume_nothing(url: str, calls: list[str]) -> None:
    async with (
        aiohttp.ClientSession(connector=Connector()) as session,
        session.get(url + "/chunks") as response,
    ):
        assert isinstance(
            response.connection and response.connection.protocol, QuietResponseHandler
        )
        assert len(await response.content.read()) == 400
    assert calls == []
    async with aiohttp.ClientSession() as session, session.get(url + "/chunks") as response:
        assert len(await response.content.read()) == 400
    assert calls  # a bare aiohttp does; if it no longer does, this module can go


async def test_a_reader_that_is_behind_holds_the_server_up_and_misses_nothing(
    url: str, calls: Calls
) -> None:
    async with (
        aiohttp.ClientSession(connector=Connector()) as session,
        session.get(url + "/large") as response,
    ):
        await calls.paused.wait()
        assert response.content.total_bytes < SIZE
        read = 0
        while piece := await response.content.readany():
            read += len(piece)
    assert read == SIZE
    assert calls.count("resume") >= calls.count("pause")
