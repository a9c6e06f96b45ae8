"""A gateway over pretended workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fireworks_training.local.processes import lifetime
from tests.local.gateway.platform_fakes import Gateway, PlatformFolders, write_model


@pytest.fixture
async def folders(tmp_path: Path) -> AsyncIterator[PlatformFolders]:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    model_dir = write_model(tmp_path / "model")
    made = PlatformFolders(lifetime.make_runtime_dir(), state_dir, model_dir)
    yield made
    await made.end()


@pytest.fixture
async def gateway(folders: PlatformFolders) -> AsyncIterator[Gateway]:
    async with folders.gateway() as running:
        yield running
