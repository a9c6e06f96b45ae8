"""A training client on a stub trainer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fireworks_training import AsyncFiretitanTrainingClient, FiretitanProvisioningConfig
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.publishing import Publishing
from fireworks_training._async.session import TrainerSession
from fireworks_training._async.transport import Transport
from fireworks_training._core.snapshots import Chain
from tests.stub_trainer import StubTrainer

Connect = Callable[..., Any]


async def _no_deployment() -> Any:
    raise AssertionError("this test has no deployment")


@asynccontextmanager
async def connected(
    stub: StubTrainer, **options: Any
) -> AsyncIterator[AsyncFiretitanTrainingClient]:
    """A training client of `stub`; everything is closed at the end."""
    server = await stub.start()
    owner = OwnerLoop()
    owner.get()

    def make(loop: OwnerLoop) -> Transport:
        return Transport(owner=loop, base_url=str(server.make_url("")), api_key="tml-test")

    transport = make(owner)
    session = TrainerSession(transport, make, transport.base_url)
    await session.open(None)
    config = FiretitanProvisioningConfig(base_model="accounts/test/models/stub")
    client = AsyncFiretitanTrainingClient(
        session,
        await session.create_model(config),
        config,
        owner=owner,
        publishing=Publishing(owner, Chain(), _no_deployment, _no_deployment),
        **options,
    )
    try:
        yield client
    finally:
        await client._close(drain=False)
        await session.close()
        await transport.close()
        await server.close()


@pytest.fixture
def connect() -> Callable[..., Any]:
    return connected


Run = Coroutine[Any, Any, None]
