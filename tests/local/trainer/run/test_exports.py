"""Snapshots are captured in the queue and written beside it; deltas are to the last save."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fireworks_training.local.model.model import load_model, round_parameters_, set_weights_
from fireworks_training.local.store.snapshots import SnapshotStore
from fireworks_training.local.trainer.run.exports import LONGEST_CHAIN
from tests.local.trainer.trainer_driver import ADAM, Starter, Trainer, cross_entropy, some_data

LORA = {"rank": 4, "alpha": 8.0}
SMALL = {**ADAM, "learning_rate": 1e-5}


async def step(trainer: Trainer, seed: int = 0, adam: dict[str, float] = SMALL) -> None:
    await trainer.ok("forward_backward", **cross_entropy(*some_data(seed=seed)))
    await trainer.ok("optim_step", adam_params=adam)


async def save(trainer: Trainer, name: str, kind: str = "delta") -> dict[str, Any]:
    answer = await trainer.ok("save_weights_for_sampler", path=name, checkpoint_type=kind)
    snapshot: dict[str, Any] = answer["snapshot"]
    assert answer["path"] == snapshot["identity"]
    return snapshot


def described(snapshot: dict[str, Any]) -> tuple[str, str | None]:
    return snapshot["kind"], snapshot["predecessor"]


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots")


async def test_each_difference_is_to_the_save_before_it(
    start: Starter, store: SnapshotStore
) -> None:
    trainer = await start()
    assert described(await save(trainer, "a")) == ("base", None)  # there was none before
    await step(trainer, 1)
    b = await save(trainer, "b")
    assert described(b) == ("delta", "a")
    await step(trainer, 2)
    assert described(await save(trainer, "c")) == ("delta", "b")
    assert b["bytes"] < 0.7 * store.read("a").bytes
    # A base written beside says what a difference has to lead to.
    whole = await save(trainer, "d", "base")
    assert described(whole) == ("base", None)
    assert whole["sha256"] == store.read("c").sha256
    assert store.load("c")[0].tensors == store.load("d")[0].tensors
    await step(trainer, 3)
    assert described(await save(trainer, "e")) == ("delta", "d")


async def test_a_whole_one_is_written_where_a_difference_is_no_good(
    start: Starter, store: SnapshotStore
) -> None:
    trainer = await start()
    await save(trainer, "a")
    await step(trainer, 1, {**ADAM, "learning_rate": 1.0})
    assert described(await save(trainer, "b")) == ("base", None)  # it would not pay
    await step(trainer, 2)
    store.path("b").rename(store.folder / "moved")
    assert described(await save(trainer, "c")) == ("base", None)  # nobody could apply it
    for number in range(LONGEST_CHAIN):
        assert (await save(trainer, f"link-{number}"))["kind"] == "delta"
    assert (await save(trainer, "long"))["kind"] == "base"


async def test_more_effort_leads_to_the_same_weights(start: Starter, store: SnapshotStore) -> None:
    trainer = await start(delta_compression="small")
    await save(trainer, "a")
    await step(trainer, 1)
    delta = await save(trainer, "b")
    assert described(delta) == ("delta", "a")
    assert delta["sha256"] == (await save(trainer, "c", "base"))["sha256"]
    assert store.load("b")[0].tensors == store.read("c").tensors


async def test_fp32_and_adapters_are_always_whole(start: Starter) -> None:
    exact = await start(snapshot_dtype="float32")
    await save(exact, "a")
    await step(exact)
    assert described(await save(exact, "b")) == ("base", None)
    adapter = await start(lora=LORA)
    for name in ("c", "d"):
        assert described(await save(adapter, name)) == ("lora", None)


async def test_a_merged_base_serves_what_the_adapter_gives(
    start: Starter, store: SnapshotStore, model_path: Path
) -> None:
    trainer = await start(lora=LORA)
    await step(trainer, 1, {**ADAM, "learning_rate": 1e-2})
    assert described(await save(trainer, "merged", "merged_base")) == ("base", None)
    entry = some_data(count=1)[0]
    answer = await trainer.ok("forward", **cross_entropy(entry, backward=False))
    trained = np.array(answer["loss_fn_outputs"][0]["logprobs"]["data"])
    ids = torch.tensor(entry["model_input"]["chunks"][0]["tokens"])
    targets = torch.tensor(entry["loss_fn_inputs"]["target_tokens"]["data"])
    engine = load_model(model_path)
    round_parameters_(engine, "bfloat16")

    def difference() -> float:
        with torch.no_grad():
            logprobs = engine(input_ids=ids[None]).logits[0].log_softmax(-1)
        served = logprobs.gather(1, targets[:, None])[:, 0].numpy()
        return float(np.abs(served - trained).max())

    untrained = difference()
    manifest, tensors = store.load("merged")
    assert manifest.lora is None
    set_weights_(engine, tensors)
    assert difference() < 5e-3 < untrained  # the merged weights are rounded once more


class Gate:
    """Free space that is told at once to the trainer and, while it is shut, late to the writer."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, folder: Path) -> int:
        if threading.current_thread().name == "export":
            self.reached.set()
            assert self.open.wait(30)
        return 1 << 40


async def test_training_goes_on_while_a_snapshot_is_written(start: Starter) -> None:
    gate = Gate()
    trainer = await start(app={"free_bytes": gate})
    saving = await trainer.submit("save_weights_for_sampler", path="a", checkpoint_type="base")
    result = asyncio.create_task(trainer.result(saving))
    await asyncio.to_thread(gate.reached.wait, 30)
    await step(trainer, 1)
    second = await trainer.submit("save_weights_for_sampler", path="b", checkpoint_type="delta")
    await step(trainer, 2)
    assert not result.done()
    gate.open.set()
    assert (await result)["snapshot"]["kind"] == "base"
    # The second one holds what was trained when it was asked for, not what was when it was written.
    assert described((await trainer.result(second))["snapshot"]) == ("delta", "a")
    third = await save(trainer, "c")
    assert described(third) == ("delta", "b")
    assert third["sha256"] != (await trainer.result(second))["snapshot"]["sha256"]


async def test_captures_that_wait_are_bounded(start: Starter) -> None:
    gate = Gate()
    trainer = await start(app={"free_bytes": gate})
    saves = [
        await trainer.submit("save_weights_for_sampler", path=n, checkpoint_type="base")
        for n in ("a", "b", "c")
    ]
    after = await trainer.submit("forward", **cross_entropy(*some_data(), backward=False))
    forward = asyncio.create_task(trainer.result(after))
    await asyncio.to_thread(gate.reached.wait, 30)
    assert not forward.done()  # the third copy of the model has to wait, and the line with it
    gate.open.set()
    assert [(await trainer.result(one))["path"] for one in saves] == ["a", "b", "c"]
    assert "error" not in await forward


async def test_a_full_disk_refuses_a_save_before_it_starts_and_training_goes_on(
    start: Starter, store: SnapshotStore
) -> None:
    free = 1 << 40
    trainer = await start(app={"free_bytes": lambda folder: free})
    await save(trainer, "a")
    await step(trainer, 1)
    free = 1 << 10
    answer = await trainer.run("save_weights_for_sampler", path="b", checkpoint_type="delta")
    assert answer["error_class"] == "NoSpace"
    assert "nothing was written" in answer["error"]
    assert store.identities() == ["a"]
    await step(trainer, 2)
    free = 1 << 40
    assert described(await save(trainer, "c")) == ("delta", "a")
