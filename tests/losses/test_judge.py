"""The judge is judged: its derivatives by differences, its objectives by exact expectations.

Every outcome of a tiny policy stands once in a batch, so that under a uniform sampler the batch's
mean is the exact expectation.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from fireworks_training.losses.conformance import cases, objectives
from fireworks_training.losses.conformance.cases import Row
from fireworks_training.losses.conformance.objectives import Objective

STEP = 1e-6
LIVE: list[Objective] = [
    objectives.sft(),
    objectives.dpo(label_smoothing=0.1),
    objectives.dpo(length_normalized=True),
    objectives.ipo(),
    objectives.orpo(lam=0.5),
    objectives.grpo(kl="k3", kl_coef=0.1, kl_cap=1e9),
    objectives.dapo(correction="tis"),
    objectives.dppo(),
    objectives.sapo(),
    objectives.dro(),
    objectives.distill(),
]
"""Objectives without a term that is held constant: their gradient is that of their value."""


@pytest.mark.parametrize("objective", LIVE, ids=lambda each: each.name)
def test_gradients_are_the_differences_of_values(objective: Objective) -> None:
    every = cases.rows("far") if objective.unit == 1 else cases.pairs("far")
    rows = objective.prepared(every)
    _, slopes = objective.exact(rows)
    for index in range(0, len(rows), max(1, len(rows) // 12)):
        for place in range(sum(rows[index].mask)):
            at = [i for i, keep in enumerate(rows[index].mask) if keep][place]

            def moved(by: float, index: int = index, place: int = place, at: int = at) -> float:
                own = rows[index].at(place, logprobs=rows[index].logprobs[at] + by)
                return objective.exact([*rows[:index], own, *rows[index + 1 :]])[0]

            slope = (moved(STEP) - moved(-STEP)) / (2 * STEP)
            assert slopes[index][at] == pytest.approx(slope, rel=1e-5, abs=1e-8)


# -- exact expectations -----------------------------------------------

V = 3
REWARDS = [0.3, -1.0, 0.8]


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(map(math.exp, logits)))
    return [value - total for value in logits]


def outcomes(logits: list[float], sampler: list[float], reference: list[float]) -> list[Row]:
    """A row for each token, under tables of one step, with a reward for each."""
    own, sampled, anchor = map(log_softmax, (logits, sampler, reference))
    columns = (own, sampled, sampled, anchor, anchor, REWARDS, [1.0] * V)
    return [Row((token,), (True,), *((column[token],) for column in columns)) for token in range(V)]


def by_logits(objective: Objective, rows: list[Row], logits: list[float]) -> list[float]:
    """The gradient by the logits: through the softmax, in plain arithmetic."""
    _, slopes = objective.exact(objective.prepared(rows))
    p = [math.exp(value) for value in log_softmax(logits)]
    return [
        sum(
            slope[0] * ((row.tokens[0] == j) - p[j])
            for row, slope in zip(rows, slopes, strict=True)
        )
        for j in range(V)
    ]


def differences(function: Any, logits: list[float]) -> list[float]:
    found = []
    for j in range(V):
        up, down = list(logits), list(logits)
        up[j] += STEP
        down[j] -= STEP
        found.append((function(up) - function(down)) / (2 * STEP))
    return found


def expected_reward(logits: list[float]) -> float:
    pairs = zip(log_softmax(logits), REWARDS, strict=True)
    return sum(math.exp(lp) * r for lp, r in pairs)


UNIFORM, REFERENCE = [0.0] * V, [0.5, -0.3, 1.0]


def reverse_kl(logits: list[float]) -> float:
    pairs = zip(log_softmax(logits), log_softmax(REFERENCE), strict=True)
    return sum(math.exp(lp) * (lp - r) for lp, r in pairs)


def test_importance_sampling_is_the_policy_gradient_off_policy() -> None:
    logits = [0.4, -0.2, 0.9]
    rows = outcomes(logits, UNIFORM, REFERENCE)
    found = by_logits(objectives.reinforce(importance=True), rows, logits)
    right = differences(expected_reward, logits)
    assert [-g / V for g in found] == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("make", [objectives.reinforce, objectives.grpo, objectives.cispo])
def test_on_policy_every_loss_is_the_policy_gradient(make: Any) -> None:
    rows = outcomes(UNIFORM, UNIFORM, REFERENCE)
    found = by_logits(make(reduction="sum"), rows, UNIFORM)
    assert [-g / V for g in found] == pytest.approx(differences(expected_reward, UNIFORM), rel=1e-6)


@pytest.mark.parametrize("logits", [UNIFORM, [0.4, -0.2, 0.9]], ids=["on policy", "off policy"])
@pytest.mark.parametrize("kind", ["k2", "k3", "k3+"])
def test_a_weighted_kl_has_the_gradient_of_the_reverse_kl(kind: str, logits: list[float]) -> None:
    rows = [replace(r, advantages=(0.0,)) for r in outcomes(logits, UNIFORM, REFERENCE)]
    objective = objectives.reinforce(kl=kind, kl_coef=1.0)
    found = by_logits(objective, rows, logits)
    assert [g / V for g in found] == pytest.approx(differences(reverse_kl, logits), rel=1e-6)


def test_k1_as_a_loss_would_have_none_and_in_the_reward_it_is_right() -> None:
    rows = outcomes(UNIFORM, UNIFORM, REFERENCE)
    score = [sum((token == j) - 1 / V for token in range(V)) for j in range(V)]
    assert score == pytest.approx([0.0] * V)
    rows = [replace(r, advantages=(0.0,)) for r in rows]
    objective = objectives.reinforce(importance=True, kl="k1_in_reward", kl_coef=1.0)
    found = by_logits(objective, rows, UNIFORM)
    assert [g / V for g in found] == pytest.approx(differences(reverse_kl, UNIFORM), rel=1e-6)


def test_the_worlds_hold_every_outcome() -> None:
    for regime in cases.REGIMES:
        rows = cases.rows(regime)
        tokens = {row.tokens[cases.PROMPT :] for row in rows}
        assert len(tokens) == len(rows) == V + V**2 + V**3
        assert {*itertools.product(range(V), repeat=2)} <= tokens
        assert {row.advantages[-1] > 0 for row in rows} == {True, False}
    pairs = cases.pairs("near")
    shared = [a.tokens[:3] == b.tokens[:3] for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
    assert any(shared)
    assert not all(shared)
