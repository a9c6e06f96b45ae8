"""The trainer over HTTP: a training loop's path, order, idempotency, models and their ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from fireworks_training.local.trainer.queue.line import QueueLimits
from fireworks_training.local.trainer.run import models
from fireworks_training.local.trainer.run.network import Network
from tests.local.trainer.trainer_driver import (
    ADAM,
    Starter,
    Trainer,
    cross_entropy,
    datum,
    new_model,
    some_data,
)

ONE = cross_entropy(datum([1], [2]), backward=False)


async def test_a_step_and_a_snapshot(start: Starter) -> None:
    trainer = await start()
    assert trainer.created["step_protocol"] == 1
    assert trainer.created["snapshot_protocol"] == 1
    assert trainer.created["wire"] == ["json", "protobuf"]
    assert trainer.created["supports_backward"] is True
    data = some_data()

    before = await trainer.ok("forward", **cross_entropy(*data, backward=False))
    passed = await trainer.ok("forward_backward", **cross_entropy(*data))
    assert passed["loss_fn_outputs"] == before["loss_fn_outputs"]
    lengths = [len(output["logprobs"]["data"]) for output in passed["loss_fn_outputs"]]
    assert lengths == [4, 7, 10]
    assert all(key.count(":") == 1 for key in passed["metrics"])
    assert passed["metrics"]["num_loss_tokens:sum"] == 4 + 7 + 10 - 3

    stepped = await trainer.ok("optim_step", adam_params=ADAM)
    assert stepped["metrics"]["grad_norm"] > 0
    after = await trainer.ok("forward", **cross_entropy(*data, backward=False))
    assert after["metrics"]["loss:sum"] < before["metrics"]["loss:sum"]

    saved = await trainer.ok("save_weights_for_sampler", path="step_1-abc", checkpoint_type="delta")
    assert saved["path"] == saved["snapshot"]["identity"] == "step_1-abc"
    assert saved["snapshot"]["kind"] == "base"
    again = await trainer.ok("save_weights_for_sampler", path="step_1-abc")
    assert again["path"] == "step_1-abc-2"
    assert again["snapshot"]["sha256"] == saved["snapshot"]["sha256"]


async def test_operations_wait_for_their_turn(start: Starter) -> None:
    trainer = await start(app={"hold_s": 0.01})
    late = await trainer.submit("forward", 2, **ONE)
    status, answer = await trainer.post("retrieve_future", {"request_id": late})
    assert (status, answer) == (
        200,
        {"type": "try_again", "request_id": late, "queue_state": "active"},
    )
    await trainer.submit("forward", 1, **ONE)
    assert "error" not in await trainer.result(late)


async def test_a_repeated_submit_is_the_same_operation(start: Starter) -> None:
    trainer = await start()
    body = cross_entropy(*some_data())
    first = await trainer.submit("forward_backward", 1, **body)
    # The same content with its keys in another order, and again after it has run.
    shuffled = dict(reversed(body["forward_backward_input"].items()))
    assert await trainer.submit("forward_backward", 1, forward_backward_input=shuffled) == first
    result = await trainer.result(first)
    assert await trainer.submit("forward_backward", 1, **body) == first
    assert await trainer.result(first) == result

    other = cross_entropy(*some_data(seed=9))
    status, answer = await trainer.send("forward_backward", 1, **other)
    assert (status, answer["error_class"]) == (409, "Conflict")
    status, answer = await trainer.send("discard_gradients", 1)
    assert status == 409

    trainer.seq_id = 1
    once = await trainer.ok("optim_step", adam_params={"learning_rate": 0.0})
    control = await start()
    await control.ok("forward_backward", **body)
    assert once == await control.ok("optim_step", adam_params={"learning_rate": 0.0})


async def test_a_dropped_poll_loses_nothing(start: Starter) -> None:
    trainer = await start()
    late = await trainer.submit("forward", 2, **ONE)
    for _ in range(2):
        poll = asyncio.create_task(trainer.result(late))
        await asyncio.sleep(0)  # let it start; whether it has reached the trainer does not matter
        poll.cancel()
        with pytest.raises(asyncio.CancelledError):
            await poll
    waiting = [asyncio.create_task(trainer.result(late)) for _ in range(3)]
    await trainer.submit("forward", 1, **ONE)
    answers = await asyncio.gather(*waiting)
    assert answers[0] == answers[1] == answers[2] == await trainer.result(late)


async def test_bounds_of_the_line(start: Starter) -> None:
    trainer = await start(app={"limits": QueueLimits(ahead=3, results=2)})
    async with trainer.http.post(
        "/api/v1/forward", json={"model_id": trainer.model_id, "seq_id": 4, **ONE}
    ) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "1"
    ids = [await trainer.submit("forward", **ONE) for _ in range(3)]
    for request_id in reversed(ids[1:]):
        await trainer.result(request_id)
    status, answer = await trainer.post("retrieve_future", {"request_id": ids[0]})
    assert (status, answer["error_class"]) == (410, "ResultExpired")


async def test_unknown_models_and_requests(start: Starter) -> None:
    trainer = await start()
    lost = "ts-0:train:0"
    for kind, body in (
        ("forward", {"model_id": lost, "seq_id": 1, **ONE}),
        ("retrieve_future", {"request_id": f"{lost}:op-1"}),
        ("get_info", {"model_id": lost}),
        ("unload_model", {"model_id": lost}),
    ):
        status, answer = await trainer.post(kind, body)
        assert (status, answer["error_class"]) == (410, "ModelLost"), kind
    for tail in ("op-1", "op-x", "op-", "nothing", "unload"):
        request_id = f"{trainer.model_id}:{tail}"
        status, answer = await trainer.post("retrieve_future", {"request_id": request_id})
        assert (status, answer["error_class"]) == (404, "NotFound"), tail
    status, _ = await trainer.post("retrieve_future", {"request_id": "nothing"})
    assert status == 404
    status, answer = await trainer.post(
        "create_model", {"session_id": "ts-0", "model_seq_id": 0, "base_model": "m"}
    )
    assert (status, answer["error_class"]) == (410, "SessionGone")


async def test_creating_a_model_is_idempotent(start: Starter) -> None:
    trainer = await start()
    body = {
        "session_id": trainer.session_id,
        "model_seq_id": 0,
        "base_model": "accounts/local/models/tiny-qwen3",
        "lora_config": {"rank": 0},
    }
    status, answer = await trainer.post("create_model", body)
    assert (status, answer["model_id"]) == (200, trainer.model_id)
    assert await trainer.result(answer["request_id"]) == trainer.created
    status, _ = await trainer.post("create_model", {**body, "user_metadata": {"a": "b"}})
    assert status == 409
    status, answer = await trainer.post("create_model", {**body, "model_seq_id": 1})
    assert answer["model_id"] != trainer.model_id


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, "lora_rank=4"),
        ({"rank": 0}, "lora_rank=4"),
        ({"rank": 4, "init_method": "nora"}, "kaiming"),
        ({"rank": 4, "dropout": 0.1}, "train_unembed"),
        ({"rank": -1}, "whole number"),
    ],
)
async def test_models_that_the_job_does_not_offer(
    start: Starter, lora: dict[str, Any], words: str
) -> None:
    trainer = await start(lora={"rank": 4})
    body = {"session_id": trainer.session_id, "model_seq_id": 1, "base_model": "m"}
    status, answer = await trainer.post("create_model", {**body, "lora_config": lora})
    assert status == 400
    assert words in answer["error"]


async def test_a_model_that_can_not_be_made(start: Starter) -> None:
    nothing = {"rank": 2, "train_mlp": False, "train_attn": False, "train_unembed": False}
    trainer = await start(lora=nothing)
    assert "nothing" in trainer.created["error"]
    status, answer = await trainer.send("forward", **ONE)
    assert (status, answer["error_class"]) == (410, "ModelLost")


async def test_operations_behind_a_model_that_can_not_be_made(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were sent while it was being made: they fail, and the job's other models go on."""
    trainer = await start()
    release = threading.Event()

    def fail(*_: object) -> Any:
        assert release.wait(10)
        raise RuntimeError("no")

    monkeypatch.setattr(models.ModelFactory, "_make", fail)
    body = {"session_id": trainer.session_id, "model_seq_id": 1, "lora_config": {"rank": 0}}
    _, answer = await trainer.post("create_model", {**body, "base_model": "m"})
    other = Trainer(trainer.http, trainer.session_id, answer["model_id"], {})
    ids = [await other.submit("forward", seq_id, **ONE) for seq_id in (1, 2, 4)]
    release.set()
    assert "RuntimeError: no" in (await other.result(answer["request_id"]))["error"]
    for request_id in ids:
        failed = await other.result(request_id)
        assert failed["error_class"] == "ModelLost"
        assert "RuntimeError: no" in failed["error"]
    await trainer.ok("forward", **ONE)


