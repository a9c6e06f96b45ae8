"""A snapshot is live when every replica says so, and an error counts only for its own snapshot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training import ProtocolError, ReplicaStatus
from fireworks_training._core.snapshots import (
    Failed,
    Live,
    Pending,
    SaveType,
    choose_type,
    judge,
    read_replicas,
)


def row(identity: str | None, *, ready: bool = True, **loading: Any) -> dict[str, Any]:
    return {"current_snapshot_identity": identity, "readiness": ready, "loading_state": loading}


def read(*rows: dict[str, Any]) -> list[ReplicaStatus]:
    return read_replicas({"replicas": list(rows)})


def test_every_replica_counts_not_the_first() -> None:
    assert isinstance(judge(read(row("b"), row("b")), "b"), Live)
    pending = judge(read(row("b"), row("a")), "b")
    assert isinstance(pending, Pending)
    assert list(pending.waiting_for) == ["1"]
    assert isinstance(judge(read(row("b"), row("b", ready=False)), "b"), Pending)


def test_no_replica_is_not_live() -> None:
    assert isinstance(judge([], "b"), Pending)


def test_an_error_of_another_snapshot_is_stale() -> None:
    error = {"stage": "error", "error": "hash differs"}
    stale = row("a", **error, target_snapshot_identity="old")
    assert isinstance(judge(read(stale), "b"), Pending)
    mine = judge(read(row("b"), row("a", **error, target_snapshot_identity="b")), "b")
    assert isinstance(mine, Failed)
    assert mine.reason == "hash differs"


def test_an_adapter_counts_when_it_is_loaded() -> None:
    loaded = {**row(None), "loaded_adapters": [{"identity": "b", "status": "loaded"}]}
    loading = {**row(None), "loaded_adapters": [{"identity": "b", "status": "loading"}]}
    assert isinstance(judge(read(loaded), "b"), Live)
    assert isinstance(judge(read(loading), "b"), Pending)


def test_a_status_without_replicas_is_no_status() -> None:
    for rows in ({}, {"replicas": ["x"]}, {"replicas": [{"loading_state": "ready"}]}):
        with pytest.raises(ProtocolError):
            read_replicas(rows)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.booleans()), max_size=5))
def test_never_live_without_proof(rows: list[tuple[str | None, bool]]) -> None:
    replicas = [ReplicaStatus(identity, ready) for identity, ready in rows]
    proof = bool(rows) and all(row == ("b", True) for row in rows)
    assert isinstance(judge(replicas, "b"), Live) == proof


@pytest.mark.parametrize(
    ("whole_only", "follows", "chosen"),
    [(False, False, "base"), (False, True, "delta"), (True, False, "base"), (True, True, "base")],
)
def test_a_delta_is_chosen_where_it_could_be_loaded(
    whole_only: bool, follows: bool, chosen: SaveType
) -> None:
    assert choose_type(whole_only=whole_only, follows=follows) == chosen
