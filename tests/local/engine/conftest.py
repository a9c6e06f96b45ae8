"""The tiny model, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from fireworks_training.local.store.snapshots import SnapshotStore
from tests.local.engine.tiny_model import tiny_qwen3


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Qwen3ForCausalLM:
    return tiny_qwen3()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, model: Qwen3ForCausalLM) -> Path:
    path = tmp_path_factory.mktemp("tiny-qwen3")
    model.save_pretrained(path)
    return path


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots")
