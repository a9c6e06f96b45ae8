"""Small worlds: every outcome of tiny policies, as rows with all that a loss may ask for.

A policy is a table: for each prefix of tokens the logprobs of the next one. Its rows are all
sequences of one to three tokens over three, after a prompt that does not count.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fireworks_training.losses.conformance.arithmetic import Counted

VOCABULARY = 3
LENGTHS = (1, 2, 3)
PROMPT = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One row; all tuples have an entry for each target, the prompt's included.

    Attributes:
        tokens: the targets.
        mask: which of them count.
        logprobs, sampled, old, reference, teacher, advantages, kept: as in `Counted`.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    sampled: tuple[float, ...]
    old: tuple[float, ...]
    reference: tuple[float, ...]
    teacher: tuple[float, ...]
    advantages: tuple[float, ...]
    kept: tuple[float, ...]

    def counted(self) -> Counted:
        """The tokens that count."""

        def kept(values: Sequence[float]) -> list[float]:
            return [value for value, keep in zip(values, self.mask, strict=True) if keep]

        return Counted(
            kept(self.logprobs),
            kept(self.sampled),
            kept(self.old),
            kept(self.reference),
            kept(self.teacher),
            kept(self.advantages),
            kept(self.kept),
        )

    def at(self, place: int, **values: float) -> Row:
        """The row with other values at a counted token."""
        index = [i for i, keep in enumerate(self.mask) if keep][place]
        changes = {
            name: (*(old := getattr(self, name))[:index], value, *old[index + 1 :])
            for name, value in values.items()
        }
        return replace(self, **changes)


ARRAYS = ("logprobs", "sampled", "old", "reference", "teacher", "advantages", "kept")


def single(value: float) -> float:
    """A value as a float32, which is what a datum holds."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _policy(seed: int, near: Policy | None = None, scale: float = 1.0) -> Policy:
    """A table of logits drawn at random, or another's moved by noise of a scale."""

    def logprobs(prefix: tuple[int, ...]) -> list[float]:
        draw = random.Random(f"{seed} {prefix}")  # noqa: S311 - a fixed world, no secret
        logits = [draw.gauss(0, 1) * scale for _ in range(VOCABULARY)]
        if near is not None:
            logits = [a + b for a, b in zip(logits, near(prefix), strict=True)]
        total = math.log(sum(math.exp(value) for value in logits))
        return [value - total for value in logits]

    return logprobs


Policy = Callable[[tuple[int, ...]], list[float]]


def _row(outcome: tuple[int, ...], policies: Sequence[Policy], advantage: float, hole: bool) -> Row:
    """A row of an outcome; with a hole its second token is a tool's, which does not count."""
    prompt = (0,) * PROMPT
    mask = (False,) * PROMPT + tuple(not (hole and place == 1) for place in range(len(outcome)))
    columns = [
        tuple(
            (-0.5,) * PROMPT + tuple(policy(outcome[:t])[token] for t, token in enumerate(outcome))
        )
        for policy in policies
    ]
    logprobs, sampled, old, reference, teacher = columns

    def builder(values: Sequence[float]) -> tuple[float, ...]:
        """An array as the datum builders write it: 0 where nothing was sampled."""
        return tuple(single(v) if keep else 0.0 for v, keep in zip(values, mask, strict=True))

    return Row(
        (*prompt, *outcome),
        mask,
        logprobs,
        builder(sampled),
        tuple(map(single, old)),
        tuple(map(single, reference)),
        tuple(map(single, teacher)),
        builder([advantage] * len(mask)),
        tuple(single(0.95 - 0.1 * (token % VOCABULARY)) for token in (*prompt, *outcome)),
    )


REGIMES = {"on policy": 0.0, "near": 0.05, "far": 1.5}
"""How far the sampler is from the policy: the scale of the noise in its logits."""


@cache
def rows(regime: str) -> tuple[Row, ...]:
    """Every outcome of the lengths as a row, with advantages of both signs."""
    scale, draw = REGIMES[regime], random.Random(regime)  # noqa: S311
    policy = _policy(1)
    reference, teacher = _policy(3, policy, 0.7), _policy(4, policy, 0.7)
    found = list[Row]()
    outcomes = [o for n in LENGTHS for o in itertools.product(range(VOCABULARY), repeat=n)]
    for number, outcome in enumerate(outcomes):
        # Half of the near rows are so near that also a clip of 3e-4 lets some pass.
        own = scale * (2e-3 if regime == "near" and number % 2 else 1.0)
        old = _policy(2, policy, own)
        sampler = _policy(5, old, own / 3)
        advantage = draw.choice((-1, 1)) * draw.uniform(0.3, 1.5)
        row = _row(outcome, (policy, sampler, old, reference, teacher), advantage, number % 3 == 2)
        if not scale:
            exact = tuple(map(single, row.logprobs))
            masked = tuple(v if k else 0.0 for v, k in zip(exact, row.mask, strict=True))
            row = replace(row, logprobs=exact, sampled=masked, old=exact)
        found.append(row)
    return tuple(found)


@cache
def pairs(regime: str) -> tuple[Row, ...]:
    """Pairs of outcomes, chosen and rejected in turn; many share their first tokens."""
    every = rows(regime)
    draw = random.Random(7)  # noqa: S311
    found = list[Row]()
    for first, second in itertools.permutations(every, 2):
        shared = first.tokens[: PROMPT + 1] == second.tokens[: PROMPT + 1]
        if draw.random() < (0.15 if shared else 0.02):
            found += [first, second]
    return tuple(found)


def padded(row: Row, count: int) -> Row:
    """The row with targets behind it that do not count, and nonsense in all arrays there."""
    junk = {name: (*getattr(row, name), *(-0.7 - i for i in range(count))) for name in ARRAYS}
    return replace(
        row, tokens=(*row.tokens, *(1,) * count), mask=(*row.mask, *(False,) * count), **junk
    )


def with_prompt(row: Row, count: int) -> Row:
    """The row after a prompt that is longer by some targets."""
    more = {name: (*(0.0,) * count, *getattr(row, name)) for name in ("sampled", "advantages")}
    more |= {
        name: (*(-0.9,) * count, *getattr(row, name))
        for name in ("logprobs", "old", "reference", "teacher", "kept")
    }
    return replace(
        row, tokens=(*(2,) * count, *row.tokens), mask=(*(False,) * count, *row.mask), **more
    )


def with_other_contents(row: Row) -> Row:
    """The row with other values wherever nothing counts, a sentinel for a logprob among them."""
    junk = {"sampled": -9999.0, "advantages": 2.0, "logprobs": -4.0}
    changed: dict[str, Any] = {
        name: tuple(
            value if keep else junk.get(name, -1.25)
            for value, keep in zip(getattr(row, name), row.mask, strict=True)
        )
        for name in ARRAYS
    }
    return replace(row, **changed)
