"""Inputs of forward passes, kept so that a later backward may refer to them. No I/O, no clock.

Knows how long and how much is kept. An accepted backward owns the inputs it refers to, so dropping
them here takes nothing from it. Does not know models or graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fireworks_training.local.trainer.queue.operations import Pass

LEASE_S = 600.0
LEASED_BYTES = 256 << 20


class UnknownForward(Exception):
    """Raised where no forward pass of that place is kept: it never ran, or its lease is over."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """Holds a forward pass until its lease ends."""

    request: Pass
    until: float
    size: int


class Leases:
    """Keeps the forward passes of one model that a backward may refer to.

    Args:
        lease_s: seconds for which each is kept.
        budget: bytes that all of them may take; the oldest go first.
    """

    def __init__(self, lease_s: float = LEASE_S, budget: int = LEASED_BYTES) -> None:
        self._lease_s = lease_s
        self._budget = budget
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._size = 0

    def keep(self, seq_id: int, request: Pass, now: float) -> None:
        """Starts the lease of a forward pass that has run."""
        size = sum(
            datum.tokens.nbytes + sum(array.nbytes for array in datum.inputs.values())
            for datum in request.data
        )
        self._kept[seq_id] = _Kept(request, now + self._lease_s, size)
        self._size += size
        while self._size > self._budget or next(iter(self._kept.values())).until <= now:
            self._size -= self._kept.popitem(last=False)[1].size
            if not self._kept:
                break

    def find(self, seq_id: int, now: float) -> Pass:
        """Finds the forward pass of a place.

        Raises:
            UnknownForward: no such pass is kept.
        """
        kept = self._kept.get(seq_id)
        if kept is None or kept.until <= now:
            raise UnknownForward(
                f"forward_seq_id {seq_id} is no forward pass whose inputs are still here (they are"
                f" kept for {self._lease_s:.0f} s): send the linearised loss as a forward_backward"
            )
        return kept.request
