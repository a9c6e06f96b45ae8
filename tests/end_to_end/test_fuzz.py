"""A whole platform under fuzzed requests, idle connections and bombs: it answers throughout."""

from __future__ import annotations

import asyncio
import io
import os
import time
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from fireworks_training._wire.training.compression import compress
from fireworks_training.local.gateway.__main__ import add_serving_routes
from fireworks_training.local.gateway.app import Parts, create_app
from fireworks_training.local.settings import GatewaySettings
from tests.conftest import RunningPlatform
from tests.end_to_end.support import model_folder
from tests.local.gateway.fuzzing import FuzzedRequest, requests, routes_of
from tests.local.processes.support import descendants

REQUESTS = 10_000
AT_ONCE = 8
IDLE = 2_000
MOST_GROWTH = 256 << 20


async def _send(
    session: aiohttp.ClientSession, platform: RunningPlatform, request: FuzzedRequest
) -> int:
    try:
        async with (
            asyncio.timeout(3),
            session.request(
                request.method,
                URL(platform.base_url + request.path, encoded=True),
                data=io.BytesIO(request.body) if request.body else None,
                headers={"X-API-Key": platform.api_key, **request.headers},
                allow_redirects=False,
            ) as response,
        ):
            await response.read()
            return response.status
    except (TimeoutError, aiohttp.ClientError):
        return 0


async def _healthz(session: aiohttp.ClientSession, platform: RunningPlatform) -> float:
    """Seconds that an answer takes."""
    began = time.monotonic()
    headers = {"X-API-Key": platform.api_key}
    async with session.get(f"{platform.base_url}/healthz", headers=headers) as response:
        assert response.status == 200
    return time.monotonic() - began


def _gateway(platform: RunningPlatform) -> int:
    module = "fireworks_training.local.gateway"
    for pid in descendants(platform.process.pid):
        if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
            return pid
    raise LookupError(module)


def _memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _routes(tmp_path: Path) -> list[tuple[str, str]]:
    """The routes of a platform, of an application that is never started."""
    settings = GatewaySettings(
        socket_fd=-1,
        lifetime_fd=-1,
        host="127.0.0.1",
        port=0,
        api_key="tml-not-used-here",
        runtime_dir=str(tmp_path),
        state_dir=str(tmp_path),
        models={"tiny-qwen3": str(model_folder())},
        default_model="tiny-qwen3",
    )

    async def none(*_: object) -> None:
        raise AssertionError("it is never started")

    parts = Parts(none, none, add_serving_routes)  # type: ignore[arg-type]
    return routes_of(create_app(settings, parts))


def _bombs(session: str) -> list[FuzzedRequest]:
    run = f"{session}:train:0".encode()
    head = b"\x0a" + bytes([len(run)]) + run
    packed = {"Content-Type": "application/x-protobuf", "Content-Encoding": "zstd"}
    plain = {"Content-Type": "application/json"}
    many = b'{"model_id":"' + run + b'","seq_id":1,"forward_input":{"data":['
    return [
        FuzzedRequest("POST", "/api/v1/forward", compress(head + b"\x22\0" * 4_000_000), packed),
        FuzzedRequest("POST", "/api/v1/forward", compress(head + bytes(1 << 28)), packed),
        FuzzedRequest("POST", "/api/v1/forward", many + b"{}," * 9_000_000 + b"{}]}}", plain),
        FuzzedRequest("POST", "/api/v1/asample", b'{"x":[' + b"{}," * 9_000_000 + b"0]}", plain),
        FuzzedRequest("POST", "/api/v1/asample", b'{"x":[' + b"0," * 1_000_000 + b"0]}", plain),
        FuzzedRequest("POST", "/api/v1/create_session", b"[" + b"0," * 9_000_000 + b"0]", plain),
        FuzzedRequest(
            "POST", "/inference/v1/completions", b'{"x":[' + b"0," * 9_000_000 + b"0]}", plain
        ),
    ]


@pytest.mark.slow
async def test_a_platform_answers_under_fuzz_idle_connections_and_bombs(
    platform: RunningPlatform, tmp_path: Path
) -> None:
    address = URL(platform.base_url)
    pid = _gateway(platform)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        headers = {"X-API-Key": platform.api_key}
        url = f"{platform.base_url}/api/v1/create_session"
        async with session.post(url, json={}, headers=headers) as response:
            known = [(await response.json())["session_id"]]
        idle = [await asyncio.open_connection(address.host, address.port) for _ in range(IDLE)]
        waited: list[float] = []
        statuses: list[tuple[FuzzedRequest, int]] = []
        queue = iter([*requests(_routes(tmp_path), 7, REQUESTS, known)])

        async def work() -> None:
            for request in queue:
                status = await _send(session, platform, request)
                statuses.append((request, status))

        async def look() -> None:
            while True:
                waited.append(await _healthz(session, platform))
                await asyncio.sleep(0.05)

        before = _memory(pid)
        watch = asyncio.create_task(look())
        try:
            await asyncio.gather(*(work() for _ in range(AT_ONCE)))
            for bomb in _bombs(known[0]):
                status = await _send(session, platform, bomb)
                statuses.append((bomb, status))
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            for _, writer in idle:
                writer.close()
    assert not [request for request, status in statuses if status == 500]
    # Negative control: they arrived, and were answered.
    assert len(statuses) > REQUESTS
    assert sum(status == 0 for _, status in statuses) < REQUESTS / 10
    slow = sorted(waited)[int(len(waited) * 0.99)]
    growth = _memory(pid) - before
    print(f"healthz: p99 {slow * 1e3:.0f} ms, most {max(waited) * 1e3:.0f} ms of {len(waited)};")
    print(f"growth {growth >> 20} MB")
    assert slow < 0.2, f"the 99th of 100 looks took {slow:.3f} s"
    assert growth < MOST_GROWTH
    assert _gateway(platform) == pid
