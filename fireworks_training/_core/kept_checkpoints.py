"""Decides which checkpoints of a job may go, when only some of them are to be kept.

It knows the rows of the control plane's list, oldest first; it deletes nothing. A state is what
training goes on from, a snapshot what a deployment loads. What a kept snapshot is a difference to
is kept, too: where the list does not name predecessors, everything since the last whole one before
it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from fireworks_training.models import CheckpointInfo

CheckpointKind = Literal["state", "snapshot"]


def kind_of(row: CheckpointInfo) -> CheckpointKind | None:
    """Classify a checkpoint by its type; None for one of an unknown type."""
    if "_TRAINING" in row.checkpoint_type:
        return "state"
    return "snapshot" if "_INFERENCE" in row.checkpoint_type else None


def is_difference(row: CheckpointInfo) -> bool:
    """Whether a snapshot is a difference to the one before it."""
    return row.predecessor is not None or row.checkpoint_type.endswith("_ARC_V2")


def to_delete(
    rows: Sequence[CheckpointInfo],
    *,
    kinds: Collection[CheckpointKind],
    last: int,
    keep: Collection[str],
) -> list[CheckpointInfo]:
    """List the checkpoints that may go, in the order in which to delete them: newest first.

    Args:
        rows: all checkpoints of the job, oldest first.
        kinds: the kinds that are cleaned up; others stay, like those of an unknown type.
        last: how many of the newest of each kind are kept.
        keep: ids or full names that are kept besides.
    """
    kept = {row.checkpoint_id for row in rows if {row.checkpoint_id, row.name} & set(keep)}
    for kind in ("state", "snapshot"):
        of_kind = [row.checkpoint_id for row in rows if kind_of(row) == kind]
        goes = max(len(of_kind) - last, 0) if kind in kinds else 0
        kept.update(of_kind[goes:])
    snapshots = [row for row in rows if kind_of(row) == "snapshot"]
    for place in reversed(range(len(snapshots))):
        row = snapshots[place]
        if row.checkpoint_id not in kept or not is_difference(row):
            continue
        if row.predecessor is not None:
            kept.add(row.predecessor)
        elif place > 0:
            kept.add(snapshots[place - 1].checkpoint_id)
    return [
        row for row in reversed(rows) if kind_of(row) is not None and row.checkpoint_id not in kept
    ]
