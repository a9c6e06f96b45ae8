"""Splits one pass over many datums into requests, and puts the answers together again.

Split and recombine is the identity on the per-datum outputs; metrics combine by the reduction that
their name ends in (`name:reduction`). Knows sizes and names, not what a datum is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MAX_DATUMS = 1024
"""The most datums in one request."""

MAX_BYTES = 5_000_000
"""The most encoded bytes in one request; a larger datum gets a request of its own."""


def split(
    sizes: Sequence[int], *, max_datums: int = MAX_DATUMS, max_bytes: int = MAX_BYTES
) -> list[range]:
    """Split datums greedily, in order.

    Args:
        sizes: encoded bytes of each datum.

    Returns:
        Ranges of datum indices that tile `range(len(sizes))`; none is empty.
    """
    chunks: list[range] = []
    start, held = 0, 0
    for index, size in enumerate(sizes):
        full = index - start >= max_datums or held + size > max_bytes
        if full and index > start:
            chunks.append(range(start, index))
            start, held = index, 0
        held += size
    if start < len(sizes):
        chunks.append(range(start, len(sizes)))
    return chunks


def combine_metrics(
    parts: Sequence[Mapping[str, float]], datums: Sequence[int]
) -> dict[str, float]:
    """Combine the metrics of a pass's chunks.

    Reductions: `mean` (weighted by datums), `sum`, `min`, `max`, `slack` (maximum less weighted
    mean), `unique` (the first value, the others under `name_1:unique`, ...), `hash_unordered` (sum
    modulo 2^64). A single part is returned as it is. With several, a metric whose reduction is
    unknown, that a chunk lacks, or a hash that is not finite can't be combined and is left out.

    Args:
        parts: the metrics of each chunk, in order.
        datums: how many datums each chunk had.
    """
    if len(parts) == 1:
        return dict(parts[0])
    combined: dict[str, float] = {}
    for name in parts[0] if parts else ():
        if all(name in part for part in parts):
            _combine_one(combined, name, [part[name] for part in parts], datums)
    return combined


def _combine_one(
    combined: dict[str, float], name: str, values: Sequence[float], datums: Sequence[int]
) -> None:
    stem, _, reduction = name.rpartition(":")
    if reduction == "sum":
        combined[name] = sum(values)
    elif reduction == "min":
        combined[name] = min(values)
    elif reduction == "max":
        combined[name] = max(values)
    elif reduction == "mean":
        combined[name] = _weighted_mean(values, datums)
    elif reduction == "slack":
        combined[name] = max(values) - _weighted_mean(values, datums)
    elif reduction == "hash_unordered" and all(map(math.isfinite, values)):
        combined[name] = float(sum(int(value) for value in values) % 2**64)
    elif reduction == "unique":
        combined[name] = values[0]
        for index, value in enumerate(values[1:], 1):
            combined[f"{stem}_{index}:unique"] = value


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    if not total:
        return sum(values) / len(values)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total
