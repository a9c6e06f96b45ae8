"""The training client against a scripted trainer, over real HTTP."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from typing import Any

import pytest
import tinker
import torch
from aiohttp import web

from fireworks_training import (
    AsyncFiretitanTrainingClient,
    ClientClosed,
    GradientsInDoubt,
    InvalidArgument,
    InvalidDatum,
    LossFailed,
    OperationCancelled,
    PrecedingOperationFailed,
    RequestFailed,
    SessionLost,
    TrainerLost,
    WrongLoop,
)
from fireworks_training._async.training import requests
from fireworks_training._async.training.official_names import OfficialTrainingNames
from fireworks_training.testing import TrainerServer
from tests.async_.training.support import ADAM, datum, good_loss


async def test_call_order_is_wire_order_whatever_is_awaited_first(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        first = client.forward_backward([datum()], "cross_entropy")
        second = client.optim_step(ADAM)
        third = client.save_state("one")
        fourth = client.forward([datum()])
        assert (await fourth).loss_fn_outputs[0]["logprobs"].tolist() == [-1.0] * 3
        await asyncio.gather(first, second, third)
    assert stub.applied == [
        ("forward_backward", 1),
        ("optim_step", 2),
        ("save_weights", 3),
        ("forward", 4),
    ]


async def test_every_way_to_get_a_result(connect: Any) -> None:
    async with connect(TrainerServer()) as client:
        assert (await client.optim_step(ADAM)).metrics == {"grad_norm": 1.0}
        assert (await (await client.optim_step_async(ADAM))).metrics == {"grad_norm": 1.0}
        future = client.optim_step(ADAM)
        assert (await asyncio.to_thread(future.result, 5)).metrics == {"grad_norm": 1.0}
        assert (await future.result_async(5)).metrics == {"grad_norm": 1.0}
        assert future.future().result(0).metrics == {"grad_norm": 1.0}
        assert (await asyncio.create_task(future.coroutine())).metrics == {"grad_norm": 1.0}


async def test_result_on_the_owner_loop_raises_unless_done(connect: Any) -> None:
    async with connect(TrainerServer()) as client:
        future = client.optim_step(ADAM)
        with pytest.raises(WrongLoop, match="await"):
            future.result()
        await future
        assert future.result().metrics == {"grad_norm": 1.0}


async def test_operations_from_many_threads_keep_each_threads_order(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:

        def work(name: str) -> None:
            for index in range(10):
                client.save_state(f"{name}-{index}").future()

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        await asyncio.gather(*(asyncio.to_thread(thread.start) for thread in threads))
        await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
        await client.save_state("last")
    assert [seq_id for _, seq_id in stub.applied] == list(range(1, 32))


async def test_a_name_that_is_used_again_is_said(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(TrainerServer()) as client:
        await client.save_state("one")
        await client.save_state("two")
        assert "save_state" not in caplog.text
        await client.save_state("one")
    assert "saved a state of this name before" in caplog.text


async def test_a_lost_answer_is_asked_for_again_and_nothing_runs_twice(connect: Any) -> None:
    stub = TrainerServer(lost_answers={1, 2})
    async with connect(stub) as client:
        step = client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)
        await asyncio.gather(*step)
    assert stub.applied == [("forward_backward", 1), ("optim_step", 2)]
    assert len(stub.submitted) == 4


async def test_server_errors_are_outlived(connect: Any) -> None:
    left = [3]

    async def busy(*_: Any) -> web.Response | None:
        left[0] -= 1
        return web.Response(status=503) if left[0] >= 0 else None

    stub = TrainerServer(before_submit=busy)
    async with connect(stub) as client:
        await client.optim_step(ADAM)
    assert stub.applied == [("optim_step", 1)]


async def test_a_loss_that_raises_fails_its_step_and_spares_the_next(connect: Any) -> None:
    stub = TrainerServer()

    def bad_loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        raise ZeroDivisionError("the reward was zero")

    async with connect(stub) as client:
        applied = client.forward_backward([datum()], "cross_entropy")
        broken = client.forward_backward_custom([datum()], bad_loss)
        after = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        alone = client.forward_backward([datum(), datum()], "cross_entropy")
        following = client.optim_step(ADAM)
        await applied
        with pytest.raises(LossFailed, match="the reward was zero") as failure:
            await broken
        assert isinstance(failure.value.cause, ZeroDivisionError)
        for voided in (after, step):
            with pytest.raises(PrecedingOperationFailed) as preceding:
                await voided
            assert preceding.value.cause is failure.value
        await asyncio.gather(alone, following)
    assert stub.steps == [2]  # the next step alone: nothing of the first one is left


async def test_a_refused_request_is_filled_and_fails_its_step(connect: Any) -> None:
    async def refuse(path: str, body: dict[str, Any]) -> web.Response | None:
        if path == "forward_backward" and body["seq_id"] == 1:
            return web.json_response({"error": "token 999 is outside the vocabulary"}, status=400)
        return None

    stub = TrainerServer(step_protocol=False, before_submit=refuse)
    async with connect(stub) as client:
        broken = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        next_step = client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)
        with pytest.raises(RequestFailed, match="outside the vocabulary"):
            await broken
        with pytest.raises(PrecedingOperationFailed):
            await step
        await asyncio.gather(*next_step)
    assert stub.applied == [("forward", 1), ("forward_backward", 2), ("optim_step", 3)]
    assert stub.steps == [1]


async def test_a_filler_that_is_refused_twice_ends_the_session(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "FILL_AGAIN_AFTER", 0.0)

    async def refuse(path: str, body: dict[str, Any]) -> web.Response | None:
        return web.json_response({"error": "no"}, status=400) if body["seq_id"] == 2 else None

    stub = TrainerServer(before_submit=refuse)
    async with connect(stub) as client:
        await client.save_state("kept")
        broken = client.forward([datum()])
        behind = client.forward([datum()])
        for future in (broken, behind):
            with pytest.raises(SessionLost) as lost:
                await future
            assert lost.value.last_saved_state == "kept"
        with pytest.raises(SessionLost):
            client.forward([datum()])


async def test_the_second_of_three_chunks_fails(connect: Any) -> None:
    stub = TrainerServer(failing={2}, client_config={"fwdbwd_max_chunk_len": 1})
    async with connect(stub) as client:
        broken = client.forward_backward([datum()] * 3, "cross_entropy")
        step = client.optim_step(ADAM)
        following = client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)
        with pytest.raises(RequestFailed, match="scripted failure"):
            await broken
        with pytest.raises(PrecedingOperationFailed):
            await step
        await asyncio.gather(*following)
    assert stub.steps == [1]


async def test_without_the_protocol_the_step_waits_for_its_results(connect: Any) -> None:
    gate = asyncio.Event()

    async def hold(request_id: str) -> None:
        if request_id == "r1":
            await gate.wait()

    stub = TrainerServer(step_protocol=False, before_poll=hold)
    async with connect(stub) as client:
        gradient = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        await stub.until(lambda: ("forward_backward", 1) in stub.applied)
        assert ("optim_step", 2) not in stub.submitted
        gate.set()
        await asyncio.gather(gradient, step)
    assert stub.steps == [1]


async def test_without_the_protocol_a_partly_added_step_is_in_doubt(connect: Any) -> None:
    stub = TrainerServer(step_protocol=False, failing={2})
    async with connect(stub) as client:
        await client.forward_backward([datum()], "cross_entropy")
        broken = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        later = client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)
        with pytest.raises(RequestFailed):
            await broken
        with pytest.raises(PrecedingOperationFailed):
            await step
        await later[0]
        with pytest.raises(GradientsInDoubt, match="accept_partial"):
            await later[1]
        await client.optim_step(ADAM, accept_partial=True)
    assert stub.steps == [2]  # said so, and accepted


async def test_a_result_that_is_lost_leaves_the_step_in_doubt(connect: Any) -> None:
    async def expired(request_id: str) -> web.Response | None:
        gone = {"error": "expired", "error_class": "ResultExpired"}
        return web.json_response(gone, status=410) if request_id == "r1" else None

    stub = TrainerServer(step_protocol=False, before_poll=expired)
    async with connect(stub) as client:
        with pytest.raises(RequestFailed, match="no longer has the result"):
            await client.forward_backward([datum()], "cross_entropy")
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
        with pytest.raises(GradientsInDoubt):
            await client.optim_step(ADAM)
    assert stub.steps == []


async def test_a_410_of_another_server_is_asked_again(connect: Any) -> None:
    left = [1]

    async def elsewhere(request_id: str) -> web.Response | None:
        return web.Response(text="gone", status=410) if left and left.pop() else None

    stub = TrainerServer(step_protocol=False, before_poll=elsewhere)
    async with connect(stub) as client:
        await client.forward_backward([datum()], "cross_entropy")
        await client.optim_step(ADAM)
    assert not left
    assert stub.steps == [1]


async def test_the_death_of_the_trainer_fails_everything_open(connect: Any) -> None:
    async def hold(request_id: str) -> None:
        if request_id == "r2":
            await asyncio.Event().wait()

    stub = TrainerServer()
    async with connect(stub) as client:
        await client.save_state("newest")
        stub.failing = set()
        stub.executing = False
        open_operations = [client.forward([datum()]), client.optim_step(ADAM)]
        await stub.until(lambda: len(stub.submitted) == 3)
        await stub.die()
        for future in open_operations:
            with pytest.raises(TrainerLost, match="newest") as lost:
                await asyncio.wait_for(asyncio.shield(future.result_async()), 5)
            assert lost.value.last_saved_state == "newest"


async def test_a_custom_loss_is_one_place_in_the_line(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        custom = client.forward_backward_custom([datum()], good_loss)
        step = client.optim_step(ADAM)
        result = await custom
        await step
    assert stub.applied == [("forward", 1), ("forward_backward", 2), ("optim_step", 3)]
    assert result.metrics["mine"] == 7.0
    assert result.metrics["loss:sum"] == 3.0
    assert result.metrics["surrogate_loss:sum"] == 1.0


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda data, logprobs: (torch.tensor(1.0), {}), "does not depend"),
        (lambda data, logprobs: (logprobs[0].sum() * math.nan, {}), "finite"),
        (lambda data, logprobs: (logprobs[0], {}), "scalar"),
        (lambda data, logprobs: logprobs[0].sum(), "tuple"),
        (lambda data, logprobs: (logprobs[0].sum(), [1]), "metrics"),
    ],
)
async def test_a_wrong_loss_says_what_is_wrong(connect: Any, loss: Any, says: str) -> None:
    async with connect(TrainerServer()) as client:
        with pytest.raises(LossFailed, match=says):
            await client.forward_backward_custom([datum()], loss)


async def test_bad_content_fails_in_its_place(connect: Any) -> None:
    stub = TrainerServer()
    uneven = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0]},
    )
    async with connect(stub) as client:
        broken = client.forward_backward([datum(), uneven], "cross_entropy")
        with pytest.raises(InvalidDatum, match=r"datum 1: 'target_tokens' has 2 .* 3 tokens"):
            await broken
        with pytest.raises(InvalidDatum, match="datum 0: 'weights' is nan at position 0"):
            await client.forward([datum(weight=math.nan)])
        with pytest.raises(PrecedingOperationFailed) as emptied:
            await client.optim_step(ADAM)
        assert isinstance(emptied.value.cause, InvalidDatum)
        await client.optim_step(ADAM)
    assert [path for path, _ in stub.applied] == ["discard_gradients", "optim_step"]


async def test_bad_calls_raise_at_the_call_and_take_no_place(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        with pytest.raises(InvalidArgument, match=r"data\[0\]"):
            client.forward(["not a datum"])
        with pytest.raises(InvalidArgument, match="at least one"):
            client.forward([])
        with pytest.raises(InvalidArgument, match="did you mean 'cross_entropy'"):
            client.forward_backward([datum()], "cross_entropyy")
        for name in tinker.AdamParams.model_fields:
            for value in (math.nan, math.inf, -1.0):
                with pytest.raises(InvalidArgument, match=f"adam_params.{name} is"):
                    client.optim_step(tinker.AdamParams(**{name: value}))
        with pytest.raises(InvalidArgument, match="passes"):
            client.optim_step(ADAM, passes=0)
        with pytest.raises(InvalidArgument, match="AdamParams"):
            client.optim_step({"learning_rate": 1})
        with pytest.raises(InvalidArgument, match="valid name"):
            client.save_state("../up")
        with pytest.raises(InvalidArgument, match="forward_backward_custom"):
            client.forward_backward([datum()], good_loss)
        await client.optim_step(ADAM)
    assert stub.applied == [("optim_step", 1)]


async def test_an_unsent_operation_can_be_cancelled_and_fails_its_step(connect: Any) -> None:
    entered = threading.Event()
    leave = threading.Event()

    def slow_loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        entered.set()
        assert leave.wait(5)
        return good_loss(data, logprobs)

    stub = TrainerServer()
    async with connect(stub) as client:
        slow = client.forward_backward_custom([datum()], slow_loss)
        queued = client.forward_backward([datum()], "cross_entropy")
        step = client.optim_step(ADAM)
        await asyncio.to_thread(entered.wait, 5)
        assert queued.cancel()
        assert not slow.cancel()
        leave.set()
        await slow
        with pytest.raises(OperationCancelled):
            await queued
        with pytest.raises(PrecedingOperationFailed):
            await step
    assert stub.steps == []


async def test_a_cancelled_or_timed_out_waiter_leaves_the_operation_alone(connect: Any) -> None:
    gate = asyncio.Event()

    async def hold(request_id: str) -> None:
        await gate.wait()

    stub = TrainerServer(before_poll=hold)
    # The model itself is made by a poll, so the gate is open until it is there.
    gate.set()
    async with connect(stub) as client:
        gate.clear()
        future = client.optim_step(ADAM)
        waiter = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(future.result, 0.01)
        assert not future.done()
        gate.set()
        assert (await future).metrics == {"grad_norm": 1.0}


async def test_after_close_everything_raises(connect: Any) -> None:
    async with connect(TrainerServer()) as client:
        pass
    with pytest.raises(ClientClosed):
        client.forward([datum()])


@pytest.mark.parametrize(
    "alias", [name for name in vars(OfficialTrainingNames) if name.endswith("_async")]
)
def test_an_alias_takes_and_returns_what_its_operation_does(alias: str) -> None:
    own, other = (
        inspect.signature(getattr(AsyncFiretitanTrainingClient, name))
        for name in (alias.removesuffix("_async"), alias)
    )
    assert own == other
