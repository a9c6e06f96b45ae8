"""What a deployment does with samplers and snapshots, against a control plane in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import web

from fireworks_training import AsyncFiretitanServiceClient, InvalidArgument
from fireworks_training.testing import ControlPlaneServer
from fireworks_training.testing.control_plane_server import DEPLOYMENTS, HOT_LOAD


class Noting(ControlPlaneServer):
    """Notes the headers of hot loads."""

    headers: list[str]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == HOT_LOAD:
            self.headers = [*getattr(self, "headers", []), request.headers["fireworks-model"]]
        return await super().handle(request)


@pytest.fixture
def stub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Noting]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with Noting() as running:
        yield running


@pytest.fixture
async def service(stub: Noting) -> AsyncIterator[AsyncFiretitanServiceClient]:
    stub.put(DEPLOYMENTS, "serving", baseModel="accounts/x/models/tiny-fp8")
    async with AsyncFiretitanServiceClient.from_firetitan_config(
        api_key="key",
        base_url=stub.url,
        base_model="accounts/x/models/tiny",
        deployment_id="serving",
    ) as made:
        yield made


async def test_without_a_tokenizer_there_is_a_sampler_for_token_ids(
    service: AsyncFiretitanServiceClient, stub: Noting
) -> None:
    for sampler in (
        await service.create_deployment_sampler("snapshot"),
        await service.create_deployment_sampler_for_model("accounts/x/models/judge"),
        (await service.create_sampling_client("snapshot")).deployment_sampler,
    ):
        assert sampler.tokenizer is None
        with pytest.raises(InvalidArgument, match="tokenizer"):
            await sampler.sample_with_tokens([{"role": "user", "content": "hi"}])
    assert stub.loads == ["snapshot"]
    with pytest.raises(InvalidArgument, match="tokenizer"):
        await service.get_tokenizer()


async def test_a_hot_load_names_the_model_that_the_deployment_serves(
    service: AsyncFiretitanServiceClient, stub: Noting
) -> None:
    await service.hotload_sampler_snapshot("snapshot")
    assert set(stub.headers) == {"accounts/x/models/tiny-fp8"}
