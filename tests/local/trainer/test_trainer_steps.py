"""Failed steps over HTTP: the gradients dropped, the operations that go on, the weights after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fireworks_training.local.trainer.run.states import StateStore
from tests.local.trainer.trainer_driver import (
    ADAM,
    Starter,
    Trainer,
    cross_entropy,
    datum,
    some_data,
)

GOOD = cross_entropy(*some_data(1))
OVERFLOWS = cross_entropy(datum([1, 2], [2, 3], weights=[3e38, 3e38]))
"""Finite numbers whose loss is not."""
REFUSED = cross_entropy(datum([1, 2], [2, 99]))
"""A target outside the vocabulary."""


async def state_of(trainer: Trainer, tmp_path: Path, name: str) -> dict[str, Any]:
    await trainer.ok("save_weights", path=name)
    return StateStore(tmp_path / "jobs" / "job-1" / "states").load(name)[1]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


async def step(trainer: Trainer, seed: int) -> dict[str, Any]:
    await trainer.ok("forward_backward", **cross_entropy(*some_data(seed)))
    return await trainer.ok("optim_step", adam_params=ADAM)


@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_failed_pass_drops_its_step_and_the_next_is_as_if_alone(
    start: Starter, tmp_path: Path, place: int
) -> None:
    trainer = await start()
    before = await state_of(trainer, tmp_path, "before")
    passes = [GOOD, cross_entropy(*some_data(2))]
    passes.insert(place, OVERFLOWS)
    ids = [await trainer.submit("forward_backward", **body) for body in passes]
    ids.append(await trainer.submit("optim_step", adam_params=ADAM))
    ids.append(await trainer.submit("forward", **cross_entropy(*some_data(), backward=False)))
    answers = [await trainer.result(request_id) for request_id in ids]

    assert answers[place]["error_class"] == "NonFinite"
    assert answers[place]["category"] == "user"
    for answer in answers[place + 1 : 4]:
        assert answer["error_class"] == "PrecedingOperationFailed"
        assert answer["cause"]["error_class"] == "NonFinite"
        assert answer["cause"]["seq_id"] == place + 2
        assert answer["cause"]["error"] == answers[place]["error"]
    assert all("error" not in answer for answer in [*answers[:place], answers[4]])
    assert equal(await state_of(trainer, tmp_path, "after"), before)

    alone = await start()
    assert await step(trainer, 5) == await step(alone, 5)
    ends = [await state_of(t, tmp_path, "end") for t in (trainer, alone)]
    assert equal(*ends)


async def test_a_refused_pass_takes_its_place_and_fails_its_step(start: Starter) -> None:
    trainer = await start()
    status, refusal = await trainer.send("forward_backward", **REFUSED)
    assert status == 400
    assert "datum 0" in refusal["error"]
    assert "service.get_tokenizer()" in refusal["error"]
    assert (refusal["category"], refusal["error_class"]) == ("user", "InvalidRequest")
    assert (await trainer.send("forward_backward", 1, **REFUSED)) == (400, refusal)

    filler = cross_entropy(datum([0], [0], weights=[0.0]), backward=False)
    status, answer = await trainer.send("forward", 1, **filler)
    assert (status, answer["error_class"]) == (409, "Conflict")

    failed = await trainer.run("optim_step", adam_params=ADAM)
    assert failed["error_class"] == "PrecedingOperationFailed"
    assert failed["cause"]["seq_id"] == 1
    await step(trainer, 0)


async def test_chunks_in_any_order_and_the_second_of_three_fails(
    start: Starter, tmp_path: Path
) -> None:
    trainer = await start()
    before = await state_of(trainer, tmp_path, "before")
    chunks = {2: GOOD, 3: OVERFLOWS, 4: GOOD}
    ids = {}
    step_id = await trainer.submit("optim_step", 5, adam_params=ADAM)
    for seq_id in (4, 3, 2):
        ids[seq_id] = await trainer.submit("forward_backward", seq_id, **chunks[seq_id])
    trainer.seq_id = 5
    assert "error" not in await trainer.result(ids[2])
    assert (await trainer.result(ids[3]))["error_class"] == "NonFinite"
    for request_id in (ids[4], step_id):
        answer = await trainer.result(request_id)
        assert answer["error_class"] == "PrecedingOperationFailed"
        assert answer["cause"]["seq_id"] == 3
    assert equal(await state_of(trainer, tmp_path, "after"), before)


async def test_an_optim_step_that_fails_drops_its_own_step_alone(
    start: Starter, tmp_path: Path
) -> None:
    trainer = await start()
    before = await state_of(trainer, tmp_path, "before")
    failed = await trainer.run("optim_step", adam_params=ADAM)
    assert (failed["error_class"], failed["category"]) == ("NoGradients", "user")
    assert equal(await state_of(trainer, tmp_path, "after"), before)
    alone = await start()
    assert await step(trainer, 5) == await step(alone, 5)


@pytest.mark.parametrize("body", [GOOD, OVERFLOWS])
async def test_discarding_begins_a_new_step(
    start: Starter, tmp_path: Path, body: dict[str, Any]
) -> None:
    trainer, alone = await start(), await start()
    await trainer.run("forward_backward", **body)
    await trainer.ok("discard_gradients")
    assert await step(trainer, 5) == await step(alone, 5)


async def test_a_failed_load_takes_the_step_and_a_good_one_drops_gradients(start: Starter) -> None:
    trainer, alone = await start(), await start()
    failed = await trainer.run("load_weights", path="nowhere", optimizer=True)
    assert failed["error_class"] == "StateNotFound"
    assert "none" in failed["error"]
    answer = await trainer.run("forward_backward", **GOOD)
    assert answer["error_class"] == "PrecedingOperationFailed"
    await trainer.ok("discard_gradients")

    await trainer.ok("save_weights", path="start")
    await trainer.ok("forward_backward", **GOOD)
    await trainer.ok("load_weights", path="start", optimizer=True)
    assert await step(trainer, 5) == await step(alone, 5)


async def test_forward_and_saves_fail_alone(start: Starter) -> None:
    trainer = await start(app={"free_bytes": lambda _: 0})
    await trainer.ok("forward_backward", **GOOD)
    for kind in ("save_weights", "save_weights_for_sampler"):
        failed = await trainer.run(kind, path="x")
        assert failed["error_class"] == "NoSpace"
        assert "nothing was written" in failed["error"]
    status, _ = await trainer.send("forward", **cross_entropy(datum([99], [0]), backward=False))
    assert status == 400
    await trainer.ok("optim_step", adam_params=ADAM)


async def test_weights_that_became_nan_are_named(start: Starter, tmp_path: Path) -> None:
    trainer = await start()
    await trainer.ok("save_weights", path="good")
    states = StateStore(tmp_path / "jobs" / "job-1" / "states")
    info, tensors = states.load("good")
    tensors["master.model.norm.weight"][0] = float("nan")
    states.save("bad", info, tensors)
    await trainer.ok("load_weights", path="bad", optimizer=False)
    ids = [
        await trainer.submit("forward", **cross_entropy(*some_data(), backward=False)),
        await trainer.submit("forward_backward", **GOOD),
        await trainer.submit("optim_step", adam_params=ADAM),
    ]
    forward, passed, stepped = [await trainer.result(request_id) for request_id in ids]
    assert forward["error_class"] == passed["error_class"] == "NonFinite"
    assert "its weights" in passed["error"]
    assert stepped["error_class"] == "PrecedingOperationFailed"
    await trainer.ok("load_weights", path="good", optimizer=True)
    await step(trainer, 5)


@pytest.mark.parametrize("scale", [1e6, 0.0])
async def test_a_step_at_the_ends_of_its_ranges_is_whole(start: Starter, scale: float) -> None:
    trainer = await start()
    extreme = {
        "learning_rate": scale,
        "weight_decay": scale,
        "beta1": 1 - 1e-16,
        "beta2": 0.0,
        "eps": 1e-30,
        "grad_clip_norm": 1e30,
    }
    await trainer.ok("forward_backward", **GOOD)
    await trainer.ok("optim_step", adam_params=extreme)
