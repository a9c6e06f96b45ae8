"""Memory for keys and values: mapped from the system, and given back to it, block by block.

Knows sizes and devices. Does not know what a buffer holds. An engine makes and drops buffers of
ever other sizes, large ones each few steps, while prompts stay for minutes. In the C library's heap
that left
holes: after 20 minutes of mixed load an engine that used 0.9 GB took 3.2. A mapping of its own goes
back whole when its tensor dies. Large pages, where the system has them, keep that as fast as the
heap.
"""

from __future__ import annotations

import math
import mmap

import torch

SMALL = 1 << 16
"""Bytes below which a buffer comes from the heap: a mapping costs a few microseconds, and a process
may have 65,530 of them."""

LARGE = 3 << 20
"""Bytes from which a buffer gets large pages: a smaller one would waste much of its last page."""

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def zeros(*shape: int, device: torch.device) -> torch.Tensor:
    """Makes a float32 tensor of zeros."""
    count = math.prod(shape)
    size = 4 * count
    if device.type != "cpu" or size < SMALL:
        return torch.zeros(shape, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= LARGE and _HUGE_PAGES is not None:
        pages.madvise(_HUGE_PAGES)
    # The tensor keeps the mapping alive, and ends it with itself.
    return torch.frombuffer(pages, dtype=torch.float32).view(shape)
