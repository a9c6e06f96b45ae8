"""The Tinker API at the gateway: what it offers, and what it does not let in."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fireworks_training._wire.training.compression import compress
from fireworks_training.local.gateway.tinker.training import TRAINING
from fireworks_training.local.results import MAX_BODY_BYTES
from fireworks_training.local.settings import OFFERS
from tests.local.gateway.platform_fakes import KEY, MODEL, Gateway, PlatformFolders


async def post(gateway: Gateway, path: str, **options: Any) -> tuple[int, Any]:
    headers = {"X-API-Key": KEY, **options.pop("headers", {})}
    url = f"{gateway.base_url}/api/v1/{path}"
    async with gateway.session.post(url, headers=headers, **options) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("offers", [(), ("zstd",), tuple(OFFERS)])
async def test_clients_are_told_what_to_use(
    folders: PlatformFolders, offers: tuple[str, ...]
) -> None:
    async with folders.gateway(offers=offers) as gateway:
        status, config = await post(gateway, "client/config", json={"sdk_version": "0.38.0"})
    assert (status, config) == (200, {OFFERS[offer]: True for offer in offers})


async def test_batch_polls_are_bounded(gateway: Gateway) -> None:
    status, answer = await post(
        gateway, "retrieve_futures", data=io.BytesIO(b" " * (MAX_BODY_BYTES + 1))
    )
    assert status == 413
    status, answer = await post(gateway, "retrieve_futures", data=b"{}")
    assert (status, "target" in answer["error"]["message"]) == (400, True)
    target = {"type": "sampling_session", "sampling_session_id": f"ts-{'0' * 32}:sampler:0"}
    assert (await post(gateway, "retrieve_futures", json={"target": target}))[0] == 404
    model = {"type": "model", "model_id": f"ts-{'0' * 32}:train:0"}
    status, answer = await post(gateway, "retrieve_futures", json={"target": model})
    assert (status, answer["error_class"]) == (410, "ModelLost")


async def test_only_the_head_of_a_compressed_body_is_unpacked(gateway: Gateway) -> None:
    headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "zstd"}
    # 64 MB in some kB: which run it is about is found without unpacking them.
    run = f"ts-{'0' * 32}:train:0".encode()
    bomb = compress(b"\x0a" + bytes([len(run)]) + run + bytes(1 << 26))
    assert len(bomb) < 1 << 15
    status, answer = await post(gateway, "forward_backward", data=bomb, headers=headers)
    assert (status, answer["error_class"]) == (410, "ModelLost")
    status, answer = await post(gateway, "forward_backward", data=b"no zstd", headers=headers)
    assert (status, "no zstd" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize("session", ["nothing", f"ts-{'0' * 32}", "ts-x", "..%2F..%2Fx"])
async def test_unknown_sessions_are_404_and_not_kept(gateway: Gateway, session: str) -> None:
    training = gateway.app[TRAINING]
    for _ in range(3):
        assert (await post(gateway, f"sessions/{session}/finish", json={}))[0] == 404
        body = {"session_id": session}
        assert (await post(gateway, "session_heartbeat", json=body))[0] == 404
        body |= {"model_seq_id": 0, "base_model": MODEL}
        assert (await post(gateway, "create_model", json=body))[0] == 404
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
        assert (await post(gateway, "create_sampling_session", json=body))[0] == 404
    assert not training._sessions
    assert not training._runs


async def test_a_session_outlives_the_gateway(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        _, made = await post(gateway, "create_session", json={})
        _, ended = await post(gateway, "create_session", json={})
        await post(gateway, f"sessions/{ended['session_id']}/finish", json={})
    async with folders.gateway() as gateway:
        for session, status in ((made["session_id"], 200), (ended["session_id"], 410)):
            body = {"session_id": session}
            assert (await post(gateway, "session_heartbeat", json=body))[0] == status


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("retrieve_futures", {"timeout": "HUGE"}),
        ("retrieve_futures", {"prev_cursor": "HUGE"}),
        ("asample", {"sampling_params": {"top_k": "HUGE"}, "prompt": {"chunks": []}}),
        ("asample", {"sampling_params": {"temperature": "HUGE"}, "prompt": {"chunks": []}}),
        ("asample", {"sampling_params": {"max_tokens": "HUGE"}, "prompt": {"chunks": []}}),
    ],
)
async def test_huge_numbers_are_refused(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    target = {"type": "sampling_session", "sampling_session_id": f"ts-{'0' * 32}:sampler:0"}
    body = {"target": target, **body} if path == "retrieve_futures" else body
    raw = json.dumps(body).replace('"HUGE"', "1" + "0" * 400)
    assert (await post(gateway, path, data=raw.encode()))[0] in (400, 404)


async def test_active_sessions_are_searched_by_reasons(gateway: Gateway) -> None:
    _, made = await post(gateway, "create_session", json={})
    for wanted, found in (
        ({"type": "active"}, True),
        ({"type": "active", "reasons": ["success"]}, False),
        ({"type": "client_finished", "reasons": ["success"]}, False),
    ):
        body = {"session_id": made["session_id"], "statuses": [wanted]}
        status, answer = await post(gateway, "sessions/search", json=body)
        assert status == 200
        assert bool(answer["sessions"]) is found


@pytest.mark.parametrize("padding", [0, 1 << 17])
async def test_the_run_of_a_large_body_is_found_unparsed(gateway: Gateway, padding: int) -> None:
    run = f"ts-{'0' * 32}:train:0"
    pad = b'"pad":"' + b"x" * padding + b'",'
    for body, status in (
        (b'{%b"model_id": "%b"}' % (pad, run.encode()), 410),
        (b'{"model_id" :\n"%b",%b"seq_id":1}' % (run.encode(), pad), 410),
        (b'{%b"seq_id":1}' % pad, 400),
        (b'{%b"model_id":5}' % pad, 400),
        (b'{%b"model_id":""}' % pad, 400),
    ):
        assert (await post(gateway, "forward", data=body))[0] == status, body[-60:]
    twice = b'{%b"model_id":"a","x":{"model_id":"b"}}' % pad
    assert (await post(gateway, "forward", data=twice))[0] == (400 if padding else 410)


_SMALL = (
    "create_session",
    "session_heartbeat",
    "create_model",
    "sessions/x/finish",
    "cancel_future",
)


@pytest.mark.parametrize("path", [*_SMALL, "sessions/search", "client/config", "retrieve_future"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_small_routes_take_small_bodies(gateway: Gateway, path: str, chunked: bool) -> None:
    body = b" " * ((1 << 20) + 1)
    data = io.BytesIO(body) if not chunked else _pieces(body)
    assert (await post(gateway, path, data=data))[0] == 413


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]


@pytest.mark.parametrize("path", ["api/v1/asample", "inference/v1/completions"])
@pytest.mark.parametrize("part", [b"{},", b"[],", b"0,"])
async def test_a_body_of_many_values_is_not_parsed(
    gateway: Gateway, path: str, part: bytes
) -> None:
    body = b'{"x":[' + part * 1_500_000 + b"0]}"
    url = f"{gateway.base_url}/{path}"
    headers = {"X-API-Key": KEY}
    async with gateway.session.post(url, headers=headers, data=io.BytesIO(body)) as response:
        assert response.status in (404, 413)  # the stand-in gateway serves no completions
        if response.status == 413:
            assert "the body has over" in await response.text()
