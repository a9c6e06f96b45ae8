"""Training states: replaced atomically, found by name, refused when they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fireworks_training.local.model.optimizer import AdamSettings
from fireworks_training.local.store.snapshots import InvalidName, NoSpace, NotWritten
from fireworks_training.local.trainer.queue.operations import OperationFailed
from fireworks_training.local.trainer.run.states import StateInfo, StateStore
from tests.local.trainer.trainer_driver import ADAM, Starter, cross_entropy, new_model, some_data

INFO = StateInfo(
    base_model="m",
    lora=None,
    snapshot_dtype="bfloat16",
    optimizer_steps=3,
    adam=AdamSettings(learning_rate=0.5),
)


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"master.w": torch.full((3,), value), "rng": torch.arange(5, dtype=torch.uint8)}


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "jobs" / "job-1" / "states")


def test_what_was_saved_is_loaded(store: StateStore) -> None:
    store.save("s", INFO, tensors(1.0))
    info, loaded = store.load("s")
    assert info.model_copy(update={"tensors_file": ""}) == INFO
    assert all(torch.equal(loaded[name], t) for name, t in tensors(1.0).items())
    assert store.names() == ["s"]


def test_a_state_is_replaced(store: StateStore) -> None:
    for value in (1.0, 2.0):
        store.save("s", INFO, tensors(value))
    assert store.load("s")[1]["master.w"][0] == 2.0
    assert len(list((store.folder / "s").iterdir())) == 2


@pytest.mark.parametrize("at", ["save_file", "sync_file"])
def test_a_save_that_fails_leaves_the_old_state(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    store.save("s", INFO, tensors(1.0))

    def broken(*args: object) -> None:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr(f"fireworks_training.local.trainer.run.states.{at}", broken)
        for name in ("s", "new"):
            with pytest.raises(NotWritten, match="on fire"):
                store.save(name, INFO, tensors(2.0))
    assert store.load("s")[1]["master.w"][0] == 1.0
    assert store.names() == ["s"]
    assert len(list((store.folder / "s").iterdir())) == 2


def test_what_a_killed_save_left_is_cleaned(store: StateStore) -> None:
    store.save("s", INFO, tensors(1.0))
    (store.folder / "s" / "tensors-0.safetensors").write_bytes(b"half")
    (store.folder / "s" / "state.json.new").write_bytes(b"{")
    (store.folder / "first").mkdir()
    (store.folder / "first" / "tensors-0.safetensors").write_bytes(b"half")
    assert store.names() == ["s"]
    store.clean()
    assert [p.name for p in store.folder.iterdir()] == ["s"]
    assert len(list((store.folder / "s").iterdir())) == 2
    assert store.load("s")[1]["master.w"][0] == 1.0


def test_a_state_that_is_being_removed_is_none(store: StateStore) -> None:
    for name in ("s", "t"):
        store.save(name, INFO, tensors(1.0))
    removed = store.folder / f".tmp-removed.{'0' * 32}"
    (store.folder / "s").rename(removed)
    assert store.names() == ["t"]
    with pytest.raises(OperationFailed, match=r"saved states: t$"):
        store.load("s")
    store.clean()
    assert [path.name for path in store.folder.iterdir()] == ["t"]


def test_cleaning_keeps_a_damaged_state(store: StateStore) -> None:
    store.save("s", INFO, tensors(1.0))
    (store.folder / "s" / "state.json").write_bytes(b"{}")
    store.clean()
    assert len(list((store.folder / "s").iterdir())) == 2


def test_a_missing_state_lists_those_that_exist(store: StateStore) -> None:
    with pytest.raises(OperationFailed, match="saved states: none"):
        store.load("s")
    for name in ("b", "a"):
        store.save(name, INFO, tensors(1.0))
    with pytest.raises(OperationFailed, match="no state 's'; saved states: a, b") as caught:
        store.load("s")
    assert caught.value.error_class == "StateNotFound"


def test_a_sibling_jobs_state(store: StateStore) -> None:
    other = StateStore(store.folder.parent.parent / "job-2" / "states")
    other.save("s", INFO, tensors(2.0))
    assert store.load("s", "job-2")[1]["master.w"][0] == 2.0
    with pytest.raises(OperationFailed, match="job 'job-2' has no state 'x'; saved states: s"):
        store.load("x", "job-2")
    with pytest.raises(OperationFailed, match="no job 'job-3'"):
        store.load("s", "job-3")
    for name, job in (("..", None), ("s", ".."), ("a/b", None), ("s", "a/b")):
        with pytest.raises(InvalidName):
            store.load(name, job)


@pytest.mark.parametrize("lacks", ["exp_avg.model.norm.weight", "exp_avg_sq.", "rng"])
async def test_a_state_that_lacks_a_part_changes_nothing(
    start: Starter, tmp_path: Path, lacks: str
) -> None:
    trainer = await start()
    for seed in range(2):
        await trainer.ok("forward_backward", **cross_entropy(*some_data(seed)))
        await trainer.ok("optim_step", adam_params=ADAM)
        await trainer.ok("save_weights", path=f"after-{seed}")
    states = StateStore(tmp_path / "jobs" / "job-1" / "states")
    info, held = states.load("after-0")
    states.save("after-0", info, {k: v for k, v in held.items() if not k.startswith(lacks)})
    failed = await trainer.run("load_weights", path="after-0", optimizer=True)
    assert failed["error_class"] == "StateDamaged"
    assert "load_state takes its weights alone" in failed["error"]
    await trainer.run("optim_step", adam_params=ADAM)  # fails with it
    await trainer.ok("save_weights", path="unchanged")
    before, after = (states.load(name)[1] for name in ("after-1", "unchanged"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    await trainer.ok("load_weights", path="after-0", optimizer=False)


@pytest.mark.parametrize("file", ["state.json", "tensors"])
def test_damage_is_named(store: StateStore, file: str) -> None:
    store.save("s", INFO, tensors(1.0))
    place = store.folder / "s" / (store.load("s")[0].tensors_file if file == "tensors" else file)
    place.write_bytes(place.read_bytes()[:-3])
    with pytest.raises(OperationFailed, match="damaged") as caught:
        store.load("s")
    assert caught.value.error_class == "StateDamaged"


def test_a_tensor_file_elsewhere_is_not_followed(store: StateStore) -> None:
    store.save("s", INFO, tensors(1.0))
    place = store.folder / "s" / "state.json"
    name = store.load("s")[0].tensors_file
    place.write_text(place.read_text().replace(name, f"../s/{name}"))
    with pytest.raises(InvalidName):
        store.load("s")


def test_without_room_nothing_is_written(store: StateStore) -> None:
    full = StateStore(store.folder, free_bytes=lambda _: 100)
    with pytest.raises(NoSpace):
        full.save("s", INFO, tensors(1.0))
    assert list(store.folder.iterdir()) == []


async def test_states_over_http(start: Starter, tmp_path: Path) -> None:
    trainer = await start()
    await trainer.ok("forward_backward", **cross_entropy(*some_data()))
    await trainer.ok("optim_step", adam_params=ADAM)
    assert (await trainer.ok("save_weights", path="step-1"))["path"] == "step-1"
    wanted = await trainer.ok("forward", **cross_entropy(*some_data(), backward=False))

    reborn = await new_model(trainer.http)
    await reborn.ok("load_weights", path="step-1", optimizer=False)
    got = await reborn.ok("forward", **cross_entropy(*some_data(), backward=False))
    assert got == wanted

    states = tmp_path / "jobs" / "job-2" / "states"
    other = await start(job="job-2", states_dir=states)
    failed = await other.run("load_weights", path="step-1", optimizer=True)
    assert failed["error_class"] == "StateNotFound"
    await other.ok("discard_gradients")
    await other.ok("load_weights", path="cross_job://job-1/step-1", optimizer=True)
    got = await other.ok("forward", **cross_entropy(*some_data(), backward=False))
    assert got == wanted
    for path in ("cross_job://job-1", "cross_job://../step-1", "/etc", "a/b", "tinker://x/y"):
        status, answer = await other.send("load_weights", path=path, optimizer=True)
        assert status == 400
        assert "cross_job://<job>/<name>" in answer["error"]


async def test_a_second_save_of_a_name_takes_the_place_of_the_first(start: Starter) -> None:
    trainer = await start()
    before = await trainer.ok("forward", **cross_entropy(*some_data(), backward=False))
    first = await trainer.submit("save_weights", path="one")
    assert "replaced" not in await trainer.result(first)
    # The same request once more is the same save.
    assert await trainer.submit("save_weights", trainer.seq_id, path="one") == first
    assert "replaced" not in await trainer.result(first)
    await trainer.ok("forward_backward", **cross_entropy(*some_data()))
    await trainer.ok("optim_step", adam_params=ADAM)
    after = await trainer.ok("forward", **cross_entropy(*some_data(), backward=False))
    assert (await trainer.ok("save_weights", path="one"))["replaced"] is True
    await trainer.ok("load_weights", path="one", optimizer=True)
    loaded = await trainer.ok("forward", **cross_entropy(*some_data(), backward=False))
    assert loaded == after != before


async def test_a_state_of_another_kind_of_training(start: Starter) -> None:
    full = await start()
    await full.ok("save_weights", path="full")
    for rank in (2, 3):
        lora = await start(lora={"rank": rank})
        failed = await lora.run("load_weights", path="full", optimizer=True)
        assert failed["error_class"] == "StateMismatch"
        assert "every parameter" in failed["error"]
        await lora.ok("discard_gradients")
        await lora.ok("save_weights", path=f"lora-{rank}")
    failed = await lora.run("load_weights", path="lora-2", optimizer=True)
    assert failed["error_class"] == "StateMismatch"
