"""Several models on one trainer, adapters loaded, models made from states of the Tinker API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fireworks_training.local.store.tinker_store import TinkerStore
from tests.local.trainer.trainer_driver import (
    ADAM,
    HTTP,
    Starter,
    Trainer,
    cross_entropy,
    new_model,
    some_data,
)

LORA = {"rank": 4, "alpha": 8.0, "seed": 3}
DATA = some_data()
SESSION = f"ts-{'a' * 32}"


async def step(trainer: Trainer) -> float:
    answer = await trainer.ok("forward_backward", **cross_entropy(*DATA))
    await trainer.ok("optim_step", adam_params=ADAM)
    return float(answer["metrics"]["loss:sum"])


async def loss(trainer: Trainer) -> float:
    answer = await trainer.ok("forward", **cross_entropy(*DATA, backward=False))
    return float(answer["metrics"]["loss:sum"])


async def create(http: HTTP, **fields: Any) -> tuple[int, dict[str, Any]]:
    async with http.post("/api/v1/create_session", json={}) as response:
        session_id = (await response.json())["session_id"]
    body = {"session_id": session_id, "model_seq_id": 0, **fields}
    async with http.post("/api/v1/create_model", json=body) as response:
        return response.status, await response.json()


async def test_models_of_different_ranks_train_apart(start: Starter) -> None:
    one = await start(lora=LORA, lora_rank=8)
    other = await new_model(one.http, lora_config={"rank": 8, "seed": 1})
    reference = await new_model(one.http, lora_config=None, base_only=True)
    untouched = await loss(reference)
    assert await step(one) == await loss(other) == untouched
    assert await loss(one) < untouched
    assert await loss(other) == untouched
    await step(other)
    assert await loss(reference) == untouched
    refused = await reference.run("forward_backward", **cross_entropy(*DATA))
    assert refused["error_class"] == "ReferenceModel"


async def test_a_rank_beyond_the_most_is_refused(start: Starter) -> None:
    trainer = await start(lora=LORA, lora_rank=8)
    for rank in (0, 9):
        status, answer = await create(trainer.http, lora_config={"rank": rank})
        assert status == 400
        assert "rank 1 to 8" in answer["error"]


async def test_an_adapter_is_loaded_with_a_new_optimizer(start: Starter) -> None:
    trainer = await start(lora=LORA)
    await step(trainer)
    saved = await trainer.ok("save_weights_for_sampler", path="warm")
    wanted = await loss(trainer)
    fresh = await new_model(trainer.http, lora_config=LORA)
    answer = await fresh.ok("load_adapter", adapter_path=saved["path"])
    assert answer == {"adapter_path": saved["path"], "type": "load_adapter"}
    assert abs(await loss(fresh) - wanted) < 1e-3
    other = await new_model(trainer.http, lora_config={**LORA, "alpha": 16.0})
    refused = await other.run("load_adapter", adapter_path=saved["path"])
    assert refused["error_class"] == "StateMismatch"
    missing = await fresh.run("load_adapter", adapter_path="nothing")
    assert missing["error_class"] == "SnapshotMissing"
    status, answer = await fresh.send("load_adapter", adapter_path="gs://bucket/adapter")
    assert (status, "snapshot" in answer["error"]) == (400, True)


async def test_a_full_model_takes_no_adapter(start: Starter) -> None:
    trainer = await start()
    status, answer = await trainer.send("load_adapter", adapter_path="x")
    assert (status, "has none" in answer["error"]) == (400, True)


# -- runs of the Tinker API ----------------------------------------------------------------------


async def start_run(start: Starter, tmp_path: Path) -> Trainer:
    trainer = await start(lora=LORA, lora_rank=8, tinker_dir=tmp_path / "tinker")
    await trainer.post_internal("sessions", {"session_id": SESSION})
    return await run_of(trainer.http, 0, "create_model", lora_config=LORA)


async def run_of(http: HTTP, number: int, kind: str, **fields: Any) -> Trainer:
    trainer = Trainer(http, SESSION, "", {})
    body = {"session_id": SESSION, "model_seq_id": number, **fields}
    status, answer = await trainer.post(kind, body)
    assert status == 200, answer
    created = await trainer.result(answer["request_id"])
    return Trainer(http, SESSION, answer["model_id"], created)


async def test_checkpoints_have_paths_and_notes(start: Starter, tmp_path: Path) -> None:
    run = await start_run(start, tmp_path)
    await step(run)
    state = await run.ok("save_weights", path="step-1", user_metadata={"a": "b"}, ttl_seconds=3600)
    assert state["path"] == f"tinker://{SESSION}:train:0/weights/step-1"
    again = await run.run("save_weights", path="step-1")
    assert again["error_class"] == "StateExists"
    assert "replaced" not in state
    assert (await run.ok("save_weights", path="step-1", overwrite=True))["replaced"] is True
    sampler = await run.ok("save_weights_for_sampler", path="step-1")
    assert sampler["path"] == f"tinker://{SESSION}:train:0/sampler_weights/step-1"
    ephemeral = await run.ok("save_weights_for_sampler", sampling_session_seq_id=3)
    assert ephemeral["path"] is None
    assert ephemeral["sampling_session_id"] == f"{SESSION}:sampler:3"
    store = TinkerStore(tmp_path / "tinker")
    note = store.run(f"{SESSION}:train:0")
    assert note is not None
    assert note.lora is not None
    assert note.lora["rank"] == 4
    paths = [note.path for note in store.checkpoints()]
    assert paths == [state["path"], sampler["path"]]


async def test_a_state_whose_note_was_not_written_may_be_saved_again(
    start: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await start_run(start, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("fireworks_training.local.store.tinker_store.sync_file", full)
        failed = await run.run("save_weights", path="step-1")
    assert failed["error_class"] == "NotWritten"
    assert "disk full" in failed["error"]
    store = TinkerStore(tmp_path / "tinker")
    assert store.checkpoints() == []
    assert list((tmp_path / "tinker" / "checkpoints").iterdir()) == []  # no draft of it
    saved = await run.ok("save_weights", path="step-1")  # nobody was ever given the first
    assert "replaced" not in saved
    assert [note.path for note in store.checkpoints()] == [saved["path"]]


async def test_a_run_begins_from_a_state(start: Starter, tmp_path: Path) -> None:
    run = await start_run(start, tmp_path)
    await step(run)
    path = (await run.ok("save_weights", path="s"))["path"]
    wanted = [await step(run) for _ in range(2)]
    with_optimizer = await run_of(run.http, 1, "load_weights", path=path, optimizer=True)
    assert with_optimizer.created["path"] == path
    assert [await step(with_optimizer) for _ in range(2)] == wanted
    without = await run_of(run.http, 2, "load_weights", path=path, optimizer=False)
    assert await step(without) == wanted[0]
    assert await step(without) != wanted[1]
    # Loading changed nothing in the run that saved.
    await run.ok("load_weights", path=path, optimizer=True)
    assert [await step(run) for _ in range(2)] == wanted


async def test_a_missing_state_makes_no_model(start: Starter, tmp_path: Path) -> None:
    run = await start_run(start, tmp_path)
    for path, words in [
        (f"tinker://{SESSION}:train:0/weights/nothing", "has no state"),
        (f"tinker://{SESSION}:train:0/sampler_weights/x", "sampler checkpoint"),
        ("tinker://x/y", "is not a checkpoint"),
        (f"tinker://{SESSION}:train:0/weights/../../x", "is not a checkpoint"),
    ]:
        body = {"session_id": SESSION, "model_seq_id": 5, "path": path, "optimizer": True}
        status, answer = await run.post("load_weights", body)
        assert status == 400
        assert words in answer["error"]
