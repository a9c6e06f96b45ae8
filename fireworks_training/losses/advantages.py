"""Advantages from the rewards of a group: samples of one prompt, or of one situation.

Plain functions of numbers; G rewards in, G advantages out. Rewards that are equal but for rounding
are no signal: their advantages are exactly 0, and never rounding noise blown up to +-1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from fireworks_training._checks import number, one_of
from fireworks_training.errors import InvalidArgument

Std = Literal["population", "sample"]
DUST = 1e-6
"""Rewards whose spread is at most this part of their size are equal (float32 resolves 1e-7)."""


def group_mean(rewards: Sequence[float]) -> list[float]:
    """R - mean (Dr. GRPO, arXiv:2503.20783)."""
    values = _finite(rewards)
    if _equal(values):
        return [0.0] * len(values)
    mean = _mean(values)
    return [value - mean for value in values]


def group_mean_std(
    rewards: Sequence[float], *, std: Std = "population", eps: float = 1e-6
) -> list[float]:
    """(R - mean) / (std + eps) (GRPO, arXiv:2402.03300, section 4.1.2).

    Args:
        std: "population" divides the squares by G, "sample" by G - 1; for G = 4 they differ by
            15 %.
        eps: added to the standard deviation.
    """
    number("eps", eps, 0.0)
    centred = group_mean(rewards)
    spread = _std(centred, std)
    return [value / (spread + eps) if value else 0.0 for value in centred]


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """R - the mean of the *others* (RLOO, arXiv:2402.14740): G / (G - 1) (R - mean).

    A group of one has nothing to compare with: 0.
    """
    count = len(rewards)
    return [value * count / max(count - 1, 1) for value in group_mean(rewards)]


def batch_std(
    groups: Sequence[Sequence[float]], *, std: Std = "population", eps: float = 1e-6
) -> list[list[float]]:
    """(R - the group's mean) / (the batch's std + eps) (arXiv:2508.08221).

    The standard deviation is that of all rewards of the batch.
    """
    number("eps", eps, 0.0)
    centred = [group_mean(group) for group in groups]
    every = _finite([value for group in groups for value in group])
    mean = _mean(every) if every else 0.0
    spread = _std([value - mean for value in every], std) if not _equal(every) else 0.0
    return [[value / (spread + eps) if value else 0.0 for value in group] for group in centred]


def max_rl(rewards: Sequence[float]) -> list[float]:
    """(R - mean) / mean (MaxRL, arXiv:2602.02710), for rewards that are not negative.

    A group without a success has no advantage.
    """
    values = _finite(rewards)
    if any(value < 0 for value in values):
        raise InvalidArgument("max_rl divides by the mean reward: no reward may be negative")
    centred = group_mean(values)
    mean = _mean(values) if values else 0.0
    return [value / mean if value else 0.0 for value in centred]


def several_rewards(
    rewards: Sequence[Sequence[float]],
    *,
    weights: Sequence[float] | None = None,
    std: Std = "population",
    eps: float = 1e-6,
) -> list[float]:
    """Normalise each reward over the group by itself, then add (GDPO, arXiv:2601.05242).

    Args:
        rewards: R lists of G values, one for each kind of reward.
        weights: R weights of the sum; None: 1 each.
    """
    shares = [1.0] * len(rewards) if weights is None else list(weights)
    if len(shares) != len(rewards) or len({len(each) for each in rewards}) != 1:
        raise InvalidArgument("give one list of G values, and one weight, for each kind of reward")
    parts = [group_mean_std(each, std=std, eps=eps) for each in rewards]
    columns = zip(*parts, strict=True)
    return [sum(s * v for s, v in zip(shares, column, strict=True)) for column in columns]


def information_gains(
    answer_logprobs: Sequence[Sequence[float]], *, kind: Literal["prob", "logprob"] = "prob"
) -> list[float]:
    """The gain of each turn but the first in the policy's belief in the right answer.

    From IGPO (arXiv:2510.14967): the difference of exp(mean logprob) of the answer's tokens before
    and after a turn; with "logprob" that of the mean logprobs themselves.

    Args:
        answer_logprobs: for each point of the rollout the logprobs of the right answer's tokens.
    """
    one_of("kind", kind, ("prob", "logprob"))
    means = [_mean(_finite(logprobs)) for logprobs in answer_logprobs]
    beliefs = [math.exp(mean) if kind == "prob" else mean for mean in means]
    return [after - before for before, after in pairwise(beliefs)]


def igpo(
    gains: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    *,
    normalize: Literal["joint", "separate"] = "joint",
    gamma: float = 1.0,
    std: Std = "population",
    eps: float = 1e-6,
) -> list[list[float]]:
    """Advantages of the turns of G rollouts (IGPO, arXiv:2510.14967).

    A rollout's turn rewards are its gains, and its outcome at the last turn. "joint", the paper's,
    normalises over all of the group's turn rewards together. "separate", the authors' later code,
    normalises the gains over all turns that have one, and the outcomes over the last turns alone.
    An advantage is the discounted sum of the normalised rewards from its turn on.

    Args:
        gains: for each rollout the gains of its turns but the last; rollouts differ in length.
        outcomes: the outcome of each rollout.
        gamma: the discount of a turn, from 0 to 1.

    Returns:
        For each rollout one advantage a turn, the last included.
    """
    one_of("normalize", normalize, ("joint", "separate"))
    number("gamma", gamma, 0.0, 1.0)
    if len(gains) != len(outcomes):
        raise InvalidArgument(f"{len(gains)} rollouts have gains and {len(outcomes)} an outcome")
    every = [value for rollout in gains for value in rollout]
    if normalize == "joint":
        scaled = iter(group_mean_std([*every, *outcomes], std=std, eps=eps))
        parts = [[next(scaled) for _ in rollout] for rollout in gains]
        ends = list(scaled)
    else:
        scaled = iter(group_mean_std(every, std=std, eps=eps))
        parts = [[next(scaled) for _ in rollout] for rollout in gains]
        ends = group_mean_std(outcomes, std=std, eps=eps)
    return [_returns([*part, end], gamma) for part, end in zip(parts, ends, strict=True)]


def _returns(rewards: Sequence[float], gamma: float) -> list[float]:
    total, found = 0.0, list[float]()
    for reward in reversed(rewards):
        total = reward + gamma * total
        found.append(total)
    return found[::-1]


def _finite(values: Sequence[float]) -> list[float]:
    found = [float(value) for value in values]
    if not all(math.isfinite(value) for value in found):
        raise InvalidArgument("rewards must be finite numbers")
    return found


def _equal(values: Sequence[float]) -> bool:
    """Whether values are the same but for rounding."""
    if not values:
        return True
    return max(values) - min(values) <= DUST * max(abs(value) for value in values)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _std(centred: Sequence[float], kind: Std) -> float:
    one_of("std", kind, ("population", "sample"))
    count = len(centred) - (kind == "sample")
    return math.sqrt(math.fsum(value * value for value in centred) / count) if count > 0 else 0.0
