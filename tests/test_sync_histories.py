"""Histories of saves, loads and accidents: the engine never serves, under a name, other weights
than that name's, and a sync always ends, live or with a typed error.

Then, guard by guard, the negative controls: with the guard taken out, a history is found wrong.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from fireworks_training import HotLoadFailed, HotLoadTimeout, WeightSyncError
from fireworks_training._async.weights.weight_sync import Loaded
from fireworks_training._core import snapshots as core
from fireworks_training.local.engine import weights as engine
from fireworks_training.local.trainer.queue.operations import OperationFailed
from tests.sync_world import World, run

SHARED_MEMORY = Path("/dev/shm")


def new_folder() -> Path:
    home = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    return Path(tempfile.mkdtemp(prefix="snapshots-", dir=home))


FATES = st.lists(st.integers(0, 2**16), max_size=30)


class Histories(RuleBasedStateMachine):
    """One world; each rule is something that a user, a trainer or an operator does."""

    naive = False

    @initialize(replicas=st.integers(1, 3))
    def begin(self, replicas: int) -> None:
        self.folder = new_folder()
        self.world = World(self.folder, replicas_wanted=replicas, naive=self.naive)
        self.names: list[str] = []

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def meanwhile(self, fates: list[int]) -> None:
        """What happens at the next requests; then all is calm, and work gets done."""
        left = iter(fates)
        self.world.choose = lambda events: events[next(left, 0) % len(events)]

    def settle(self, outcome: Loaded | Exception) -> None:
        """A sync has ended: with a typed error, or with its snapshot on every replica."""
        self.world.check()
        if isinstance(outcome, Exception):
            assert isinstance(outcome, (WeightSyncError, OperationFailed)), outcome
        else:
            self.names.append(outcome.identity)
            seen = [replica.seen["current_snapshot_identity"] for replica in self.world.replicas]
            assert set(seen) == {outcome.identity}

    @rule(seed=st.integers(0, 9), size=st.sampled_from([1e-4, 3e-3, 1.0]))
    def train(self, seed: int, size: float) -> None:
        self.world.train(seed, size)

    @rule(wanted=st.sampled_from([None, None, "base", "delta"]))
    def save_without_loading(self, wanted: Any) -> None:
        if not self.naive or wanted != "delta":
            self.names.append(self.world.save(wanted).identity)

    @rule(fates=FATES)
    def weight_sync(self, fates: list[int]) -> None:
        self.meanwhile(fates)
        self.settle(run(self.world.load(self.world.save().identity)))

    @rule(fates=FATES, place=st.integers(0, 5))
    def load_an_old_one(self, fates: list[int], place: int) -> None:
        if self.names:
            self.meanwhile(fates)
            name = self.names[place % len(self.names)]
            self.settle(run(self.world.load(name, may_save=False)))

    @rule(fates=FATES)
    def three_syncs_at_once(self, fates: list[int]) -> None:
        self.meanwhile(fates)
        names = []
        for seed in range(3):
            self.world.train(20 + seed, 3e-3)
            names.append(self.world.save().identity)

        async def at_once() -> list[Loaded | Exception]:
            return await asyncio.gather(*(self.world.load(name) for name in names))

        outcomes = run(at_once())
        self.world.check()
        assert all(isinstance(one, (Loaded, WeightSyncError)) for one in outcomes)
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, Loaded) and outcome.identity in names:
                # Never an older one than was asked for.
                assert names.index(outcome.identity) >= names.index(name)

    @rule(full=st.booleans())
    def the_disk_fills(self, full: bool) -> None:
        self.world.disk_full = full
        if full:
            before = self.world.store.identities()
            with pytest.raises(OperationFailed, match="nothing was written"):
                self.world.save()
            assert self.world.store.identities() == before
            self.world.disk_full = False

    @rule()
    def another_client_attaches(self) -> None:
        if self.naive:
            # What another session's snapshot is a difference to, such a server tells nobody.
            self.names.clear()
        elif self.names:
            self.world.foreign = self.names[-1]
        self.world.new_client()

    @rule(place=st.integers(0, 5))
    def a_file_is_damaged(self, place: int) -> None:
        if self.names and not self.naive:
            self.world.damage(self.names[place % len(self.names)])

    @rule(fates=FATES)
    def something_happens(self, fates: list[int]) -> None:
        self.meanwhile(fates)
        self.world.happen()


class NaiveHistories(Histories):
    """A server that neither checks nor tells: what is right there, the client alone decides."""

    naive = True


QUICK = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LARGE = settings(QUICK, max_examples=3000, stateful_step_count=16)


@pytest.mark.parametrize("histories", [Histories, NaiveHistories])
def test_histories(histories: type[Histories]) -> None:
    run_state_machine_as_test(histories, settings=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("histories", [Histories, NaiveHistories])
def test_thousands_of_histories(histories: type[Histories]) -> None:
    run_state_machine_as_test(histories, settings=LARGE)


# -- negative controls -----------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[World]:
    """Two replicas that hold `s1`; `s2` and `s3` are saved: differences, not loaded."""
    folder = new_folder()
    world = World(folder)
    world.choose = lambda events: events[0]
    world.train(10, 3e-3)
    assert isinstance(run(world.load(world.save().identity)), Loaded)
    for seed in (11, 12):
        world.train(seed, 3e-3)
        world.save()
    yield world
    shutil.rmtree(folder)


def links(world: World) -> list[str | None]:
    return [world.store.read(name).predecessor for name in ("s1", "s2", "s3")]


def test_the_world_itself_is_right(world: World) -> None:
    assert links(world) == [None, "s1", "s2"]
    assert len(set(world.truth.values())) == 4
    loaded = run(world.load("s3"))
    assert loaded == Loaded("s3", ("s2", "s3"))
    assert world.posts[-2:] == [("s2", "s1"), ("s3", "s2")]


def straight_to(identity: str, previous: str) -> Any:
    """A client that names a predecessor which is not the one."""

    def next_(self: core.Sync, replicas: Any, reports: Any, now: float) -> core.Decision:
        return self._post(identity, previous, replicas, now)

    return next_


def test_the_gateway_refuses_a_predecessor_that_is_not_held(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.Sync, "_next", straight_to("s3", "s2"))
    outcome = run(world.load("s3", may_save=False))
    assert isinstance(outcome, HotLoadFailed)
    assert "a replica holds s1" in str(outcome)


def test_the_engine_refuses_a_difference_to_something_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client lies about the predecessor: the snapshot itself tells."""
    monkeypatch.setattr(core.Sync, "_next", straight_to("s3", "s1"))
    assert "is a delta to 's2'" in str(run(world.load("s3", may_save=False)))
    # Without that check the hashes still tell.
    monkeypatch.setattr(
        engine.WeightSet, "_check_predecessor", lambda self, manifest: self.held.version
    )
    assert "does not hold what its manifest says" in str(run(world.load("s3", may_save=False)))
    # And without them the wrong weights are served under its name.
    monkeypatch.setattr(engine, "check_hashes", lambda manifest, tensors: None)
    with pytest.raises(AssertionError, match="other weights are served"):
        run(world.load("s3", may_save=False))


