"""Rollouts, a trainer and weights without a server: what is tested is the pool alone."""

from __future__ import annotations

import asyncio
from typing import Any

from fireworks_training import SamplingConcurrencyController, Snapshot, WeightSyncResult
from fireworks_training.rollouts import Episode, RolloutPool, TokenRow

__all__ = ["SamplingConcurrencyController", "Trainer", "episode", "pool_of"]


def episode(reward: float | None = 1.0, *, tokens: int = 3, snapshot: str | None = None) -> Episode:
    """An episode of one row: one token of prompt and `tokens` sampled."""
    mask = [False] + [True] * tokens
    row = TokenRow(
        list(range(tokens + 1)),
        [0.0] + [-0.5] * tokens,
        mask,
        [snapshot if sampled else None for sampled in mask],
    )
    return Episode([row], reward)


class Trainer:
    """A training client whose syncs end when the test says so, or at once."""

    def __init__(self) -> None:
        self.syncs: list[asyncio.Future[WeightSyncResult]] = []
        self.at_once = True

    def weight_sync(self, name: str | None = None) -> Any:
        future: asyncio.Future[WeightSyncResult] = asyncio.get_running_loop().create_future()
        self.syncs.append(future)
        if self.at_once:
            self.live(len(self.syncs) - 1)
        return future

    def live(self, number: int) -> None:
        snapshot = Snapshot.__new__(Snapshot)
        self.syncs[number].set_result(WeightSyncResult(f"s{number + 1}", snapshot))


def pool_of(tasks: Any, rollout: Any, **options: Any) -> RolloutPool:
    """A pool of rollouts that sample nothing; groups of one in batches of two, unless told."""
    options = {"groups_per_batch": 2, "group_size": 1, **options}
    return RolloutPool(None, tasks, rollout, sampler=Unused(), **options)  # type: ignore[arg-type]


class Unused:
    """Stands where a sampler would."""

    async def aclose(self) -> None:
        raise AssertionError("a sampler that was passed in is its owner's to close")
