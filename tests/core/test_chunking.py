from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._core.chunking import combine_metrics, split


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 10), st.integers(1, 100))
def test_a_split_tiles_in_order_within_its_bounds(
    sizes: list[int], max_datums: int, max_bytes: int
) -> None:
    chunks = split(sizes, max_datums=max_datums, max_bytes=max_bytes)
    assert [index for chunk in chunks for index in chunk] == list(range(len(sizes)))
    for chunk in chunks:
        assert 1 <= len(chunk) <= max_datums
        assert len(chunk) == 1 or sum(sizes[chunk.start : chunk.stop]) <= max_bytes


def test_metrics_combine_by_their_reduction() -> None:
    parts = [
        {"a:sum": 1.0, "b:mean": 2.0, "c:min": 3.0, "d:max": 4.0, "e:unique": 5.0, "f:slack": 6.0},
        {"a:sum": 2.0, "b:mean": 8.0, "c:min": 1.0, "d:max": 9.0, "e:unique": 7.0, "f:slack": 3.0},
    ]
    assert combine_metrics(parts, [2, 1]) == {
        "a:sum": 3.0,
        "b:mean": 4.0,
        "c:min": 1.0,
        "d:max": 9.0,
        "e:unique": 5.0,
        "e_1:unique": 7.0,
        "f:slack": 1.0,
    }


@pytest.mark.parametrize("name", ["plain", "x:median"])
def test_what_cannot_be_combined_is_left_out(name: str) -> None:
    assert combine_metrics([{name: 1.0}, {name: 2.0}], [1, 1]) == {}
    assert combine_metrics([{name: 1.0}], [1]) == {name: 1.0}


def test_a_metric_missing_from_a_chunk_is_left_out() -> None:
    assert combine_metrics([{"a:sum": 1.0}, {}], [1, 1]) == {}


def test_a_hash_of_what_is_not_finite_is_left_out() -> None:
    parts = [
        {"a:hash_unordered": float("nan"), "b:sum": 1.0},
        {"a:hash_unordered": 3.0, "b:sum": 2},
    ]
    assert combine_metrics(parts, [1, 1]) == {"b:sum": 3.0}
