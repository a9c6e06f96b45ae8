"""Decides which group of rollouts may start, and which groups make the next batch; without I/O.

Groups are numbered from 0 in the order in which they start. With B groups a batch, and v batches
whose training is in the weights that every replica serves, group i starts only when
i < (v + max_lag + 1) * B. Batch s is groups s*B to (s+1)*B-1, less those that ended untrained. So
nothing that is trained in batch s was sampled at weights older than s - max_lag batches, however
long anything takes, and no finished group is thrown away.

`refill=True` counts only groups that may still be trained: group i starts when i, less the groups
known to have ended untrained, is below the same bound, and a batch is the next B trained groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from fireworks_training._checks import integer, one_of
from fireworks_training.rollouts.errors import LagExceeded
from fireworks_training.rollouts.token_ledger import TokenLedger

BatchOrder = Literal["submitted", "completed"]
Outcome = Literal["done", "filtered", "failed", "timed_out"]
OUTCOMES: tuple[Outcome, ...] = ("done", "filtered", "failed", "timed_out")


@dataclass(frozen=True, slots=True)
class Plan:
    """The figures that a run's admission follows.

    Attributes:
        groups_per_batch: B, groups of a batch; at least 1.
        max_lag: batches by which sampling may be ahead of the weights that serve; 0 is synchronous.
        steps: batches of the run; None goes on until the tasks end.
        refill: whether a batch waits for B trained groups, rather than for B ended ones.
        order: "submitted" keeps the bound; "completed" trains what ends first, without a bound.
    """

    groups_per_batch: int
    max_lag: int = 1
    steps: int | None = None
    refill: bool = False
    order: BatchOrder = "submitted"

    def __post_init__(self) -> None:
        integer("groups_per_batch", self.groups_per_batch, 1)
        integer("max_lag", self.max_lag, 0)
        if self.steps is not None:
            integer("steps", self.steps, 0)
        one_of("order", self.order, ("submitted", "completed"))


@dataclass(frozen=True, slots=True)
class Numbers:
    """The groups of one batch: `trained` and `untrained` numbers, in the order of the batch."""

    batch: int
    trained: tuple[int, ...]
    untrained: tuple[int, ...]


@dataclass(slots=True)
class Admission:
    """Keeps the numbers of a run: which groups started, ended, and were handed out.

    Attributes:
        plan: what it follows.
        started: groups that started, which is the number of the next one.
        published: v, batches whose training is in the weights that every replica serves.
        handed_out: batches that were handed out, which is the number of the next one.
        admitted_at: for each group that is not handed out yet, v when it started.
        ledger: tokens of the run.
    """

    plan: Plan
    started: int = 0
    published: int = 0
    handed_out: int = 0
    admitted_at: dict[int, int] = field(default_factory=dict[int, int])
    ledger: TokenLedger = field(default_factory=TokenLedger)
    _ended: dict[int, Outcome] = field(default_factory=dict[int, Outcome])
    _line: deque[int] = field(default_factory=deque[int])  # ended, in the order of batches
    _frontier: int = 0  # the first group that has not ended
    _untrained: int = 0
    _exhausted: bool = False

    def may_start(self) -> bool:
        """Return whether the next group may start now."""
        if self._exhausted:
            return False
        batches = self.published + self.plan.max_lag + 1
        if self.plan.steps is not None:
            batches = min(batches, self.plan.steps)
        ahead = self.started - (self._untrained if self.plan.refill else 0)
        return ahead < batches * self.plan.groups_per_batch

    def start(self) -> int:
        """Start the next group, and return its number; only when `may_start`."""
        assert self.may_start()
        group, self.started = self.started, self.started + 1
        self.admitted_at[group] = self.published
        return group

    def exhausted(self) -> None:
        """Note that there are no more tasks."""
        self._exhausted = True

    def ended(self, group: int, outcome: Outcome) -> None:
        """Note how a group ended; once for each group that started."""
        assert group in self.admitted_at
        assert group not in self._ended
        self._ended[group] = outcome
        self._untrained += outcome != "done"
        if self.plan.order == "completed":
            self._line.append(group)
            return
        while self._frontier in self._ended and self._frontier < self.started:
            self._line.append(self._frontier)
            self._frontier += 1

    def publishes(self, batches: int) -> None:
        """Note that every replica serves weights that the first `batches` batches trained."""
        assert batches <= self.handed_out
        self.published = max(self.published, batches)

    def finished(self) -> bool:
        """Return whether no batch follows: the steps are done, or all tasks are handed out."""
        if self.plan.steps is not None and self.handed_out >= self.plan.steps:
            return True
        return self._exhausted and not self.admitted_at

    def ready(self) -> bool:
        """Return whether the next batch can be handed out."""
        if self.finished():
            return False
        if self._exhausted and len(self._line) == len(self.admitted_at):
            return True  # the rest of the tasks: nothing is under way
        size = self.plan.groups_per_batch
        if not self.plan.refill:
            return len(self._line) >= size
        return sum(self._ended[group] == "done" for group in self._line) >= size

    def check_can_come(self) -> None:
        """Check that the next batch can be reached without a publish.

        Raises:
            LagExceeded: it would need groups that may start only after a publish.
        """
        if self.finished() or self.ready():
            return
        if self.handed_out > self.published + self.plan.max_lag and not self._exhausted:
            raise LagExceeded(self.handed_out, self.published, self.plan.max_lag)

    def take(self) -> Numbers:
        """Take the next batch; only when `ready`."""
        assert self.ready()
        trained: list[int] = []
        untrained: list[int] = []
        size = self.plan.groups_per_batch
        while self._line:
            counted = len(trained) if self.plan.refill else len(trained) + len(untrained)
            if counted >= size:
                break
            group = self._line.popleft()
            (trained if self._ended.pop(group) == "done" else untrained).append(group)
            del self.admitted_at[group]
            self.ledger.handed_out(group)
        batch, self.handed_out = self.handed_out, self.handed_out + 1
        return Numbers(batch, tuple(trained), tuple(untrained))


def seed_of(run_seed: int, *place: Hashable) -> int:
    """Compute a seed from the run's seed and a place in the run, the same on every machine.

    Returns:
        An integer from 0 to 2^31 - 1; SHA-256 of the numbers, cut.
    """
    import hashlib

    digest = hashlib.sha256(repr((run_seed, *place)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
