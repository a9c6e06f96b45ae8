"""A place in the trainer's line is never left empty, and what the trainer may hold is known.

Over HTTP, against a stub trainer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from aiohttp import web

from fireworks_training import (
    ClientClosed,
    GradientsInDoubt,
    InvalidArgument,
    InvalidDatum,
    LossFailed,
    OwnerLoopGone,
    PrecedingOperationFailed,
    RequestFailed,
    TrainerLost,
)
from fireworks_training._async.runtime import failure_log
from fireworks_training.errors import ProtocolError
from fireworks_training.futures import was_retrieved
from fireworks_training.testing import TrainerServer
from tests.async_.conftest import connected
from tests.async_.training.support import ADAM, DIALECTS, datum, good_loss

UNWRITABLE = {"option": "\ud800"}  # no text that UTF-8 can hold


@DIALECTS
@pytest.mark.parametrize("enforced", [True, False])
async def test_a_request_that_can_not_be_written_leaves_no_gap(
    connect: Any, wire: list[str], enforced: bool
) -> None:
    stub = TrainerServer(dialects=wire, step_protocol=enforced)
    async with connect(stub) as client:
        await client.forward_backward([datum()], "cross_entropy")
        broken = client.forward_backward([datum()], "ppo", UNWRITABLE)
        step = client.optim_step(ADAM)
        with pytest.raises(InvalidArgument, match="can't be sent"):
            await broken
        with pytest.raises(PrecedingOperationFailed):
            await step
        await client.forward_backward([datum()], "cross_entropy")
        if not enforced:
            with pytest.raises(GradientsInDoubt):
                await client.optim_step(ADAM)
            return
        await client.optim_step(ADAM)
    assert stub.steps == [1]


async def test_a_step_with_a_refused_part_is_not_applied_though_all_of_it_is_on_its_way(
    connect: Any,
) -> None:
    """The refusal comes when the trainer has the optim_step behind it."""
    behind = asyncio.Event()

    async def refuse(path: str, body: dict[str, Any]) -> web.Response | None:
        if path == "optim_step":
            behind.set()
        is_filler = not body.get("forward_backward_input", {}).get("data")
        if body["seq_id"] != 2 or is_filler:
            return None
        await behind.wait()
        return web.json_response({"error": "too large"}, status=413)

    stub = TrainerServer(before_submit=refuse)
    async with connect(stub) as client:
        first = client.forward_backward([datum()], "cross_entropy")
        broken = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        following = client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)
        await first
        with pytest.raises(RequestFailed, match="too large"):
            await broken
        with pytest.raises(PrecedingOperationFailed):
            await step
        await asyncio.gather(*following)
    assert stub.steps == [1]  # the following one's


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (["top_k"], "a mapping, not list"),
        ({1: 2.0}, "has the key 1"),
        ({"a": float("nan")}, r"\['a'\] is nan"),
        ({"a": 1 << 70}, None),
        ({"a": [0.1]}, "is a list"),
    ],
)
async def test_options_that_no_dialect_takes_are_refused_at_the_call(
    connect: Any, config: Any, words: str | None
) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        if words is None:  # as a float it can be sent
            await client.forward([datum()], "cross_entropy", config)
            return
        with pytest.raises(InvalidArgument, match=words):
            client.forward([datum()], "cross_entropy", config)
    assert stub.submitted == []


@DIALECTS
async def test_options_may_be_numpy_numbers_and_none(connect: Any, wire: list[str]) -> None:
    stub = TrainerServer(dialects=wire)
    given = {"a": np.float32(0.5), "b": np.int64(3), "c": None, "d": "text"}
    async with connect(stub) as client:
        await client.forward([datum()], "cross_entropy", given)
    assert stub.bodies[1]["forward_input"]["loss_fn_config"] == {"a": 0.5, "b": 3, "d": "text"}


# -- what may have been added ----------------------------------------------------------------------


async def test_gradients_whose_answer_can_not_be_read_are_in_doubt(connect: Any) -> None:
    async def nonsense(request_id: str) -> web.Response | None:
        return web.json_response({"loss_fn_outputs": 3}) if request_id == "r1" else None

    stub = TrainerServer(step_protocol=False, before_poll=nonsense)
    async with connect(stub) as client:
        with pytest.raises(ProtocolError):
            await client.forward_backward([datum()], "cross_entropy")
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
        with pytest.raises(GradientsInDoubt):
            await client.optim_step(ADAM)
    assert stub.steps == []


@pytest.mark.parametrize("datums", [1, 2000], ids=["one request", "several"])
async def test_a_forward_that_is_lost_leaves_nothing_in_doubt(connect: Any, datums: int) -> None:
    """Of a custom loss: it adds no gradients."""

    async def expired(request_id: str) -> web.Response | None:
        gone = {"error": "expired", "error_class": "ResultExpired"}
        return web.json_response(gone, status=410) if request_id == "r1" else None

    stub = TrainerServer(step_protocol=False, before_poll=expired)
    async with connect(stub) as client:
        with pytest.raises(RequestFailed, match="no longer has the result"):
            await client.forward_backward_custom([datum(1)] * datums, good_loss)
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
        await client.optim_step(ADAM)
    assert stub.steps == [0]


async def test_a_loss_that_fails_leaves_nothing_in_doubt(connect: Any) -> None:
    def failing(*_: object) -> Any:
        raise RuntimeError("no")

    stub = TrainerServer(step_protocol=False)
    async with connect(stub) as client:
        with pytest.raises(LossFailed):
            await client.forward_backward_custom([datum()], failing)
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
        await client.optim_step(ADAM)
    assert stub.steps == [0]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"a": torch.zeros(2)}, "metrics must be a dict"),
        ({"a": torch.tensor(1j)}, "metrics must be a dict"),
        ({"a": 10**400}, "metrics must be a dict"),
        (None, "a real number"),
    ],
)
async def test_what_a_loss_returns_is_checked(connect: Any, metrics: Any, words: str) -> None:
    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        total = logprobs[0].sum()
        return (total * 1j, {}) if metrics is None else (total, metrics)

    async with connect(TrainerServer()) as client:
        with pytest.raises(LossFailed, match=words):
            await client.forward_backward_custom([datum()], loss)


@DIALECTS
@pytest.mark.parametrize(("shape", "column"), [([3, 2], 7), ([2, 2], 0), ([3], 0)])
async def test_a_sparse_tensor_that_contradicts_itself_fails_its_operation(
    connect: Any, wire: list[str], shape: list[int], column: int
) -> None:
    sparse = tinker.TensorData(
        data=[1.0],
        dtype="float32",
        shape=shape,
        sparse_crow_indices=[0, 1, 1, 1],
        sparse_col_indices=[column],
    )
    broken = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [1, 2, 3], "weights": sparse},
    )
    async with connect(TrainerServer(dialects=wire)) as client:
        future = client.forward_backward([datum(), broken], "cross_entropy")
        with pytest.raises(InvalidDatum, match="datum 1: 'weights' is no tensor") as refused:
            await future
    assert refused.value.index == 1


async def test_a_number_that_its_type_does_not_hold_is_no_answer(connect: Any) -> None:
    async def nonsense(request_id: str) -> web.Response | None:
        if request_id == "create":
            return None
        output = {"logprobs": {"data": [1 << 63], "dtype": "int64", "shape": [1]}}
        answer = {"loss_fn_output_type": "x", "loss_fn_outputs": [output], "metrics": {}}
        return web.json_response(answer)

    async with connect(TrainerServer(before_poll=nonsense)) as client:
        with pytest.raises(ProtocolError):
            await client.forward([datum()])


# -- many at once, and cut short -------------------------------------------------------------------


async def test_the_end_of_thousands_of_operations_takes_time_in_proportion(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def counted(error: BaseException | None) -> bool:
        nonlocal looks
        looks += 1
        return was_retrieved(error)

    monkeypatch.setattr(failure_log, "was_retrieved", counted)

    async def hold(request_id: str) -> None:
        if request_id != "create":
            await asyncio.Event().wait()

    stub = TrainerServer(before_poll=hold)
    async with connect(stub) as client:
        futures = [client.optim_step(ADAM) for _ in range(2000)]
        await stub.until(lambda: bool(stub.submitted))
        await stub.die()
        for future in futures:
            with pytest.raises(TrainerLost):
                await future
    assert looks < 4 * 2000


def test_operations_on_a_loop_that_stands_still_fail_and_are_never_sent() -> None:
    stub = TrainerServer()
    loop = asyncio.new_event_loop()
    held = connected(stub)
    client = loop.run_until_complete(held.__aenter__())
    client._model.owner._stopped_limit = 0.01
    for _ in range(2):  # also after the first was told
        futures = [client.forward_backward([datum()], "cross_entropy") for _ in range(2)]
        for future in futures:
            with pytest.raises(OwnerLoopGone, match="has stood still"):
                future.result(10)

    async def go_on() -> None:
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
        await client.forward_backward([datum()], "cross_entropy")
        await client.optim_step(ADAM)
        await held.__aexit__(None, None, None)

    loop.run_until_complete(go_on())
    loop.close()
    assert stub.steps == [1]


async def test_a_close_that_is_cancelled_leaves_nothing_running(connect: Any) -> None:
    async def hold(request_id: str) -> None:
        if request_id != "create":
            await asyncio.Event().wait()

    stub = TrainerServer(before_poll=hold)
    async with connect(stub) as client:
        future = client.forward([datum()])
        await stub.until(lambda: bool(stub.submitted))
        closing = asyncio.create_task(client._model.close(drain=True))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert not client._queue._requests.tasks
        with pytest.raises(ClientClosed):
            await future
        with pytest.raises(ClientClosed):
            client.forward([datum()])


@pytest.mark.parametrize("tells", [True, False], ids=["tells", "does not tell"])
async def test_after_a_save_that_failed_a_whole_snapshot_is_asked_for(
    connect: Any, tells: bool
) -> None:
    lost = {2}

    async def answer(request_id: str) -> web.Response | None:
        if request_id == "create":
            return None
        number = int(request_id[1:])
        path = stub.bodies[number]["path"]
        if number in lost:
            return web.json_response({"error": "no room", "category": "server"})
        kind = stub.bodies[number]["checkpoint_type"]
        told = {"snapshot": {"identity": path, "kind": kind}} if tells else {}
        return web.json_response({"path": path, **told})

    stub = TrainerServer(before_poll=answer)
    async with connect(stub) as client:
        for number in range(1, 5):
            save = client.save_weights_for_sampler(f"s{number}")
            if number == 2:
                with pytest.raises(RequestFailed, match="no room"):
                    await save
                continue
            client._publisher.chain.live((await save).path)
    asked = [stub.bodies[number]["checkpoint_type"] for number in range(1, 5)]
    assert asked == ["base", "delta", "base", "delta"]
