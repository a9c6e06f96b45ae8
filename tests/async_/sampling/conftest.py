"""A completions server and samplers of it, on the portal and on the test's own loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.sampling.context import SamplerContext
from fireworks_training._async.sampling.sampler import DeploymentSampler, SamplerInternals
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import KEY, MODEL, Make, quick


@pytest.fixture
async def server() -> AsyncIterator[CompletionsServer]:
    async with stub.CompletionsServer() as running:
        yield running


@pytest.fixture
async def make(server: CompletionsServer) -> AsyncIterator[Make]:
    """Makes samplers of the server that live on the portal, and closes them."""
    async with contextlib.AsyncExitStack() as stack:

        def maker(**options: Any) -> DeploymentSampler:
            url = options.pop("url", server.url)
            sampler = DeploymentSampler(url, MODEL, KEY, **{"retries": quick(), **options})
            stack.push_async_callback(sampler.aclose)
            return sampler

        yield maker


@pytest.fixture
async def shared(server: CompletionsServer) -> AsyncIterator[Make]:
    """Makes samplers of the server on the test's own loop, as a service does."""
    owner = OwnerLoop()
    owner.get()
    transport = Transport(owner=owner, base_url=server.url, api_key=KEY)

    def maker(**options: Any) -> DeploymentSampler:
        url = options.pop("url", server.url)
        return SamplerInternals.over(
            SamplerContext(
                transport=transport,
                inference_url=url,
                model=MODEL,
                **{"retries": quick(), **options},
            )
        )

    yield maker
    await transport.close()


@pytest.fixture(params=["loop", "portal"])
def either(request: pytest.FixtureRequest, make: Make, shared: Make) -> Make:
    return make if request.param == "portal" else shared
