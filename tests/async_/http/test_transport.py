"""One exchange and its errors, over real HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from fireworks_training import (
    AuthenticationFailed,
    ClientClosed,
    ConnectionFailed,
    NotFound,
    ProtocolError,
    RequestTimedOut,
    ServerFailed,
)
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._core.backoff import Backoff

KEY = "tml-do-not-show"
Answer = Callable[[web.Request], Any]


@pytest.fixture
async def answers() -> list[Answer]:
    return []


@pytest.fixture
async def transport(answers: list[Answer]) -> AsyncIterator[Transport]:
    async def handle(request: web.Request) -> web.StreamResponse:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        result: web.StreamResponse = await answer(request)
        return result

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    server = TestServer(app)
    await server.start_server()
    owner = OwnerLoop()
    owner.get()
    url = str(server.make_url(""))
    async with Transport(owner=owner, base_url=url, api_key=KEY) as made:
        yield made
    await server.close()


def answer(status: int, body: object = None, **headers: str) -> Answer:
    async def give(request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return give


async def test_every_request_is_signed(transport: Transport, answers: list[Answer]) -> None:
    seen: dict[str, str] = {}

    async def note(request: web.Request) -> web.Response:
        seen.update(request.headers)
        return web.json_response({})

    answers.append(note)
    await transport.call("GET", "/x", what="look")
    assert seen["X-API-Key"] == KEY
    assert seen["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(transport)


async def test_what_may_pass_is_tried_again_and_what_cannot_is_not(
    transport: Transport, answers: list[Answer]
) -> None:
    quick = Backoff(base=0.001)
    answers += [answer(503), answer(429), answer(200, {"ok": 1})]
    assert await transport.call("GET", "/x", what="look", backoff=quick) == {"ok": 1}
    answers[:] = [answer(401, {"error": "wrong key"}), answer(200, {})]
    with pytest.raises(AuthenticationFailed, match="wrong key"):
        await transport.call("GET", "/x", what="look")
    assert len(answers) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "gone fishing", "code": "X"}},
        {"error": "gone fishing"},
        {"detail": "gone fishing"},
        {"message": "gone fishing"},
    ],
)
async def test_the_servers_words_are_in_the_error(
    transport: Transport, answers: list[Answer], body: dict[str, Any]
) -> None:
    answers.append(answer(404, body, **{"x-request-id": "r-7"}))
    with pytest.raises(NotFound, match=r"look: .*404: gone fishing") as failure:
        await transport.call("GET", "/x", what="look")
    assert failure.value.request_id == "r-7"
    assert KEY not in str(failure.value)


async def test_an_answer_that_is_no_object_is_a_protocol_error(
    transport: Transport, answers: list[Answer]
) -> None:
    answers.append(answer(200, [1]))
    with pytest.raises(ProtocolError, match="not an object"):
        await transport.call("GET", "/x", what="look")


async def test_a_server_that_does_not_answer_times_out(
    transport: Transport, answers: list[Answer]
) -> None:
    async def never(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    answers.append(never)
    with pytest.raises(RequestTimedOut, match="no answer within"):
        await transport.exchange("GET", "/x", timeout=0.02)


async def test_a_budget_that_is_used_up_gives_the_last_error(
    transport: Transport, answers: list[Answer]
) -> None:
    answers.append(answer(500))
    with pytest.raises(ServerFailed):
        await transport.call("GET", "/x", what="look", backoff=Backoff(attempts=3, base=0.001))


async def test_nobody_there() -> None:
    owner = OwnerLoop()
    owner.get()
    url = f"http://127.0.0.1:{unused_port()}"
    async with Transport(owner=owner, base_url=url, api_key=KEY) as transport:
        with pytest.raises(ConnectionFailed, match=url):
            await transport.exchange("GET", "/x")


async def test_after_close(transport: Transport, answers: list[Answer]) -> None:
    await transport.close()
    await transport.close()
    with pytest.raises(ClientClosed):
        await transport.exchange("GET", "/x")


async def test_a_long_wait_speaks(caplog: pytest.LogCaptureFixture) -> None:
    async def slow() -> int:
        while "the answer" not in caplog.text:
            await asyncio.wait([asyncio.create_task(asyncio.sleep(0.001))])
        return 1

    with caplog.at_level(logging.WARNING):
        assert await log_if_slow(slow(), lambda: "the answer", first=0.001) == 1
    assert "waiting for" in caplog.text


async def test_cancelling_a_speaking_wait_cancels_the_work() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    wait = asyncio.create_task(log_if_slow(work(), lambda: "it"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    await asyncio.wait_for(ended.wait(), 5)
