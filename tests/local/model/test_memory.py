"""A model that does not fit is refused before it is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fireworks_training.local.engine import worker
from fireworks_training.local.model.memory import (
    NotEnoughMemory,
    PageReturn,
    c_library_trim,
    check_memory,
    container_bytes,
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


def test_a_container_may_have_less_than_its_machine(tmp_path: Path) -> None:
    assert container_bytes(tmp_path) is None  # no control group here
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\nactive_file 0\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_bytes(tmp_path) == 500
    (tmp_path / "memory.max").write_text("100\n")
    assert container_bytes(tmp_path) == 0


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="safetensors"):
        parameter_count(tmp_path)


def test_freed_pages_go_back_now_and_then() -> None:
    calls = list[int]()
    pages = PageReturn(lambda: calls.append(1), busy=10.0, idle=2.0)

    def counted(look: Callable[[float], None], *times: float) -> list[int]:
        counts = list[int]()
        for now in times:
            look(now)
            counts.append(len(calls))
        return counts

    assert counted(pages.worked, 100.0, 101.0, 109.0, 111.0) == [1, 1, 1, 2]
    assert counted(pages.paused, 112.0, 114.0, 300.0) == [2, 2, 2]  # nothing was done since
    assert counted(pages.worked, 301.0) == [3]
    assert counted(pages.worked, 301.5) == [3]
    assert counted(pages.paused, 302.0, 303.5, 306.0) == [3, 4, 4]
    PageReturn(None).worked(1e9)


@pytest.mark.skipif(c_library_trim() is None, reason="this C library has no malloc_trim")
def test_what_is_given_back_is_the_holes_between_blocks() -> None:
    code = """
import gc, json
from pathlib import Path
import torch
from fireworks_training.local.model.memory import PageReturn, c_library_trim
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
size = 25_000  # 100 kB: below the size that the C library maps by itself
blocks = [torch.zeros(size) for _ in range(2000)]
full = resident()
blocks[::2] = [None] * 1000
gc.collect()
holes = resident()
PageReturn(c_library_trim()).worked(1e9)
print(json.dumps([full, holes, resident()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    full, holes, after = json.loads(done.stdout)
    assert full - holes < 10e6  # half of it is free, and none of that came back
    assert full - after > 80e6
