"""Runs reward functions as users write them: plain or async, of one sample or of a group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fireworks_training._checks import number, one_of
from fireworks_training.errors import InvalidArgument
from fireworks_training.rollouts.episodes import Episode
from fireworks_training.rollouts.plain_calls import call


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function with its weight.

    Attributes:
        function: plain or async. Of a "sample", `function(episode, task)` returns a number; of a
            "group", `function(episodes, task)` returns one number an episode. A plain one runs in
            a thread of its own.
        weight: what its number is multiplied by, before all are added.
        of: "sample" or "group".
    """

    function: Callable[..., Any]
    weight: float = 1.0
    of: Literal["sample", "group"] = "sample"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InvalidArgument(f"a reward is a function, got {type(self.function).__name__}")
        number("weight", self.weight, -1e30)
        one_of("of", self.of, ("sample", "group"))


RewardLike = Reward | Callable[..., Any]


def rewards_of(given: RewardLike | Sequence[RewardLike] | None) -> list[Reward]:
    """Make a list of rewards from one function, several, or none."""
    if given is None:
        return []
    several: Any = [given] if isinstance(given, Reward) or callable(given) else given
    if not isinstance(several, Sequence) or isinstance(several, str):
        raise InvalidArgument(f"reward is a function or several, got {type(several).__name__}")
    return [each if isinstance(each, Reward) else Reward(each) for each in several]


async def rewarded(
    episodes: Sequence[Episode], task: Any, rewards: Sequence[Reward]
) -> list[Episode]:
    """Add the weighted rewards to what the rollouts set themselves.

    Raises:
        InvalidArgument: a reward is no finite number, or an episode has none.
    """
    totals: list[float | None] = [episode.reward for episode in episodes]
    for reward in rewards:
        if reward.of == "group":
            values = await call(reward.function, list(episodes), task)
            if inspect.isgenerator(values) or not hasattr(values, "__len__"):
                values = list(values)
        else:
            values = [await call(reward.function, episode, task) for episode in episodes]
        if len(values) != len(episodes):
            raise InvalidArgument(
                f"a group's reward function gave {len(values)} numbers for {len(episodes)} "
                "episodes: one each is needed, in their order"
            )
        for place, (episode, value) in enumerate(zip(episodes, values, strict=True)):
            checked = episode.rewarded(value).reward
            assert checked is not None
            totals[place] = (totals[place] or 0.0) + reward.weight * checked
    if None in totals:
        raise InvalidArgument(
            "an episode has no reward: return (completion, reward) from the rollout, or pass "
            "reward= to the pool"
        )
    return [e.rewarded(total) for e, total in zip(episodes, totals, strict=True)]
