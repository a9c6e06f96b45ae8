"""Holds what a pool hands out: groups with their outcomes, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fireworks_training.rollouts.episodes import Episode
from fireworks_training.rollouts.law import Outcome


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The rollouts of one task.

    Attributes:
        number: place in submission order, from 0.
        task: the caller's.
        outcome: "done", "filtered", "failed" or "timed_out".
        reason: why it ended so; empty for "done".
        episodes: of the members that were not lost, each with a reward; empty unless the group is
            "done" or "filtered".
        attempts: attempts of all members together.
        lost: members that it lost.
        duration_s: seconds from its start to its end.
        error: the failure behind "failed" and "timed_out".
        version: batches that had trained the weights that served when it started.
    """

    number: int
    task: Any
    outcome: Outcome
    reason: str = ""
    episodes: Sequence[Episode] = ()
    attempts: int = 0
    lost: int = 0
    duration_s: float = 0.0
    error: BaseException | None = None
    version: int = 0

    @property
    def rewards(self) -> list[float]:
        """The rewards, one an episode."""
        return [e.reward for e in self.episodes if e.reward is not None]

    def advantages(self) -> list[float]:
        """The rewards less their mean, one an episode."""
        rewards = self.rewards
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        return [reward - mean for reward in rewards]


@dataclass(frozen=True, slots=True)
class Batch:
    """The groups of one optimizer batch.

    Attributes:
        number: of the batch, from 0.
        groups: those to train on, in the pool's order; empty if all ended otherwise.
        untrained: groups of this batch that were filtered, failed or timed out.
        versions: for each snapshot that sampled, the batches that had trained it. One that the pool
            has not published (yet) is as old as the weights when its oldest group started.
        lag: optimizer steps between the oldest token's weights and this batch; None without tokens.
        bias: mean duration of the trained groups so far over that of all that ended; 1 is none.
    """

    number: int
    groups: Sequence[RolloutGroup]
    untrained: Sequence[RolloutGroup]
    versions: Mapping[str | None, int]
    lag: int | None
    bias: float

    @property
    def episodes(self) -> list[Episode]:
        """The episodes of all groups to train on, in order."""
        return [episode for group in self.groups for episode in group.episodes]

    @property
    def mean_reward(self) -> float | None:
        """The mean reward of the episodes; None without any."""
        rewards = [reward for group in self.groups for reward in group.rewards]
        return sum(rewards) / len(rewards) if rewards else None

    def data(self, *, mask: bool = False) -> list[Any]:
        """Build the datums of all rows, with `advantages()` of their groups.

        Args:
            mask: whether to add a `mask` for losses that need one.

        Returns:
            One `tinker.Datum` a row.
        """
        return [
            row.datum(advantage, mask=mask)
            for group in self.groups
            for episode, advantage in zip(group.episodes, group.advantages(), strict=True)
            for row in episode.rows
        ]
