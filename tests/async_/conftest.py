"""A training client on a stub trainer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fireworks_training import AsyncFiretitanTrainingClient, FiretitanProvisioningConfig
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.model import RemoteModel
from fireworks_training._async.training.session import TrainerSession
from fireworks_training._async.weights.publisher import WeightPublisher
from fireworks_training._core.snapshots import Chain
from fireworks_training.testing import TrainerServer
from tests.fault_proxy import FaultProxy

Connect = Callable[..., Any]


class NoDeployment:
    """Counts what is saved, and serves nothing."""

    def __init__(self) -> None:
        self.chain = Chain()

    async def weights(self) -> Any:
        raise AssertionError("this test has no deployment")

    of_probe = weights


@asynccontextmanager
async def connected(
    stub: TrainerServer, *, through: FaultProxy | None = None, **options: Any
) -> AsyncIterator[AsyncFiretitanTrainingClient]:
    """A training client of `stub`; everything is closed at the end."""
    async with contextlib.AsyncExitStack() as stack:
        url = (await stack.enter_async_context(stub)).url
        if through is not None:
            through.target = url
            url = await stack.enter_async_context(through.running())
        yield await stack.enter_async_context(_client(url, **options))


@asynccontextmanager
async def _client(url: str, **options: Any) -> AsyncIterator[AsyncFiretitanTrainingClient]:
    owner = OwnerLoop()
    owner.get()

    def make(loop: OwnerLoop) -> Transport:
        return Transport(owner=loop, base_url=url, api_key="tml-test")

    transport = make(owner)
    session = TrainerSession(transport, make, transport.base_url)
    await session.open(None)
    config = FiretitanProvisioningConfig(
        base_model="accounts/test/models/stub", dialect=options.pop("dialect", None)
    )
    publisher = WeightPublisher(owner, NoDeployment())
    try:
        capabilities = await session.create_model(config)
        model = RemoteModel(session, capabilities, config, owner=owner, **options)
        try:
            yield AsyncFiretitanTrainingClient(model, publisher)
        finally:
            await model.close(drain=False)
    finally:
        await session.close()
        await transport.close()


@pytest.fixture
def connect() -> Callable[..., Any]:
    return connected


Run = Coroutine[Any, Any, None]
