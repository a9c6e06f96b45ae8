"""A model that does not fit is refused before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from fireworks_training.local.engine import worker
from fireworks_training.local.memory import (
    NotEnoughMemory,
    check_memory,
    free_bytes,
    parameter_count,
)
from tests.local.engine.tiny_model import tiny_qwen3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_qwen3().save_pretrained(tmp_path)
    return tmp_path


def test_parameters_are_counted_without_loading(folder: Path) -> None:
    assert parameter_count(folder) == sum(p.numel() for p in tiny_qwen3().parameters())


def test_a_model_that_does_not_fit_is_refused_with_figures(folder: Path) -> None:
    check_memory(folder, 12, 0, 1 << 30, "an engine")
    check_memory(folder, 12, 0, None, "an engine")
    with pytest.raises(NotEnoughMemory, match=r"12 bytes a parameter.*GiB are free"):
        check_memory(folder, 12, 1 << 30, 1 << 30, "an engine")


def test_the_engine_asks_before_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "free_bytes", lambda: 1 << 20)
    settings: dict[str, object] = {"model_path": str(folder), "socket": str(folder / "e.sock")}
    with pytest.raises(NotEnoughMemory):
        worker.main(settings)
    assert not (folder / "e.sock").exists()


def test_the_system_says_what_is_free() -> None:
    found = free_bytes()
    assert found is None or found > 1 << 20


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        parameter_count(tmp_path)
