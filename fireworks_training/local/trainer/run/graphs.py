"""Autograd graphs of forward passes, kept so that a backward by their logprobs need not run again.

A cache and never a promise: what is not here is computed again. Knows bytes, and which micro-batch
of which pass a graph belongs to. Does not know models, losses or leases.

A graph is kept only within a budget of bytes that it holds on to, and only while the weights it was
made with are unchanged; `clear` is for their owner to call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fireworks_training.local.trainer.queue.operations import Pass

GRAPH_BYTES = 1 << 30


class Graphs:
    """The graphs of one model.

    Args:
        budget: bytes that all of them may hold on to.
    """

    def __init__(self, budget: int = GRAPH_BYTES) -> None:
        self._budget = budget
        self._used = 0
        self._measured = 0
        self._kept: dict[tuple[int, int], tuple[Pass, Tensor, int]] = {}

    def has_room(self, request: Pass) -> bool:
        """Whether another graph of this pass could be kept."""
        return self._size_of(request) < self._budget

    def _size_of(self, request: Pass) -> int:
        return sum(size for owner, _, size in self._kept.values() if owner is request)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts what a graph that is recorded inside holds on to; with gradients enabled."""
        seen: set[int] = set()
        self._measured = 0

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self._measured += storage.nbytes()
            return tensor.detach()  # an output that its own node held on to would never be freed

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, _as_it_is):
            yield

    def put(self, request: Pass, place: int, logprobs_M: Tensor) -> None:
        """Keeps what was measured last, the `place`-th micro-batch of `request`, if it fits; the
        graphs of older passes make room."""
        if self._size_of(request) + self._measured > self._budget:
            return
        self._kept[id(request), place] = (request, logprobs_M, self._measured)
        self._used += self._measured
        while self._used > self._budget:
            oldest = next(key for key, kept in self._kept.items() if kept[0] is not request)
            self._used -= self._kept.pop(oldest)[2]

    def take(self, request: Pass, place: int) -> Tensor | None:
        """The logprobs with their graph, which is good for one backward; None: not here."""
        found = self._kept.pop((id(request), place), None)
        if found is None:
            return None
        _, logprobs_M, size = found
        self._used -= size
        return logprobs_M

    def clear(self) -> None:
        """Forgets all: the weights have changed."""
        self._kept.clear()
        self._used = 0


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
