"""The plan of a pass: groups of datums that share a prefix, and micro-batches computed together.

Knows token sequences and costs in tokens. Does not know models, tensors or losses.

The samples of one prompt begin with the same tokens, and a causal model computes the same states
for them: a *group* computes its prefix once and each member's remaining tokens against it. The plan
depends on the tokens alone, so the same operation is computed in the same order every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]

CALL_SHARE = 48
"""A call of the model costs about as much as one part in so many of a full micro-batch."""

WORTHWHILE = 8
"""A prefix is shared if that saves at least one in so many of the tokens of its sequences: the
members' attention is computed against copies of its keys and values, under a mask."""

KEYS_SHARE = 8
"""A copied prefix token takes about one part in so many of the memory of a computed one."""


@dataclass(frozen=True, slots=True)
class Member:
    """Holds a sequence of a group: the tokens after the prefix, which may be none.

    Attributes:
        tokens: S token ids.
        data: indices of the datums with this sequence; several if it was sampled repeatedly.
    """

    tokens: Tokens
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Holds sequences with the same first P tokens; one sequence alone is all prefix."""

    prefix: Tokens
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Holds groups that are computed together.

    Attributes:
        groups: their prefixes are one padded batch.
        buckets: indices `(group, member)` of the sequences that go on after their prefix, in padded
            batches of about one length each.
    """

    groups: tuple[Group, ...]
    buckets: tuple[tuple[tuple[int, int], ...], ...]


def _common(first: Tokens, second: Tokens) -> int:
    """Compute the length of the common prefix."""
    shorter = min(len(first), len(second))
    differing = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differing[0]) if differing.size else shorter


@dataclass(slots=True)
class _Span:
    """Holds neighbours in sorted order that share `depth` tokens, and their best grouping."""

    depth: int
    start: int
    stop: int
    saved: int
    parts: list[tuple[int, int, int]]


def _closed(depth: int, children: Sequence[_Span], ends: Sequence[int]) -> _Span:
    """Choose one group at this depth, or the children's own groups: whatever saves more."""
    start, stop = children[0].start, children[-1].stop
    below = sum(child.saved for child in children)
    here = depth * (stop - start - 1)
    if here >= below and here * WORTHWHILE >= ends[stop] - ends[start]:
        return _Span(depth, start, stop, here, [(start, stop, depth)])
    parts = children[0].parts
    for child in children[1:]:
        parts.extend(child.parts)
    return _Span(depth, start, stop, below, parts)


def _spans(sequences: Sequence[Tokens]) -> list[tuple[int, int, int]]:
    """Find `(start, stop, depth)` of the groups to compute, one level deep, of sorted sequences.

    The largest runs of sorted neighbours with a common prefix form a tree; of all ways to choose
    disjoint nodes this finds the one that saves most tokens. The tree is walked with a stack from
    left to right; each node is decided when its last leaf has been seen.
    """
    ends = [0, *itertools.accumulate(len(tokens) for tokens in sequences)]
    depths = [_common(a, b) for a, b in itertools.pairwise(sequences)]
    open_nodes: list[tuple[int, list[_Span]]] = []
    for place, depth in enumerate([*depths, -1]):
        whole = len(sequences[place])
        node = _Span(whole, place, place + 1, 0, [(place, place + 1, whole)])
        while open_nodes and open_nodes[-1][0] > depth:
            closing, children = open_nodes.pop()
            node = _closed(closing, [*children, node], ends)
        if open_nodes and open_nodes[-1][0] == depth:
            open_nodes[-1][1].append(node)
        else:
            open_nodes.append((depth, [node]))
    return open_nodes[0][1][0].parts


def groups_of(data: Sequence[Tokens], *, sharing: bool = True) -> list[Group]:
    """Group the sequences of a pass; equal ones become one member. Without `sharing`, each is a
    group of its own."""
    if not sharing:
        return [Group(tokens, (Member(tokens[:0], (place,)),)) for place, tokens in enumerate(data)]
    places: dict[bytes, list[int]] = {}
    for place, tokens in enumerate(data):  # big-endian bytes sort as the tokens do
        places.setdefault(tokens.astype(">i8").tobytes(), []).append(place)
    keys = sorted(places)
    sequences = [data[places[key][0]] for key in keys]
    return [
        Group(
            sequences[start][:depth],
            tuple(Member(sequences[i][depth:], tuple(places[keys[i]])) for i in range(start, stop)),
        )
        for start, stop, depth in _spans(sequences)
    ]


def _cost(group: Group, width: int) -> int:
    """Count the tokens that a group costs, with its prefix padded to `width`."""
    return width + sum(len(m.tokens) + width // KEYS_SHARE for m in group.members if m.tokens.size)


def _fitting(group: Group, budget: int) -> Iterator[Group]:
    """Split a group into as many parts as the budget asks for; each repeats the prefix."""
    part: list[Member] = []
    for member in group.members:
        if part and _cost(Group(group.prefix, (*part, member)), len(group.prefix)) > budget:
            yield Group(group.prefix, tuple(part))
            part = []
        part.append(member)
    yield Group(group.prefix, tuple(part))


def _buckets(groups: Sequence[Group], call: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Batch the sequences that go on after their prefix, longest first, cut where padding would
    cost more than another call of the model."""
    sizes = sorted(
        (-len(member.tokens), g, m)
        for g, group in enumerate(groups)
        for m, member in enumerate(group.members)
        if member.tokens.size
    )
    bucket: list[tuple[int, int]] = []
    width = padding = 0
    for size, g, m in sizes:
        if bucket and padding + width + size > call:
            yield tuple(bucket)
            bucket = []
        if not bucket:
            width, padding = -size, 0
        padding += width + size
        bucket.append((g, m))
    if bucket:
        yield tuple(bucket)


def plan(data: Sequence[Tokens], budget: int, *, sharing: bool = True) -> list[MicroBatch]:
    """Make micro-batches of about `budget` tokens that cover every datum once.

    Args:
        data: the token ids of each datum, at least one of each.
        budget: tokens that a micro-batch computes at most; a longer datum goes alone.
        sharing: whether datums share prefixes.
    """
    call = budget // CALL_SHARE
    fitting = [part for g in groups_of(data, sharing=sharing) for part in _fitting(g, budget)]
    fitting.sort(key=lambda group: (-len(group.prefix), group.members[0].data[0]))
    batches: list[list[Group]] = []
    width = used = padding = 0
    for group in fitting:
        missing = width - len(group.prefix)
        cost = _cost(group, width)
        if not batches or used + cost > budget or padding + missing > call:
            batches.append([])
            width, used, padding = len(group.prefix), 0, 0
            missing, cost = 0, _cost(group, width)
        batches[-1].append(group)
        used += cost
        padding += missing
    return [MicroBatch(tuple(batch), tuple(_buckets(batch, call))) for batch in batches]
