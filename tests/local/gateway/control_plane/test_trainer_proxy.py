"""The way to a job's trainer: what passes, what does not, and what a dead trainer answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from multidict import CIMultiDict
from yarl import URL

from fireworks_training.local.gateway.control_plane import trainer_proxy
from tests.local.gateway.platform_fakes import HTTP, KEY, MODEL, Gateway

DATA = "/training/v1/rlorTrainerJobs/local/j1"
HEADERS = {"X-API-Key": KEY}


async def test_bytes_pass_both_ways(gateway: Gateway) -> None:
    trainer = await gateway.job()
    sent = bytes(range(256)) * 10
    headers = {
        **HEADERS,
        "Authorization": f"Bearer {KEY}",
        "Cookie": "a=b",
        "Content-Type": "application/x-thing",
        "Content-Encoding": "zstd",
        "X-Idempotency-Key": "k-1",
        "x-request-id": "r-1",
        "TE": "trailers",
    }
    url = URL(f"{gateway.base_url}{DATA}/api/v1/forward?a=b%2Fc&d", encoded=True)
    async with gateway.session.post(url, data=sent, headers=headers) as response:
        assert response.status == 207
        assert await response.read() == sent
        assert response.headers["X-Answer"] == "yes"
        assert response.headers["Content-Type"] == "x/echo"
        assert response.headers["x-request-id"] == "r-1"
        assert "Keep-Alive" not in response.headers
    ((path, received, body),) = trainer.requests
    assert (path, body) == ("/api/v1/forward?a=b%2Fc&d", sent)
    names = {name.lower(): value for name, value in received.items()}
    assert names["content-type"] == "application/x-thing"
    assert names["content-encoding"] == "zstd"
    assert names["content-length"] == str(len(sent))
    assert names["x-idempotency-key"] == "k-1"
    assert names["x-request-id"] == "r-1"
    assert not {"x-api-key", "authorization", "cookie", "te"} & set(names)
    assert KEY not in str(received)


async def test_a_get_has_no_body(gateway: Gateway) -> None:
    trainer = await gateway.job()
    url = f"{gateway.base_url}{DATA}/api/v1/list_checkpoints"
    async with gateway.session.get(url, headers=HEADERS) as response:
        assert response.status == 207
    ((_, received, body),) = trainer.requests
    assert body == b""
    assert "Transfer-Encoding" not in received
    assert "Content-Type" not in received


def test_headers_of_one_connection_stay_there() -> None:
    headers = CIMultiDict({"Connection": "close, X-Mine", "X-Mine": "1", "X-Other": "2"})
    assert dict(trainer_proxy.forwarded_headers(headers)) == {"X-Other": "2"}


async def test_an_answer_is_passed_on_as_it_comes(gateway: Gateway) -> None:
    await gateway.job()
    arrived = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        # The second half is only sent once the first has come back: nothing waits for the whole.
        await arrived.wait()
        yield b"second"

    url = f"{gateway.base_url}{DATA}/api/v1/stream"
    async with asyncio.timeout(20):
        async with gateway.session.post(url, data=body(), headers=HEADERS) as response:
            assert await response.content.readexactly(5) == b"first"
            arrived.set()
            assert await response.content.read() == b"second"


@pytest.mark.parametrize(
    "tail",
    [
        "internal/alive",
        "api/v1/../../internal/alive",
        "api/v1/%2e%2e/%2e%2e/internal/alive",
        "api/v1/..%2f..%2finternal/alive",
        "api/v1//internal",
        "api/v1/",
        "api/v1/./x",
        "api/v1/a\\b",
        "",
    ],
)
async def test_only_the_data_plane_is_reached(gateway: Gateway, tail: str) -> None:
    trainer = await gateway.job()
    # By hand: a client would tidy the path up.
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(gateway.base_url).port)
    lines = [f"GET {DATA}/{tail} HTTP/1.1", "Host: localhost", f"X-API-Key: {KEY}"]
    writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode())
    async with asyncio.timeout(20):
        status = await reader.readline()
    writer.close()
    await writer.wait_closed()
    assert b" 404 " in status or b" 400 " in status
    assert trainer.requests == []


async def test_unknown_jobs(gateway: Gateway) -> None:
    await gateway.job()
    for path, status in (
        ("/training/v1/rlorTrainerJobs/local/j2/api/v1/x", 404),
        ("/training/v1/rlorTrainerJobs/other/j1/api/v1/x", 404),
        ("/training/v1/rlorTrainerJobs/local/J1/api/v1/x", 400),
    ):
        assert (await gateway.call("GET", path))[0] == status


async def test_a_job_that_starts_asks_for_patience(gateway: Gateway) -> None:
    gateway.spawner.gate.clear()
    body = {"trainingConfig": {"baseModel": MODEL}}
    await gateway.call("POST", f"{HTTP}/rlorTrainerJobs?rlorTrainerJobId=j1", body)
    url = f"{gateway.base_url}{DATA}/api/v1/healthz"
    async with gateway.session.get(url, headers=HEADERS) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
    gateway.spawner.gate.set()
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")


async def test_a_dead_trainer_answers_model_lost_in_flight_and_later(gateway: Gateway) -> None:
    trainer = await gateway.job()
    path = f"{DATA}/api/v1/hang"
    waiting = [asyncio.create_task(gateway.call("POST", path, {})) for _ in range(3)]
    await trainer.arrived.wait()
    trainer.die()
    for status, body in await asyncio.gather(*waiting):
        assert (status, body["error_class"]) == (410, "ModelLost")
    status, body = await gateway.call("POST", path, {})
    assert (status, body["error_class"]) == (410, "ModelLost")
    assert "resume" in body["error"]
    row = (await gateway.call("GET", f"{HTTP}/rlorTrainerJobs/j1"))[1]
    assert row["state"] == "JOB_STATE_FAILED"


async def test_a_deleted_job_answers_model_lost(gateway: Gateway) -> None:
    trainer = await gateway.job()
    waiting = asyncio.create_task(gateway.call("POST", f"{DATA}/api/v1/hang", {}))
    await trainer.arrived.wait()
    await gateway.call("DELETE", f"{HTTP}/rlorTrainerJobs/j1")
    status, body = await waiting
    assert (status, body["error_class"]) == (410, "ModelLost")
    assert "was deleted" in body["error"]


async def test_one_broken_exchange_is_not_a_lost_trainer(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_proxy, "LOST_WAIT_S", 0.01)
    await gateway.job()
    status, body = await gateway.call("POST", f"{DATA}/api/v1/break", {})
    assert (status, body["error"]["code"]) == (502, "UNAVAILABLE")
    row = (await gateway.call("GET", f"{HTTP}/rlorTrainerJobs/j1"))[1]
    assert row["state"] == "JOB_STATE_RUNNING"
    assert (await gateway.session.get(f"{gateway.base_url}{DATA}/api/v1/x", headers=HEADERS)).ok


async def test_a_client_that_goes_away_cancels_its_request(gateway: Gateway) -> None:
    trainer = await gateway.job()
    waiting = asyncio.create_task(gateway.call("POST", f"{DATA}/api/v1/hang", {}))
    await trainer.arrived.wait()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(20):
        await trainer.cancelled.wait()
    assert gateway.app[trainer_proxy.IN_FLIGHT] == {"j1": 0}


async def test_bodies_are_bounded_with_and_without_a_length(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_proxy, "MAX_BODY_BYTES", 1000)
    trainer = await gateway.job()
    url = f"{gateway.base_url}{DATA}/api/v1/forward"

    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 100

    async with gateway.session.post(url, data=b"x" * 1001, headers=HEADERS) as response:
        assert response.status == 413
    async with gateway.session.post(url, data=chunks(10), headers=HEADERS) as response:
        assert response.status == 207
    async with gateway.session.post(url, data=chunks(11), headers=HEADERS) as response:
        assert response.status == 413
    assert [len(body) for _, _, body in trainer.requests] == [1000]


async def test_requests_in_flight_are_bounded(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_proxy, "MAX_IN_FLIGHT", 1)
    trainer = await gateway.job()
    waiting = asyncio.create_task(gateway.call("POST", f"{DATA}/api/v1/hang", {}))
    await trainer.arrived.wait()
    assert (await gateway.call("POST", f"{DATA}/api/v1/x", {}))[0] == 429
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await trainer.cancelled.wait()
    url = f"{gateway.base_url}{DATA}/api/v1/x"
    async with gateway.session.get(url, headers=HEADERS) as response:
        assert response.status == 207


async def test_connections_to_the_trainer_are_kept(gateway: Gateway) -> None:
    trainer = await gateway.job()
    assert trainer.runner is not None
    assert trainer.runner.server is not None
    for _ in range(5):
        url = f"{gateway.base_url}{DATA}/api/v1/x"
        async with gateway.session.get(url, headers=HEADERS) as response:
            assert isinstance(response, aiohttp.ClientResponse)
            await response.read()
    # One for the alive stream, one for the requests.
    assert len(trainer.runner.server.connections) <= 2
