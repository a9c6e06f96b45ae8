"""The Tinker API at the gateway: what it offers, and what it does not let in."""

from __future__ import annotations

import io
from typing import Any

import pytest

from fireworks_training._wire.training.compression import compress
from fireworks_training.local.results import MAX_BODY_BYTES
from fireworks_training.local.settings import OFFERS
from tests.local.gateway.platform_fakes import KEY, Gateway, PlatformFolders


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
