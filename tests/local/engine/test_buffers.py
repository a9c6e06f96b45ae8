"""Buffers come from the system and go back to it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fireworks_training.local.engine.buffers import LARGE, SMALL, zeros

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [0, 4, SMALL - 4, SMALL, SMALL + 4, LARGE, LARGE + 4096 + 4])
def test_a_buffer_is_zeros_that_can_be_written(size: int) -> None:
    buffer = zeros(size // 4, 1, device=CPU)
    assert buffer.shape == (size // 4, 1)
    assert buffer.dtype == torch.float32
    assert buffer.is_contiguous()
    assert not buffer.any()
    buffer += 1
    assert float(buffer.sum()) == size // 4


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_buffer_goes_back_when_its_last_view_dies() -> None:
    def mapped() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return pages * 4096

    before = mapped()
    size = 64 << 20
    view = zeros(4, size // 16, device=CPU)[1:, :7]
    assert mapped() - before >= size  # the view keeps the whole
    del view
    assert mapped() - before < size // 2


def test_another_device_has_its_own_memory() -> None:
    buffer = zeros(1 << 20, 4, device=torch.device("meta"))
    assert buffer.device.type == "meta"
