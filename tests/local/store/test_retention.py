"""What is served, the newest, and the chains they are built from stay; the rest goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training.local.store.retention import (
    KEEP_NAMED,
    KEEP_SYNCS,
    Stored,
    clean,
    to_remove,
)
from fireworks_training.local.store.snapshots import SnapshotStore

OLD = 10_000.0


def chain(count: int, *, job: str = "j", whole_every: int = 100) -> list[Stored]:
    return [
        Stored(
            f"weight-sync-{number:03d}",
            f"weight-sync-{number - 1:03d}" if number % whole_every else None,
            job,
            float(number),
        )
        for number in range(count)
    ]


def test_the_newest_and_what_they_are_built_from_stay() -> None:
    assert to_remove(chain(20), set(), OLD) == []  # one chain: each is needed by the last
    gone = to_remove(chain(40, whole_every=10), set(), OLD)
    assert gone == [f"weight-sync-{number:03d}" for number in range(30)]
    served = to_remove(chain(40, whole_every=10), {"weight-sync-012"}, OLD)
    assert set(gone) - set(served) == {"weight-sync-010", "weight-sync-011", "weight-sync-012"}


def test_named_ones_stay_longer_and_jobs_do_not_push_each_other_out() -> None:
    named = [Stored(f"n{number:03d}", None, "a", float(number)) for number in range(70)]
    gone = to_remove([*named, *chain(3, job="b", whole_every=1)], set(), OLD)
    assert gone == [f"n{number:03d}" for number in range(70 - KEEP_NAMED)]


def test_what_is_young_stays() -> None:
    assert to_remove(chain(40, whole_every=1), set(), 40.0) == []


@given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), max_size=30), st.data())
def test_nothing_that_is_kept_loses_a_link(
    rows: list[tuple[int, bool]], data: st.DataObject
) -> None:
    stored: list[Stored] = []
    for number, (job, whole) in enumerate(rows):
        mine = [one.identity for one in stored if one.job == str(job)]
        previous = None if whole or not mine else mine[-1]
        stored.append(Stored(f"weight-sync-{number}", previous, str(job), float(number)))
    used = (
        data.draw(st.sets(st.sampled_from([one.identity for one in stored]))) if stored else set()
    )
    gone = set(to_remove(stored, used, OLD))
    assert not gone & used
    for one in stored:
        if one.identity not in gone:
            assert one.predecessor not in gone
    for job in ("0", "1"):
        newest = [one.identity for one in stored if one.job == job][-KEEP_SYNCS:]
        assert not gone & set(newest)


def test_files_go_with_their_snapshots(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, writer="j")
    for number in range(7):
        identity = store.write(
            f"weight-sync-{number}", {"a": torch.zeros(2)}, base_model="m", dtype="float32"
        ).identity
        os.utime(store.path(identity), (number, number))
    assert clean(store, {"weight-sync-0"}, time.time()) == ["weight-sync-1", "weight-sync-2"]
    assert store.identities() == ["weight-sync-0", *(f"weight-sync-{n}" for n in range(3, 7))]
    assert len(list(tmp_path.iterdir())) == 5


def test_what_was_given_a_time_is_kept_until_then_and_goes_after_it() -> None:
    def one(name: str, expires: float | None, predecessor: str | None = None) -> Stored:
        return Stored(name, predecessor, "j", 0.0, expires)

    now = 10_000.0
    stored = [
        one("over", now - 1),
        one("left", now + 1),
        one("served", now - 1),
        one("plain", None),
    ]
    assert to_remove(stored, {"served"}, now) == ["over"]
    # What a kept one builds on stays, whatever its time.
    chain = [one("base", now - 1), one("delta", now + 1, "base")]
    assert to_remove(chain, set(), now) == []
