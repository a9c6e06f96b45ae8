"""Groups of datums with a shared prefix: every datum once, in full, and never at a loss."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training.local.trainer.run.packing import WORTHWHILE, Tokens, groups_of, plan

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


def arrays(sequences: list[list[int]]) -> list[Tokens]:
    return [np.asarray(tokens, np.int64) for tokens in sequences]


def saved_at(depth: int, sequences: list[list[int]]) -> int:
    """Tokens saved if all that have the same first `depth` tokens share these."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for tokens in set(map(tuple, sequences)):
        if len(tokens) >= depth:
            groups.setdefault(tokens[:depth], []).append(len(tokens))
    saved = [(depth * (len(lengths) - 1), sum(lengths)) for lengths in groups.values()]
    return sum(tokens for tokens, of in saved if tokens * WORTHWHILE >= of)


@given(SEQUENCES, st.integers(1, 60), st.booleans())
def test_a_plan_covers_every_datum_once(
    sequences: list[list[int]], budget: int, sharing: bool
) -> None:
    seen: dict[int, list[int]] = {}
    for batch in plan(arrays(sequences), budget, sharing=sharing):
        going_on = [place for bucket in batch.buckets for place in bucket]
        assert sorted(going_on) == [
            (g, m)
            for g, group in enumerate(batch.groups)
            for m, member in enumerate(group.members)
            if member.tokens.size
        ]
        for group in batch.groups:
            for member in group.members:
                for place in member.data:
                    assert place not in seen
                    seen[place] = [*group.prefix.tolist(), *member.tokens.tolist()]
    assert [seen[place] for place in range(len(sequences))] == sequences


@given(SEQUENCES)
def test_no_one_depth_saves_more(sequences: list[list[int]]) -> None:
    groups = groups_of(arrays(sequences))
    saved = sum(len(group.prefix) * (len(group.members) - 1) for group in groups)
    assert saved >= max(saved_at(depth, sequences) for depth in range(1, 10))


def test_samples_of_a_prompt_share_it_and_repeated_ones_are_one() -> None:
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 9, 9, 9, 9]]
    data = [[*prompt, tail, 7] for prompt in prompts for tail in (0, 1, 2, 2)]
    groups = groups_of(arrays(data))
    assert [group.prefix.tolist() for group in groups] == prompts
    assert [[m.data for m in group.members] for group in groups] == [
        [(0,), (1,), (2, 3)],
        [(4,), (5,), (6, 7)],
    ]


def test_a_group_over_the_budget_is_computed_in_parts() -> None:
    data = arrays([[1] * 20 + [tail] * 10 for tail in range(2, 8)])
    batches = plan(data, 60)
    assert len(batches) == 2
    assert all(len(batch.groups[0].prefix) == 20 for batch in batches)


def test_a_short_prefix_is_not_worth_it() -> None:
    assert len(groups_of(arrays([[1, *[tail] * 30] for tail in range(2, 6)]))) == 4
