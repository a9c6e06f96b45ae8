"""A tiny random model, and a trainer app around it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from fireworks_training.local.model.model import configure_torch
from fireworks_training.local.trainer.app import create_app
from fireworks_training.local.trainer.settings import TrainerSettings
from tests.local.trainer.trainer_driver import (
    HTTP,
    Starter,
    Trainer,
    new_model,
    save_tiny_model,
)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: Qwen3, 2 layers, hidden 32, vocabulary 64, untied."""
    configure_torch()
    path = tmp_path_factory.mktemp("tiny-qwen3")
    save_tiny_model(path)
    return path


@pytest.fixture
async def start(tmp_path: Path, model_path: Path) -> AsyncIterator[Starter]:
    """`await start(lora=, app=, create=, **settings)`: a worker app with one model, over HTTP."""
    clients: list[HTTP] = []

    async def start_one(
        *,
        lora: dict[str, Any] | None = None,
        app: dict[str, Any] | None = None,
        create: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Trainer:
        rank = (lora or {}).get("rank", 0)
        values: dict[str, Any] = {
            "socket": tmp_path / "t.sock",
            "job": "job-1",
            "base_model": "accounts/local/models/tiny-qwen3",
            "model_path": model_path,
            "states_dir": tmp_path / "jobs" / "job-1" / "states",
            "snapshots_dir": tmp_path / "snapshots",
            "lora_rank": rank,
            "max_context_length": 32,
            **settings,
        }
        server = TestServer(create_app(TrainerSettings(**values), **{"hold_s": 5.0, **(app or {})}))
        await server.start_server(auto_decompress=False)
        client: HTTP = TestClient(server)
        await client.start_server()
        clients.append(client)
        return await new_model(client, lora_config=lora or {"rank": 0}, **(create or {}))

    yield start_one
    for client in clients:
        await client.close()
