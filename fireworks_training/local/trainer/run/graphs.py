"""The cache of autograd graphs, so that a backward need not compute its forward again.

A graph that is not here is computed again. Knows bytes, and which micro-batch of which pass a graph
belongs to. Does not know models, losses or leases.

Graphs are kept only within a budget of the bytes that they hold on to, and only while the weights
that made them are unchanged: the owner of the weights calls `clear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fireworks_training.local.trainer.queue.operations import Pass

GRAPH_BYTES = 1 << 30


class GraphCache:
    """Keeps the graphs of one model.

    Args:
        budget: bytes that all of them may hold on to.
    """

    def __init__(self, budget: int = GRAPH_BYTES) -> None:
        self._budget = budget
        self._used = 0
        self._measured = 0
        self._kept: dict[tuple[int, int], tuple[Pass, Tensor, int]] = {}

    def has_room(self, request: Pass) -> bool:
        """Tells whether another graph of this pass could be kept."""
        return self._size_of(request) < self._budget

    def _size_of(self, request: Pass) -> int:
        return sum(size for owner, _, size in self._kept.values() if owner is request)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Counts the bytes that a graph recorded inside holds on to; enables gradients."""
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
        """Keeps the graph that was measured last, of the `place`-th micro-batch of `request`, if it
        fits; the graphs of older passes make room."""
        if self._size_of(request) + self._measured > self._budget:
            return
        self._kept[id(request), place] = (request, logprobs_M, self._measured)
        self._used += self._measured
        while self._used > self._budget:
            oldest = next(key for key, kept in self._kept.items() if kept[0] is not request)
            self._used -= self._kept.pop(oldest)[2]

    def take(self, request: Pass, place: int) -> Tensor | None:
        """Takes out logprobs with their graph, which serves one backward; None: not here."""
        found = self._kept.pop((id(request), place), None)
        if found is None:
            return None
        _, logprobs_M, size = found
        self._used -= size
        return logprobs_M

    def clear(self) -> None:
        """Forgets all graphs, since the weights have changed."""
        self._kept.clear()
        self._used = 0


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
