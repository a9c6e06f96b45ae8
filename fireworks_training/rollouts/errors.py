"""The errors of a rollout pool, in the tree of the package's errors."""

from __future__ import annotations

from typing import ClassVar

from fireworks_training.errors import Fault, FireworksTrainingError, UsageError


class LagExceeded(UsageError, RuntimeError):
    """A batch was asked for that can't come before the pool has published.

    Attributes:
        batch: number of the batch that was asked for, from 0.
        published: batches whose training is in the weights that serve.
        max_lag: the pool's.
    """

    def __init__(self, batch: int, published: int, max_lag: int) -> None:
        super().__init__(
            f"batch {batch} can't come: its groups may start only at weights that trained "
            f"{batch - max_lag} batches or more, and {published} are published "
            f"(max_lag={max_lag}). Call pool.publish(client) in the loop, at least once in "
            f"{max_lag + 1} batches, or raise max_lag"
        )
        self.batch, self.published, self.max_lag = batch, published, max_lag


class RolloutsFailed(FireworksTrainingError, RuntimeError):
    """Most rollouts of a pool fail, so that it has stopped; `cause` is the newest failure.

    Attributes:
        failed, ended: failed groups, of the groups that ended last.
    """

    fault: ClassVar[Fault] = "caller"

    def __init__(
        self, message: str, *, failed: int = 0, ended: int = 0, cause: BaseException | None = None
    ) -> None:
        super().__init__(message, cause=cause)
        self.failed, self.ended = failed, ended


class SnapshotMoved(FireworksTrainingError, RuntimeError):
    """An evaluation could not be finished at one snapshot; the same call may succeed later."""

    retryable: ClassVar[bool] = True
