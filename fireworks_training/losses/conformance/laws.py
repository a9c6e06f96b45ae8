"""The laws that every loss keeps, whatever its objective, and how each is tried."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

from fireworks_training.errors import InvalidArgument
from fireworks_training.losses.conformance import cases
from fireworks_training.losses.conformance.cases import Row
from fireworks_training.losses.conformance.objectives import Exact, Objective, totals_of
from fireworks_training.losses.conformance.result import ConformanceResult, Law
from fireworks_training.losses.conformance.runs import (
    Implementation,
    apart,
    distance,
    run,
)
from fireworks_training.losses.reductions import Totals

SINGLE = 2e-3
"""How far float32 may be from float64, relative to the largest entry of a gradient."""

HUGE = 1e30
"""Right values beyond this are not asked of float32."""

SPLITS = 10
Spread = Callable[[Totals], Implementation]


def check(
    loss: Implementation,
    objective: Objective,
    *,
    spread: Spread | None = None,
    tolerance: float = 1e-6,
) -> ConformanceResult:
    """Hold an implementation of a loss against its objective.

    It is called with every outcome of tiny policies, of one to three tokens over three, on policy,
    near and far from it, and its value and gradient are compared with exact ones in float64. Then
    with the same rows split, padded, permuted, after other prompts, with other contents where
    nothing counts, and at extremes.

    Args:
        loss: `(data, logprobs_list) -> (loss, metrics)`. It must not depend on anything else.
        objective: what it claims to compute, of `conformance.objectives`.
        spread: makes the loss for calls that are parts of a batch whose totals are known. None: the
            loss's own `over`, where it has one; else the law of splits isn't judged for a mean.
        tolerance: the largest relative difference.

    Returns:
        The laws, each kept, broken or not judged. An exception of the loss breaks the law that it
        was raised under.

    Raises:
        InvalidArgument: the loss is no callable.
    """
    if not callable(loss):
        raise InvalidArgument(f"the loss must be callable, not {type(loss).__name__}")
    if spread is None:
        spread = cast("Spread | None", getattr(loss, "over", None))
    court = _Court(loss, objective, spread, tolerance)
    return ConformanceResult(objective.name, tuple(_tried(name, law) for name, law in court.laws()))


Found = tuple[bool | None, float, str]


def _tried(name: str, law: Callable[[], Found]) -> Law:
    try:
        return Law(name, *law())
    except Exception as error:  # an implementation may raise anything, which is a finding
        return Law(name, False, math.inf, f"it raised {type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Court:
    loss: Implementation
    objective: Objective
    spread: Spread | None
    tolerance: float

    def laws(self) -> Iterator[tuple[str, Callable[[], Found]]]:
        """All laws by name, in the order of the table."""
        for regime in cases.REGIMES:
            yield f"value, {regime}", partial(self._value, regime)
            yield f"gradient, {regime}", partial(self._gradient, regime)
        yield "reference", self._reference
        changes: dict[str, tuple[Callable[[Row], Row], str]] = {
            "padding": (
                lambda row: cases.padded(row, 3),
                "targets behind a row that do not count change nothing",
            ),
            "prompt length": (
                lambda row: cases.with_prompt(row, 4),
                "a longer prompt changes nothing",
            ),
            "masked contents": (
                cases.with_other_contents,
                "what stands where nothing counts changes nothing",
            ),
        }
        for name, (change, words) in changes.items():
            yield name, partial(self._unchanged, change, words)
        yield "order", self._order
        yield "split", self._split
        yield "float32", self._single
        for name, rows in self._extremes().items():
            yield name, partial(self._extreme, rows)

    def rows(self, regime: str) -> list[Row]:
        """The rows of a regime, as the objective reads them."""
        every = cases.rows(regime) if self.objective.unit == 1 else cases.pairs(regime)
        return self.objective.prepared(every)

    def run(self, rows: Sequence[Row], *, single: bool = False) -> Exact:
        """The implementation on rows, as the whole batch."""
        return run(self.loss, self.objective, rows, single=single)

    # -- against the objective ---------------------------------------------------------------

    def _value(self, regime: str) -> Found:
        rows = self.rows(regime)
        (found, _), (right, slopes) = self.run(rows), self.objective.exact(rows)
        error = apart(found, right, _largest(slopes))
        if error <= self.tolerance:
            return True, error, "the value is the objective's"
        return False, error, f"the value is {found:.6g}; the objective's is {right:.6g}"

    def _gradient(self, regime: str) -> Found:
        rows = self.rows(regime)
        (_, found), (_, right) = self.run(rows), self.objective.exact(rows)
        error = distance(found, right)
        if error <= self.tolerance:
            return True, error, "the gradient of every logprob is the objective's"
        return False, error, _difference(rows, found, right)

    def _reference(self) -> Found:
        if not self.objective.referred:
            return True, 0.0, "the objective has no reference"
        rows = self.rows("near")
        moved = [replace(r, reference=tuple(v - 0.5 for v in r.reference)) for r in rows[::2]]
        moved = [m for pair in zip(moved, rows[1::2], strict=False) for m in pair]
        rows = rows[: len(moved)]
        (_, before), (_, after) = self.run(rows), self.run(moved)
        change = distance(after, before)
        wanted = distance(self.objective.exact(moved)[1], self.objective.exact(rows)[1])
        if change < wanted / 1e3:
            words = "another reference leaves the gradient as it is: it holds the policy to nothing"
            return False, math.inf, words
        return True, 0.0, "the gradient depends on the reference"

    # -- against itself ----------------------------------------------------------------------

    def _unchanged(self, change: Callable[[Row], Row], words: str) -> Found:
        rows = self.rows("near")
        moved = [change(row) if place % 2 else row for place, row in enumerate(rows)]
        (value, before), (other, after) = self.run(rows), self.run(moved)
        kept = [_counted(row, slopes) for row, slopes in zip(rows, before, strict=True)]
        left = [_counted(row, slopes) for row, slopes in zip(moved, after, strict=True)]
        error = max(distance(left, kept), apart(other, value, _largest(before)))
        stray = [
            slope
            for row, slopes in zip(moved, after, strict=True)
            for slope, keep in zip(slopes, row.mask, strict=True)
            if not keep and slope != 0  # a NaN is not 0 either
        ]
        if stray:
            found = f"a target that does not count has a gradient of {stray[0]:.2g}"
            return False, math.inf, f"{words}: not so, {found}"
        if not error <= self.tolerance:
            return False, error, f"{words}: not so, the loss is off by {error:.2g}"
        return True, error, words

    def _units(self, rows: Sequence[Row]) -> list[list[int]]:
        unit = self.objective.unit
        return [list(range(at, at + unit)) for at in range(0, len(rows), unit)]

    def _order(self) -> Found:
        rows = self.rows("near")
        units = self._units(rows)
        random.Random(3).shuffle(units)  # noqa: S311
        order = [index for unit in units for index in unit]
        (value, before) = self.run(rows)
        (other, moved) = self.run([rows[index] for index in order])
        after = [moved[order.index(index)] for index in range(len(rows))]
        error = max(distance(after, before), apart(other, value, _largest(before)))
        kept = error <= self.tolerance
        return kept, error, f"the order of the rows {'does not matter' if kept else 'matters'}"

    def _split(self) -> Found:
        mean = self.objective.reduction.needs_totals
        if mean and self.spread is None:
            words = "it takes no totals: right only where each call is a whole optimizer batch"
            return None, 0.0, words
        worst = 0.0
        for regime in ("near", "far"):
            rows = self.rows(regime)
            part = self.loss if self.spread is None else self.spread(totals_of(rows))
            _, whole = self.run(rows)
            for seed in range(SPLITS):
                found = self._in_parts(part, rows, seed)
                worst = max(worst, distance(found, whole))
        if worst <= self.tolerance:
            return True, worst, f"{2 * SPLITS} random splits of the batch have the same gradient"
        words = "the gradient depends on how the batch is split into calls: it is off by"
        return False, worst, f"{words} {worst:.2g}"

    def _in_parts(self, part: Implementation, rows: Sequence[Row], seed: int) -> list[list[float]]:
        """The gradients of a batch in two to six calls."""
        draw = random.Random(seed)  # noqa: S311
        units = self._units(rows)
        draw.shuffle(units)
        cuts = sorted(draw.sample(range(1, len(units)), draw.randint(1, 5)))
        found: list[list[float]] = [[] for _ in rows]
        for start, end in pairwise([0, *cuts, len(units)]):
            chosen = [index for unit in units[start:end] for index in unit]
            _, slopes = run(part, self.objective, [rows[index] for index in chosen])
            for index, slope in zip(chosen, slopes, strict=True):
                found[index] = slope
        return found

    def _single(self) -> Found:
        rows = self.rows("far")
        (_, found), (_, right) = self.run(rows, single=True), self.objective.exact(rows)
        error = distance(found, right)
        kept = error <= SINGLE
        return kept, error, f"float32 {'agrees' if kept else 'differs from the objective'}"

    # -- extremes ----------------------------------------------------------------------------

    def _extremes(self) -> dict[str, list[list[Row]]]:
        """Batches by the law that they are for."""
        rows = self.rows("far")
        few = rows[:4] + rows[-8:]
        empty = replace(few[0], mask=(False,) * len(few[0].mask))
        short = [row for row in rows if sum(row.mask) == 1]
        first = few[0]
        found = {
            "equal rewards": [[replace(r, advantages=(0.0,) * len(r.mask)) for r in few]],
            "one-token answers": [
                short[: 2 * (len(short) // 2)] if self.objective.unit == 2 else short
            ],
            "probability 0": [[first.at(0, logprobs=-9999.0, advantages=-1.0), *few[1:]]],
        }
        if self.objective.unit == 1:
            found["ratio overflow"] = [
                [first.at(0, sampled=q, old=q, advantages=1.0), *few[1:]] for q in (-110.0, -9999.0)
            ]
            low = [min(row.logprobs) - 30.0 for row in few]
            far = [replace(r, sampled=(q,) * len(r.mask)) for r, q in zip(few, low, strict=True)]
            far = [replace(r, old=r.sampled, advantages=(-1.0,) * len(r.mask)) for r in far]
            found["large ratio"] = [far]
            found["row without tokens"] = [[empty, *few[1:]]]
        else:
            found["probability 0"].append([few[0], few[1].at(0, logprobs=-9999.0), *few[2:]])
            sure = replace(first, logprobs=tuple(-1e-9 for _ in first.logprobs))
            found["probability 1"] = [[sure, *few[1:]]]
        return found

    def _extreme(self, batches: Sequence[Sequence[Row]]) -> Found:
        worst = 0.0
        for rows in batches:
            value, right = self.objective.exact(rows)
            if not all(math.isfinite(v) for v in (value, *(s for row in right for s in row))):
                continue  # the objective itself is infinite there
            worst = max(worst, distance(self.run(rows)[1], right))
            if _largest(right) < HUGE and abs(value) < HUGE:
                one, slopes = self.run(rows, single=True)
                finite = all(math.isfinite(v) for v in (one, *(s for row in slopes for s in row)))
                if not finite:
                    return (
                        False,
                        math.inf,
                        "the loss or its gradient is not finite; the right one is",
                    )
        if worst <= self.tolerance:
            return True, worst, "the gradient is finite and the objective's"
        return False, worst, f"the gradient is off by {worst:.2g}"


def _largest(slopes: list[list[float]]) -> float:
    return max((abs(value) for row in slopes for value in row), default=0.0)


def _counted(row: Row, values: Sequence[float]) -> list[float]:
    return [value for value, keep in zip(values, row.mask, strict=True) if keep]


def _difference(rows: Sequence[Row], found: list[list[float]], right: list[list[float]]) -> str:
    """Where a gradient is most wrong, and whether it is so by one factor or altogether."""
    flat = [
        (abs(x - y), index, place, x, y)
        for index, (row, other) in enumerate(zip(found, right, strict=True))
        for place, (x, y) in enumerate(zip(row, other, strict=True))
    ]
    if not any(x for _, _, _, x, _ in flat):
        return "there is no gradient: nothing is learned"
    if bad := next(((i, p) for _, i, p, x, _ in flat if not math.isfinite(x)), None):
        return f"the gradient of row {bad[0]}, target {bad[1]}, is not finite"
    _, index, place, x, y = max(flat)
    factors = {round(x / y, 5) for _, _, _, x, y in flat if y}
    if len(factors) == 1 and not any(x for _, _, _, x, y in flat if not y):
        return f"the gradient is {factors.pop():g} times the objective's, everywhere"
    missing = sum(1 for _, _, _, x, y in flat if y and not x)
    silent = f"; {missing} tokens have none that should" if missing else ""
    counts = "" if rows[index].mask[place] else ", which does not count"
    return f"at row {index}, target {place}{counts}, it is {x:.5g}; right is {y:.5g}{silent}"
