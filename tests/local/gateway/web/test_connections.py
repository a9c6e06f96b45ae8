"""Connections without a request: room for others beside them, their end, and what is logged."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from fireworks_training.local.gateway.app import (
    CONNECTION_OPTIONS,
    error_middleware,
    healthz,
    make_runner,
)
from fireworks_training.local.gateway.web import connections
from fireworks_training.local.gateway.web.connections import (
    Connections,
    most_connections,
    watch_middleware,
)
from fireworks_training.local.gateway.web.seldom import SeldomLog
from fireworks_training.testing import ManualClock

KEY = "tml-a-secret-key"


@asynccontextmanager
async def _served(most: int) -> AsyncIterator[tuple[Connections, tuple[str, int]]]:
    app = web.Application(middlewares=[watch_middleware, error_middleware])
    app.router.add_get("/healthz", healthz)
    app.router.add_post("/read", _read)
    runner = make_runner(app)
    await runner.setup()
    assert runner.server is not None
    listener = socket.create_server(("127.0.0.1", 0))
    made = Connections(runner.server, most, **CONNECTION_OPTIONS)
    accepting = await made.listen(listener)
    try:
        yield made, listener.getsockname()
    finally:
        accepting.close()
        await runner.cleanup()
        made.close()


async def _read(request: web.Request) -> web.Response:
    return web.json_response({"bytes": len(await request.read())})


async def _ask(address: tuple[str, int], request: bytes | None = None) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(request or b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer


async def test_idle_connections_make_room_for_one_that_asks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with _served(20) as (made, address):
        idle = [await asyncio.open_connection(*address) for _ in range(60)]
        assert b'"ok"' in await _ask(address)
        assert len(made) <= 20
        ended = [reader for reader, _ in idle if reader.at_eof() or reader.exception()]
        assert len(ended) >= 40
        assert idle[0][0] in ended
        assert idle[-1][0] not in ended
        for _, writer in idle:
            writer.close()
    assert sum("connections are open" in line for line in caplog.messages) == 1


async def test_a_connection_at_work_is_not_ended_for_a_new_one() -> None:
    async with _served(8) as (made, address):
        busy = [await asyncio.open_connection(*address) for _ in range(8)]
        for _, writer in busy:
            writer.write(b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nab")
        await _until(lambda: not made._fresh)
        assert await _ended(address)
        for reader, writer in busy:
            writer.write(b"cd")
            assert b"200" in await reader.readline()
            writer.close()


async def _ended(address: tuple[str, int]) -> bool:
    try:
        return not await _ask(address)
    except ConnectionError:
        return True


async def _until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the other side gives no event
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /heal",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow: ",
        b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nab",
    ],
)
async def test_silence_and_halves_are_ended(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LOOK_S", 0.001)
    async with _served(8) as (made, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        await _until(lambda: len(made) == 1)
        (connection,) = made._open
        if sent.startswith(b"POST"):
            await _until(lambda: connection.request is not None)
        # Negative control: what was heard of now is kept over many looks.
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert len(made) == 1
        connection.heard -= connections.SILENT_S + 1
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        assert not len(made)
        writer.close()


async def test_a_slow_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of a whole request owes nothing."""
    async with _served(8) as (made, address):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        (connection,) = made._open
        await _until(lambda: connection.request is None)
        assert connection.silent_since() is not None
        writer.close()


@pytest.mark.parametrize(
    "request_",
    [
        f"GET /healthz HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\x01\r\n\r\n",
        f"GET /healthz HTTP/1.1\nX-API-Key: {KEY}\n\n",
        f"GET /healthz HTTP/1.1\r\nX-API-Key {KEY}\r\n\r\n",
        f"{KEY} /healthz HTTP/1.1\r\n\r\n",
        f"GET /healthz?{KEY}\x01 HTTP/1.1\r\n\r\n",
        f"GET /healthz HTTP/{KEY}\r\n\r\n",
    ],
)
async def test_what_is_no_http_comes_back_in_no_answer_and_no_log(
    request_: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with _served(8) as (_, address):
        answer = await _ask(address, request_.encode())
        for _ in range(50):
            await _ask(address, request_.encode())
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert b"INVALID_ARGUMENT" in answer
    assert KEY.encode() not in answer
    assert KEY not in caplog.text
    assert "Traceback" not in caplog.text
    assert len([line for line in caplog.messages if "no HTTP" in line]) == 1


async def test_failed_accepts_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """What asyncio reports of an accept, by its own words (`BaseSelectorEventLoop`)."""
    async with _served(8):
        loop = asyncio.get_running_loop()
        for _ in range(1000):
            error = OSError(errno.EMFILE, "Too many open files")
            loop.call_exception_handler({"message": "", "exception": error, "socket": None})
        loop.call_exception_handler({"message": "another", "exception": OSError()})
    assert caplog.text.count("could not be accepted") == 1
    assert "another" in caplog.text


def test_the_most_leaves_descriptors_for_workers() -> None:
    assert [most_connections(limit) for limit in (4, 64, 1024, 1 << 20)] == [8, 48, 768, 16_384]


def test_seldom_lines_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    seldom = SeldomLog(logging.getLogger("seldom"), clock, every_s=10.0)
    for _ in range(1000):
        seldom.say("a")
    seldom.say("b")
    clock.advance(10.0)
    seldom.say("a")
    seldom.say("a")
    assert caplog.messages == ["a", "b", "a (999 more since the last line)"]
