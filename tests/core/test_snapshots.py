"""A snapshot is live when every replica says so, and an error counts only for its own snapshot."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training import ProtocolError, ReplicaStatus, Snapshot
from fireworks_training._core.snapshots import (
    UNLISTED_FOR,
    UNNOTICED_AFTER,
    Chain,
    Done,
    Failed,
    Live,
    Pace,
    Pending,
    Post,
    SaveType,
    Sync,
    Wait,
    choose_type,
    judge,
    links_to,
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


# -- adapters side by side -----------------------------------------------------------------------


def adapters(*identities: str, current: str | None = None) -> dict[str, Any]:
    rows = [{"identity": identity, "status": "loaded"} for identity in identities]
    return {**row(current, stage="ready"), "loaded_adapters": rows}


def test_the_adapter_before_may_stay_resident_in_any_order() -> None:
    for rows in (("b", "a"), ("a", "b")):
        for current in (None, "a", "b"):
            assert isinstance(judge(read(adapters(*rows, current=current)), "b"), Live)
    assert isinstance(judge(read(adapters("a")), "b"), Pending)


def test_an_adapter_that_is_merely_resident_is_asked_for() -> None:
    sync = Sync(Chain(whole_only=True), "a")
    assert sync.look(read(adapters("a", "b", current="b")), 0.0) == Post("a", None)
    assert sync.look(read(adapters("a", "b", current="b")), 0.1) == Done()


# -- when a load is asked for --------------------------------------------------------------------


@pytest.mark.parametrize(
    "reports",
    [None, [], [row("old", ready=False)], [row(None, ready=False)], [row("old")]],
    ids=["unreadable", "no replica listed", "rolling", "not up", "ready"],
)
def test_a_whole_snapshot_is_asked_for_at_once(reports: list[dict[str, Any]] | None) -> None:
    sync = Sync(Chain(), "b")
    assert sync.look(None if reports is None else read(*reports), 0.0) == Post("b", None)
    waits = [sync.look(None if reports is None else read(*reports), t) for t in (0.1, 5.0, 30.0)]
    assert all(isinstance(wait, Wait) for wait in waits)
    assert sync.look(read(row("b")), 40.0) == Done()
    assert sync.loaded == ["b"]


def test_a_replica_that_notices_late_gets_one_request() -> None:
    sync = Sync(Chain(), "b")
    old = row("old", stage="ready", target_snapshot_identity="old")
    assert sync.look(read(old), 0.0) == Post("b", None)
    for now in range(1, 200):
        assert isinstance(sync.look(read(old), float(now)), Wait)
    loading = row("old", stage="loading", target_snapshot_identity="b")
    assert isinstance(sync.look(read(loading), 200.0), Wait)
    # It had begun, and reports the old one again: lost, a good while after the request.
    assert sync.look(read(old), 201.0) == Post("b", None)


def test_a_request_that_is_never_noticed_is_made_again_in_the_end() -> None:
    sync = Sync(Chain(), "b")
    old = row("old", stage="ready", target_snapshot_identity="old")
    sync.look(read(old), 0.0)
    assert isinstance(sync.look(read(old), UNNOTICED_AFTER), Wait)
    assert sync.look(read(old), UNNOTICED_AFTER + 1) == Post("b", None)


def test_a_server_that_notes_requests_at_once_is_asked_again_soon() -> None:
    sync = Sync(Chain(), "b")
    old = row("old", stage="ready", target_snapshot_identity="old")
    sync.look(read(old), 0.0)
    sync.prompt = True
    assert sync.look(read(old), 1.5) == Post("b", None)


def chain_of(*names: str) -> Chain:
    chain = Chain()
    before = None
    for name in names:
        chain.saved(Snapshot(name, "delta" if before else "base", before), "delta")
        before = name
    return chain


def test_a_difference_waits_for_the_reports_of_all_listed_replicas() -> None:
    sync = Sync(chain_of("a", "b"), "b")
    rolling = read(row("a"), row(None, ready=False))
    assert isinstance(sync.look(rolling, 0.0), Wait)
    assert sync.look(read(row("a"), row("a", ready=False)), 1.0) == Post("b", "a")


def test_a_difference_to_what_is_not_reported_begins_at_the_whole_one() -> None:
    sync = Sync(chain_of("a", "b"), "b")
    assert isinstance(sync.look([], 0.0), Wait)
    assert sync.look([], UNLISTED_FOR + 0.1) == Post("a", None)
    assert isinstance(sync.look([], 10.0), Wait)
    assert sync.look(read(row("a")), 11.0) == Post("b", "a")
    unreadable = Sync(chain_of("a", "b"), "b")
    assert isinstance(unreadable.look(None, 100.0), Wait)  # nothing is known: no difference goes


def test_a_lost_difference_is_never_sent_again() -> None:
    sync = Sync(chain_of("a", "b"), "b")
    old = read(row("a", stage="ready", target_snapshot_identity="a"))
    assert sync.look(old, 0.0) == Post("b", "a")
    assert isinstance(sync.look(old, UNNOTICED_AFTER), Wait)
    # It may take the request at this moment, and then no longer hold the predecessor.
    assert sync.look(old, UNNOTICED_AFTER + 1) == Post("a", None)
    # The control: where the server tells what it noted, the difference itself goes again.
    prompt = Sync(chain_of("a", "b"), "b")
    prompt.look(old, 0.0)
    prompt.prompt = True
    assert prompt.look(old, 2.0) == Post("b", "a")


def test_a_conflict_is_not_hammered() -> None:
    sync = Sync(Chain(), "b")
    assert sync.look(read(row("a")), 0.0) == Post("b", None)
    assert sync.refused("updating", conflict=True, now=0.0) is None
    assert isinstance(sync.look(read(row("a")), 0.05), Wait)
    assert sync.look(read(row("a")), 0.2) == Post("b", None)


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.none(),
                st.lists(
                    st.tuples(st.sampled_from(["a", "b", "c", "x", None]), st.booleans()),
                    max_size=3,
                ),
            ),
            st.floats(0.0, 300.0),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_a_difference_goes_out_only_over_its_predecessor(
    looks: list[tuple[list[tuple[str | None, bool]] | None, float, bool]],
) -> None:
    sync, now = Sync(chain_of("a", "b", "c"), "c"), 0.0
    for rows, pause, prompt in looks:
        now += pause
        sync.prompt = prompt
        replicas = None if rows is None else [ReplicaStatus(i, ready) for i, ready in rows]
        decision = sync.look(replicas, now)
        if isinstance(decision, Done):
            assert replicas
            assert all(replica.identity == "c" for replica in replicas)
            return
        if isinstance(decision, Post) and decision.previous is not None:
            assert replicas
            held = {replica.identity for replica in replicas}
            assert held <= {decision.previous, decision.identity}


# -- what is remembered --------------------------------------------------------------------------


def test_one_save_without_a_description_does_not_end_differences() -> None:
    chain = Chain()
    chain.saved(Snapshot("a", "base", None), chain.take_next_type())
    assert chain.take_next_type() == "delta"
    chain.saved(Snapshot("b"), "delta")  # the field is missing, and "b" was not loaded
    assert chain.take_next_type() == "base"
    chain.saved(Snapshot("c", "base", None), "base")
    assert chain.take_next_type() == "delta"


def test_the_distance_counts_the_steps_of_the_model_that_saved() -> None:
    steps = {"first": 3, "second": 0}
    chain = Chain(whole_only=True, several=True)
    chain.follow(lambda: steps["first"])
    chain.saved(Snapshot("a", "base", None), "base", 3, lambda: steps["first"])
    chain.follow(lambda: steps["second"])
    assert chain.distance("a") == 0
    steps["second"] += 5
    assert chain.distance("a") == 0
    steps["first"] += 2
    assert chain.distance("a") == 2
    assert chain.step_of("a") == 3
    steps["first"] = 0  # it went back to an earlier state
    assert chain.distance("a") is None


def test_links_are_concluded_from_a_whole_list_only() -> None:
    listed = {"a": None, "b": "a", "c": "b"}
    assert [(link.identity, link.kind) for link in links_to("c", listed)] == [
        ("c", "delta"),
        ("b", "delta"),
        ("a", "base"),
    ]
    assert links_to("c", {"c": "b", "b": "a"}) == []
    assert links_to("c", {"c": "b", "b": "c"}) == []
    assert links_to("z", listed) == []


def test_requests_are_at_most_twice_those_of_a_client_that_looks_every_five_seconds() -> None:
    pace, at, sent = Pace(), 0.0, 2  # a look, and the request
    for loaded_after in range(1, 600):
        while at < loaded_after:
            at += pace.take_next()
            sent += 1
        theirs = 2 + -(-loaded_after // 5)  # the request, a look at once, and one every 5 s
        assert sent <= 2 * theirs, loaded_after
