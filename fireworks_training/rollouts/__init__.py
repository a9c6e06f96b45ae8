"""Keeps rollouts in flight and hands out optimizer batches, with a bound on their staleness.

`law` decides which group may start and what makes a batch, `failures` what a failure means, and
`token_ledger` counts the tokens; none of them does I/O. `running` carries them out on a loop,
`members` runs one group, and `pool` is what users enter. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fireworks_training.rollouts.batches import Batch, RolloutGroup
    from fireworks_training.rollouts.context import AgentEndpoint, RolloutContext, RolloutSampler
    from fireworks_training.rollouts.episodes import Episode, TokenRow
    from fireworks_training.rollouts.errors import LagExceeded, RolloutsFailed, SnapshotMoved
    from fireworks_training.rollouts.failures import FailurePolicy
    from fireworks_training.rollouts.law import Plan
    from fireworks_training.rollouts.pool import RolloutPool
    from fireworks_training.rollouts.rewards import Reward
    from fireworks_training.rollouts.token_ledger import TokenCounts

_HOMES = {
    "Batch": "batches",
    "AgentEndpoint": "context",
    "Episode": "episodes",
    "FailurePolicy": "failures",
    "RolloutGroup": "batches",
    "LagExceeded": "errors",
    "Plan": "law",
    "Reward": "rewards",
    "RolloutContext": "context",
    "RolloutPool": "pool",
    "RolloutSampler": "context",
    "RolloutsFailed": "errors",
    "SnapshotMoved": "errors",
    "TokenCounts": "token_ledger",
    "TokenRow": "episodes",
}

__all__ = [
    "AgentEndpoint",
    "Batch",
    "Episode",
    "FailurePolicy",
    "LagExceeded",
    "Plan",
    "Reward",
    "RolloutContext",
    "RolloutGroup",
    "RolloutPool",
    "RolloutSampler",
    "RolloutsFailed",
    "SnapshotMoved",
    "TokenCounts",
    "TokenRow",
]


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
            globals()[name] = value = getattr(module, name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