def test_a_damaged_difference_is_refused_and_a_whole_one_saved(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.damage("s2")
    loaded = run(world.load("s3"))
    assert isinstance(loaded, Loaded)
    assert loaded.saved is not None
    assert loaded.saved.kind == "base"
    assert loaded.identity == loaded.saved.identity
    assert world.store.read(loaded.identity).sha256 == world.store.read("s3").sha256


def test_damage_that_nobody_looks_for_is_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.train(5, 3e-3)
    whole = world.save("base").identity
    world.damage(whole)
    assert isinstance(run(world.load(whole)), HotLoadFailed)
    monkeypatch.setattr("fireworks_training.local.store.snapshots.check_hashes", lambda *_: None)
    with pytest.raises(AssertionError, match="other weights are served"):
        run(world.load(whole))


def test_a_swap_over_other_weights_than_it_was_prepared_for_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = world.replicas[0]
    world.train(6, 3e-3)
    whole = world.save("base").identity
    prepared = replica.weights.prepare("s2")
    replica.weights.load(whole)
    with pytest.raises(engine.SnapshotRefused, match="another load has replaced"):
        replica.weights.swap(prepared)
    world.check()


def test_live_means_every_replica(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the first replica only, as is usual, a sync ends while another is behind."""
    steps = iter(["work"] * 3)

    def first_only(replicas: Any, identity: str) -> core.Progress:
        return judge(replicas[:1], identity)

    def second_is_slow() -> None:
        if next(steps, None):
            world.replicas[0].prepare()
            world.replicas[0].swap()

    judge = core.judge
    monkeypatch.setattr(world, "work", second_is_slow)
    assert isinstance(run(world.load("s2", may_save=False)), HotLoadTimeout)
    monkeypatch.setattr(core, "judge", first_only)
    assert run(world.load("s2")) == Loaded("s2", ("s2",))
    assert world.replicas[1].identity == "s1"


def test_an_old_error_is_not_this_loads(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for replica in world.replicas:
        replica.error = ("long ago", "an old error")
    assert isinstance(run(world.load("s2")), Loaded)
    # One of this very snapshot, from the try before, counts only once it had time to go away.
    for replica in world.replicas:
        replica.error = ("s3", "the try before")
        replica.seen = replica.row()
    assert isinstance(run(world.load("s3")), Loaded)
    monkeypatch.setattr(core, "_failed", lambda replica, identity: replica.stage == "error")
    for replica in world.replicas:
        replica.start("s1")
        replica.error = ("long ago", "an old error")
    monkeypatch.setattr(
        type(world.replicas[0]), "post", lambda self, identity: setattr(self, "pending", None)
    )
    assert isinstance(run(world.load("s2", may_save=False)), HotLoadFailed)


def test_a_load_that_a_replica_lost_is_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restart_once() -> None:
        work()
        if len(world.posts) == before + 1 and not restarted:
            restarted.append(True)
            world.replicas[1].start("s1")

    work, before, restarted = world.work, len(world.posts), list[bool]()
    monkeypatch.setattr(world, "work", restart_once)
    assert run(world.load("s2")) == Loaded("s2", ("s2", "s2"))
    # Without that rule it waits until its time is up.
    restarted.clear()
    before = len(world.posts)
    monkeypatch.setattr(core, "PROMPT_LOST_AFTER", float("inf"))
    assert isinstance(run(world.load("s3", may_save=False)), HotLoadTimeout)


def test_a_client_that_asks_for_differences_blindly_ruins_a_naive_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = new_folder()
    world = World(folder, naive=True)
    for seed in range(3):
        assert isinstance(run(world.load(world.save().identity)), Loaded)
        world.train(10 + seed, 3e-3)
    assert world.deltas, "in an unbroken run differences are used"
    world.check()
    world.save()  # saved, not loaded: the run is broken
    world.train(7, 3e-3)
    assert isinstance(run(world.load(world.save().identity)), Loaded)
    world.check()
    # The usual rule (the last loaded is the predecessor) adds the wrong difference.
    world.train(8, 3e-3)
    world.save("delta")
    world.train(9, 3e-3)
    name = world.save("delta").identity
    known = world.chain._known[name]
    world.chain._known[name] = replace(known, predecessor=world.chain.last_live)
    with pytest.raises(AssertionError, match="other weights are served"):
        run(world.load(name))
    shutil.rmtree(folder)
