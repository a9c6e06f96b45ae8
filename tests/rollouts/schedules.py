"""Runs an admission through a random schedule of ends, publishes and batches, and judges it.

The judge knows only what was started at which version and what was handed out: it computes the
lag of each batch and the ends of each group by itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from fireworks_training.rollouts.errors import LagExceeded
from fireworks_training.rollouts.law import OUTCOMES, Admission, Outcome, Plan
from fireworks_training.rollouts.token_ledger import TokenCounts


@dataclass
class Schedule:
    """What came of a schedule: versions at starts, outcomes, batches, and the tokens."""

    started_at: dict[int, int] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    batches: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    refused: int = 0
    tokens: TokenCounts = field(default_factory=TokenCounts)

    @property
    def trained(self) -> list[int]:
        return [group for trained, _ in self.batches for group in trained]


def run(
    plan: Plan,
    tasks: int,
    seed: int,
    *,
    concurrency: int = 8,
    bad: float = 0.3,
    admission: Admission | None = None,
) -> Schedule:
    """Run a whole schedule; the end of it is that no batch follows.

    Args:
        tasks: groups that there are tasks for.
        concurrency: groups under way at most.
        bad: share of the groups that end untrained.
        admission: the rule under test; a wrong one for negative controls.
    """
    law = admission or Admission(plan)
    chance, seen = random.Random(seed), Schedule()
    under_way: list[int] = []
    left = tasks
    for _ in range(40 * (tasks + 10)):
        while left and law.may_start() and len(under_way) < concurrency:
            left -= 1
            group = law.start()
            seen.started_at[group] = law.published
            under_way.append(group)
        if not left:
            law.exhausted()
        if law.finished():
            break
        moves = (["end"] if under_way else []) + (["take"] if law.ready() else [])
        if law.published < law.handed_out:
            moves.append("publish")
        if not law.ready() and not under_way and law.published == law.handed_out:
            raise AssertionError(f"stuck: {law.handed_out} batches, {law.started} groups started")
        move = chance.choice(moves)
        if move == "end":
            _end(law, under_way.pop(chance.randrange(len(under_way))), chance, bad, seen)
        elif move == "take":
            numbers = law.take()
            seen.batches.append((numbers.trained, numbers.untrained))
            seen.lags += [numbers.batch - seen.started_at[group] for group in numbers.trained]
        else:
            law.publishes(chance.randint(law.published + 1, law.handed_out))
        assert law.ledger.counts().closes
        try:
            law.check_can_come()
        except LagExceeded:
            seen.refused += 1
            assert law.published < law.handed_out, "only a publish that is due may be asked for"
    else:
        raise AssertionError("the schedule did not end")
    law.ledger.close()
    seen.tokens = law.ledger.counts()
    return seen


def _end(law: Admission, group: int, chance: random.Random, bad: float, seen: Schedule) -> None:
    tokens = chance.randint(0, 50)
    law.ledger.sample(group, tokens)
    if tokens and chance.random() < 0.2:
        law.ledger.lose(group, lost := chance.randint(1, tokens))
        tokens -= lost
    outcome: Outcome = chance.choice(OUTCOMES[1:]) if chance.random() < bad else "done"
    if outcome == "done":
        law.ledger.done(group, chance.randint(0, tokens))
    else:
        law.ledger.untrained(group, "filtered" if outcome == "filtered" else "failed")
    seen.outcomes[group] = outcome
    law.ended(group, outcome)
