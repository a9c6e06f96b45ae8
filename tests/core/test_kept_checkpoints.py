"""What may go when only some checkpoints are kept; never what a kept snapshot builds on."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fireworks_training import CheckpointInfo
from fireworks_training._core.kept_checkpoints import CheckpointKind, to_delete

PLACE = "accounts/a/rlorTrainerJobs/j/checkpoints/"
TYPES = {
    "state": "CHECKPOINT_TYPE_TRAINING",
    "base": "CHECKPOINT_TYPE_INFERENCE_BASE",
    "delta": "CHECKPOINT_TYPE_INFERENCE_ARC_V2",
    "other": "CHECKPOINT_TYPE_OF_TOMORROW",
}


def rows(text: str) -> list[CheckpointInfo]:
    """Rows `state:s1 base:b delta:d`, oldest first."""
    pairs = (word.split(":") for word in text.split())
    return [CheckpointInfo(PLACE + name, TYPES[kind]) for kind, name in pairs]


def gone(
    text: str, last: int, *keep: str, kinds: tuple[CheckpointKind, ...] = ("state", "snapshot")
) -> list[str]:
    return [row.checkpoint_id for row in to_delete(rows(text), kinds=kinds, last=last, keep=keep)]


def test_the_newest_of_each_kind_stay_and_the_newest_of_the_rest_goes_first() -> None:
    assert gone("state:s1 base:b1 state:s2 base:b2 state:s3 base:b3", 1) == ["b2", "s2", "b1", "s1"]
    assert gone("state:s1 state:s2", 2) == []
    assert gone("state:s1 state:s2", 0) == ["s2", "s1"]


def test_what_is_named_stays_by_id_or_full_name() -> None:
    assert gone("state:s1 state:best state:s3", 1, "best") == ["s1"]
    assert gone("state:s1 state:best state:s3", 1, PLACE + "best") == ["s1"]


def test_other_kinds_and_unknown_types_stay() -> None:
    assert gone("state:s1 base:b1 other:o", 0, kinds=("state",)) == ["s1"]
    assert gone("other:o", 0) == []


def test_what_a_kept_snapshot_is_a_difference_to_stays() -> None:
    assert gone("base:old base:b delta:d1 delta:d2", 1) == ["old"]
    assert gone("base:b delta:d1 delta:d2 base:new", 1, "d1") == ["d2"]
    named = [
        CheckpointInfo(PLACE + "b", TYPES["base"]),
        CheckpointInfo(PLACE + "between", TYPES["base"]),
        CheckpointInfo(PLACE + "d", TYPES["delta"], predecessor="b"),
    ]
    left = to_delete(named, kinds=("snapshot",), last=1, keep=())
    assert [row.checkpoint_id for row in left] == ["between"]


@given(st.lists(st.sampled_from(["state", "base", "delta"]), max_size=12), st.integers(0, 4))
def test_no_kept_difference_lacks_what_it_builds_on(kinds: list[str], last: int) -> None:
    listed = rows(" ".join(f"{kind}:n{index}" for index, kind in enumerate(kinds)))
    deleted = {
        row.name for row in to_delete(listed, kinds=("state", "snapshot"), last=last, keep=())
    }
    snapshots = [row for row in listed if "_INFERENCE" in row.checkpoint_type]
    for before, row in pairwise(snapshots):
        if row.name not in deleted and row.checkpoint_type.endswith("ARC_V2"):
            assert before.name not in deleted
