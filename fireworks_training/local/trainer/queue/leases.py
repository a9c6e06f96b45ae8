"""Inputs of forward passes, kept so that a backward may refer to them. No I/O, no clock.

Knows how long and how much; what an accepted backward refers to is its own from then on, so letting
go here never takes anything from it. Does not know models or graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fireworks_training.local.trainer.queue.operations import Pass

LEASE_S = 600.0
LEASED_BYTES = 256 << 20


class UnknownForward(Exception):
    """No forward pass of that place is kept: it never ran, or its lease is over."""


@dataclass(frozen=True, slots=True)
class _Kept:
    request: Pass
    until: float
    size: int


class Leases:
    """The forward passes of one model that may be referred to.

    Args:
        lease_s: how long each is kept.
        budget: bytes that all of them may take; the oldest go first.
    """

    def __init__(self, lease_s: float = LEASE_S, budget: int = LEASED_BYTES) -> None:
        self._lease_s = lease_s
        self._budget = budget
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._size = 0

    def keep(self, seq_id: int, request: Pass, now: float) -> None:
        """Starts the lease of a pass that has run."""
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
        """The pass of a place.

        Raises:
            UnknownForward: with the reason.
        """
        kept = self._kept.get(seq_id)
        if kept is None or kept.until <= now:
            raise UnknownForward(
                f"forward_seq_id {seq_id} is no forward pass whose inputs are still here (they are"
                f" kept for {self._lease_s:.0f} s): send the linearised loss as a forward_backward"
            )
        return kept.request
