"""A sidecar before a server of scripted answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from fireworks_training import (
    ChatTemplateRenderer,
    DeploymentSampler,
    FixedConcurrencyController,
    TITOSidecar,
)
from fireworks_training.testing import CompletionsServer
from tests.async_.sampling.support import KEY, MODEL, quick
from tests.tito.support import Characters

Sidecars = Callable[..., Any]


@pytest.fixture
async def server() -> AsyncIterator[CompletionsServer]:
    async with CompletionsServer() as running:
        yield running


@pytest.fixture
async def sampler(server: CompletionsServer) -> AsyncIterator[DeploymentSampler]:
    made = DeploymentSampler(
        server.url,
        MODEL,
        KEY,
        concurrency_controller=FixedConcurrencyController(4),
        retries=quick(attempts=2),
    )
    async with made:
        yield made


@pytest.fixture
async def sidecars(sampler: DeploymentSampler) -> AsyncIterator[Sidecars]:
    """Makes and starts sidecars; closes them at the end."""
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> TITOSidecar:
            options.setdefault("renderer", ChatTemplateRenderer(Characters()))
            limits = {"max_context_tokens": 400, "max_output_tokens": 40}
            sidecar = TITOSidecar.from_deployment_sampler(sampler, **{**limits, **options})
            return await stack.enter_async_context(sidecar)

        yield make