async def test_an_operation_behind_a_gap_ends_with_its_model(start: Starter) -> None:
    trainer = await start()
    behind = await trainer.submit("forward", 3, **ONE)
    refused = {"forward_input": {"data": [], "loss_fn": "cross_entropy"}}
    assert (await trainer.send("forward", 4, **refused))[0] == 400
    _, answer = await trainer.post("unload_model", {"model_id": trainer.model_id})
    assert "error" not in await trainer.result(answer["request_id"])
    ended = await trainer.result(behind)
    assert ended["error_class"] == "ModelUnloaded"
    assert "operation 1 before it never came" in ended["error"]
    ended = await trainer.result(f"{trainer.model_id}:op-4")
    assert "1 to 1024 datums" in ended["error"]


async def test_no_memory_fails_one_operation_and_says_what_to_do(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = await start()
    compute = Network.compute
    hungry = [1 << 52]

    def starved(self: Network, batch: Any) -> Any:
        if hungry:
            torch.empty(hungry.pop())
        return compute(self, batch)

    good = cross_entropy(*some_data())
    monkeypatch.setattr(Network, "compute", starved)
    failed = await trainer.run("forward_backward", **good)
    assert (failed["category"], failed["error_class"]) == ("server", "OutOfMemory")
    assert "the model is as it was. Send fewer or shorter datums" in failed["error"]
    stepped = await trainer.run("optim_step", adam_params=ADAM)
    assert stepped["error_class"] == "PrecedingOperationFailed"
    await trainer.ok("forward_backward", **good)
    await trainer.ok("optim_step", adam_params=ADAM)


async def test_no_memory_in_a_step_says_what_is_left_of_it(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = await start()
    good = cross_entropy(*some_data())
    await trainer.ok("forward_backward", **good)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.empty(1 << 52))
        failed = await trainer.run("optim_step", adam_params=ADAM)
    assert failed["error_class"] == "OutOfMemory"
    assert "gradients are dropped; load a saved state" in failed["error"]
    await trainer.ok("forward_backward", **good)
    await trainer.ok("optim_step", adam_params=ADAM)


@pytest.mark.parametrize("number", [10**400, -(10**400)], ids=["large", "negative"])
async def test_a_number_beyond_all_bounds_is_refused_in_its_place(
    start: Starter, number: int
) -> None:
    trainer = await start()
    status, answer = await trainer.send("optim_step", adam_params={**ADAM, "eps": number})
    assert (status, answer["error"]) == (400, "eps must be a finite number")
    one = {"forward_input": {**ONE["forward_input"], "loss_fn_config": {"top_k": number}}}
    status, answer = await trainer.send("forward", **one)
    assert (status, answer["error"]) == (400, "top_k must be a finite number")
    await trainer.ok("forward", **ONE)
    odd = {"session_id": trainer.session_id, "model_seq_id": 5, "lora_config": {"rank": 0}}
    status, answer = await trainer.post("create_model", {**odd, "user_metadata": {"n": number}})
    assert status == 200, answer


async def test_info_and_lists(start: Starter) -> None:
    trainer = await start(lora={"rank": 2})
    status, info = await trainer.post("get_info", {"model_id": trainer.model_id})
    assert status == 200
    assert info["model_data"]["model_name"] == "accounts/local/models/tiny-qwen3"
    assert (info["is_lora"], info["lora_rank"]) == (True, 2)
    for name in ("b", "a"):
        await trainer.ok("save_weights", path=name)
    for path, wanted in (
        ("healthz", {"status": "ok"}),
        ("list_checkpoints", {"checkpoints": ["a", "b"]}),
    ):
        async with trainer.http.get(f"/api/v1/{path}") as response:
            assert await response.json() == wanted
    async with trainer.http.get("/api/v1/get_server_capabilities") as response:
        (model,) = (await response.json())["supported_models"]
        assert model["max_context_length"] == 32
    assert await trainer.post("client/config", {"sdk_version": "1"}) == (200, {})
    assert await trainer.post("telemetry", {"events": []}) == (200, {"status": "accepted"})
    heartbeat = {"session_id": trainer.session_id}
    assert (await trainer.post("session_heartbeat", heartbeat))[0] == 200


async def test_unloading_waits_for_accepted_operations(start: Starter) -> None:
    trainer = await start()
    last = await trainer.submit("forward_backward", **cross_entropy(*some_data()))
    body = {"model_id": trainer.model_id}
    (_, answer), (_, again) = (
        await trainer.post("unload_model", body),
        await trainer.post("unload_model", body),
    )
    assert answer == again
    unloaded = await trainer.result(answer["request_id"])
    assert unloaded["model_id"] == trainer.model_id
    assert "error" not in await trainer.result(last)
    status, refused = await trainer.send("forward", **ONE)
    assert (status, refused["error_class"]) == (410, "ModelUnloaded")


async def test_finishing_a_session_unloads_its_models(start: Starter) -> None:
    trainer = await start()
    other = await new_model(trainer.http)
    finish = f"sessions/{trainer.session_id}/finish"
    for _ in range(2):
        status, _ = await trainer.post(finish, {"reason": {"type": "success"}})
        assert status == 200
    assert (await trainer.send("forward", **ONE))[0] == 410
    heartbeat = {"session_id": trainer.session_id}
    assert (await trainer.post("session_heartbeat", heartbeat))[0] == 410
    await other.ok("forward", **ONE)


async def test_the_number_of_models_is_bounded(start: Starter) -> None:
    trainer = await start(max_models=8)
    made = [await new_model(trainer.http) for _ in range(7)]
    _, session = await trainer.post("create_session", {})
    body = {
        "session_id": session["session_id"],
        "model_seq_id": 0,
        "base_model": "m",
        "lora_config": {"rank": 0},
    }
    status, answer = await trainer.post("create_model", body)
    assert (status, answer["error_class"]) == (400, "TooMany")
    await trainer.post("unload_model", {"model_id": made[0].model_id})
    status, answer = await trainer.post("create_model", body)
    assert status == 200
    assert "error" not in await trainer.result(answer["request_id"])


async def test_models_are_independent(start: Starter) -> None:
    one = await start()
    two = await new_model(one.http)
    data = some_data()
    before = await two.ok("forward", **cross_entropy(*data, backward=False))
    await one.ok("forward_backward", **cross_entropy(*data))
    await one.ok("optim_step", adam_params=ADAM)
    assert await two.ok("forward", **cross_entropy(*data, backward=False)) == before
    failed = await two.run("optim_step", adam_params=ADAM)
    assert failed["error_class"] == "NoGradients"


async def test_a_reference_model_takes_forward_passes_only(start: Starter) -> None:
    trainer = await start(lora={"rank": 2})
    reference = await new_model(trainer.http, base_only=True)
    data = some_data()
    wanted = await trainer.ok("forward", **cross_entropy(*data, backward=False))
    assert await reference.ok("forward", **cross_entropy(*data, backward=False)) == wanted
    failed = await reference.run("forward_backward", **cross_entropy(*data))
    assert failed["error_class"] == "ReferenceModel"


async def test_the_alive_response_lasts_as_long_as_the_app(start: Starter) -> None:
    trainer = await start()
    async with trainer.http.get("/internal/alive") as response:
        assert await response.content.readline() == b"alive\n"
        rest = asyncio.create_task(response.content.read())
        await trainer.ok("forward", **ONE)
        assert not rest.done()
        await trainer.http.server.close()
        assert await rest == b""


async def test_what_is_no_request(start: Starter) -> None:
    trainer = await start()
    for raw in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        async with trainer.http.post("/api/v1/forward", data=raw) as response:
            assert response.status == 400, raw
            assert (await response.json())["error_class"] == "Malformed"
    for place in ({}, {"seq_id": 0}, {"seq_id": "1"}, {"seq_id": True}):
        body = {"model_id": trainer.model_id, **place, **ONE}
        status, answer = await trainer.post("forward", body)
        assert (status, answer["error_class"]) == (400, "Malformed")
    async with trainer.http.post("/api/v1/nothing", json={}) as response:
        assert response.status == 404
        assert "error" in await response.json()
    await trainer.ok("forward", **ONE)
