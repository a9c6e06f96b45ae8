"""How the training client's requests are sent: dialects, what is captured, backward by a forward,
requests that hang, storms, places taken by another."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from aiohttp import web

from fireworks_training import (
    InvalidArgument,
    InvalidDatum,
    NotSupported,
    PrecedingOperationFailed,
    RequestFailed,
    SessionLost,
    WrongLoop,
)
from fireworks_training._async.http import transport
from fireworks_training._async.training import data_plane, requests
from fireworks_training._core import patience
from fireworks_training._core.waits.reports import WaitReporter
from fireworks_training.testing import TrainerServer
from tests.async_.training.support import ADAM, DIALECTS, datum, good_loss


@DIALECTS
async def test_each_dialect_carries_the_same_numbers(connect: Any, wire: list[str]) -> None:
    stub = TrainerServer(dialects=wire)
    given = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([5, 6]),
        loss_fn_inputs={
            "target_tokens": np.array([[6, 7], [8, 9]]),
            "weights": np.array([[0.5, 1.0], [0.25, 0.0]]),
        },
    )
    async with connect(stub) as client:
        assert client.dialect == ("protobuf" if wire else "json")
        config = {"top_k": 2}
        result = await client.forward_backward([given], "cross_entropy", config)
        assert result.loss_fn_outputs[0]["logprobs"].tolist() == [-1.0] * 4
        assert result.metrics == {"loss:sum": 1.0, "response_tokens": 3.0}
        await client.optim_step(ADAM)
    sent = stub.bodies[1]["forward_backward_input"]
    assert sent["loss_fn_config"] == config
    (datum_sent,) = sent["data"]
    assert datum_sent["model_input"]["chunks"][0]["tokens"] == [5, 6]
    inputs = datum_sent["loss_fn_inputs"]
    assert (inputs["target_tokens"]["data"], inputs["target_tokens"]["shape"]) == (
        [6, 7, 8, 9],
        [2, 2],
    )
    assert inputs["weights"]["data"] == [0.5, 1.0, 0.25, 0.0]


@DIALECTS
async def test_arrays_changed_after_the_call_do_no_harm(connect: Any, wire: list[str]) -> None:
    stub = TrainerServer(dialects=wire)
    weights = np.ones(4000, np.float32)  # encoded in a thread, later
    given = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1] * 4000),
        loss_fn_inputs={
            "target_tokens": np.ones(4000, np.int64),
            "weights": tinker.TensorData.from_numpy(weights),
        },
    )
    async with connect(stub) as client:
        future = client.forward_backward([given], "cross_entropy")
        weights[:] = 7.0
        await future
    sent = stub.bodies[1]["forward_backward_input"]["data"][0]["loss_fn_inputs"]["weights"]
    assert set(sent["data"]) == {1.0}


async def test_a_sparse_tensor_is_written_out_without_torch(connect: Any) -> None:
    stub = TrainerServer()
    sparse = tinker.TensorData(
        data=[2.0, 3.0],
        dtype="float32",
        shape=[2, 3],
        sparse_crow_indices=[0, 1, 2],
        sparse_col_indices=[2, 0],
    )
    given = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": np.ones((2, 3), np.int64), "weights": sparse},
    )
    async with connect(stub) as client:
        await client.forward_backward([given], "cross_entropy")
    sent = stub.bodies[1]["forward_backward_input"]["data"][0]["loss_fn_inputs"]["weights"]
    assert sent["data"] == [0, 0, 2.0, 3.0, 0, 0]


async def test_a_failure_ahead_of_its_turn_comes_in_its_place(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        first = client.forward_backward([datum(4000)], "cross_entropy")
        broken = client.forward_backward([datum(4000, weight=float("inf"))], "cross_entropy")
        await first
        with pytest.raises(InvalidDatum, match="inf at position 0"):
            await broken
    assert [path for path, _ in stub.applied] == ["forward_backward"]


# -- custom losses ---------------------------------------------------------------------------------


@DIALECTS
async def test_backward_by_a_forward(connect: Any, wire: list[str]) -> None:
    stub = TrainerServer(dialects=wire, supports_backward=True)
    async with connect(stub) as client:
        await client.forward([datum()])
        result = await client.forward_backward_custom([datum(), datum(2)], good_loss)
        await client.optim_step(ADAM)
    assert stub.applied == [("forward", 1), ("forward", 2), ("backward", 3), ("optim_step", 4)]
    assert stub.bodies[3]["forward_seq_id"] == 2
    assert [g["data"] for g in stub.bodies[3]["gradients"]] == [[-1.0] * 3, [-1.0] * 2]
    assert [g["shape"] for g in stub.bodies[3]["gradients"]] == [[3], [2]]
    assert result.loss_fn_outputs[1]["logprobs"].tolist() == [-1.0] * 2  # as the forward had it
    assert result.metrics["surrogate_loss:sum"] == 2.0
    assert stub.steps == [2]


@DIALECTS
async def test_a_forgotten_forward_falls_back_in_the_same_place(
    connect: Any, wire: list[str]
) -> None:
    stub = TrainerServer(dialects=wire, supports_backward=True, forgotten_forwards={1})
    async with connect(stub) as client:
        await client.forward_backward_custom([datum()], good_loss)
        await client.optim_step(ADAM)
    assert stub.applied == [("forward", 1), ("forward_backward", 2), ("optim_step", 3)]
    inputs = stub.bodies[2]["forward_backward_input"]["data"][0]["loss_fn_inputs"]
    assert inputs["weights"]["data"] == [1.0] * 3  # -dL/dlogprob
    assert stub.steps == [1]


async def test_a_forward_that_is_there_already(connect: Any) -> None:
    stub = TrainerServer(supports_backward=True)
    seen: list[float] = []

    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        seen.extend(logprobs[0].tolist())
        return good_loss(data, logprobs)

    async with connect(stub) as client:
        forward = await client.forward([datum()])
        await client.forward_backward_custom([datum()], loss, precomputed_forward=forward)
        with pytest.raises(InvalidDatum, match=r"1 outputs for 2 datums"):
            await client.forward_backward_custom([datum()] * 2, loss, precomputed_forward=forward)
        with pytest.raises(PrecedingOperationFailed):
            await client.optim_step(ADAM)
        with pytest.raises(InvalidDatum, match=r"3 logprobs for targets of shape \(2,\)"):
            await client.forward_backward_custom([datum(2)], loss, precomputed_forward=forward)
    assert seen == [-1.0] * 3
    assert [path for path, _ in stub.applied] == [
        "forward",
        "forward_backward",
        "discard_gradients",
    ]


async def test_waiting_inside_the_loss_for_what_waits_for_it(connect: Any) -> None:
    said: list[BaseException] = []
    futures: dict[str, Any] = {}

    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        futures["before"].result(5)  # sent already: no dead lock
        for name in ("own", "behind"):
            for wait in (lambda f: f.result(5), lambda f: asyncio.run(f.result_async())):
                try:
                    wait(futures[name])
                except WrongLoop as error:
                    said.append(error)
        return good_loss(data, logprobs)

    async with connect(TrainerServer()) as client:
        futures["before"] = client.forward([datum()])
        futures["own"] = client.forward_backward_custom([datum()], loss)
        futures["behind"] = client.optim_step(ADAM)
        await futures["behind"]
    assert len(said) == 4
    assert all("inside a loss function" in str(error) for error in said)


async def test_a_loss_runs_in_the_callers_context(connect: Any) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        seen.append(request.get())
        return good_loss(data, logprobs)

    async with connect(TrainerServer()) as client:
        token = request.set("mine")
        future = client.forward_backward_custom([datum()], loss)
        request.reset(token)
        await future
    assert seen == ["mine"]


async def test_wrong_options_raise_at_the_call(connect: Any) -> None:
    stub = TrainerServer()
    async with connect(stub) as client:
        with pytest.raises(InvalidArgument, match="output='tokens': allowed are logprobs"):
            client.forward_backward_custom([datum()], good_loss, output="tokens")
        with pytest.raises(InvalidArgument, match="pooling='max'"):
            client.forward_backward_custom([datum()], good_loss, pooling="max")
        with pytest.raises(InvalidArgument, match="2 queries, as many documents and 1 extra"):
            client.forward_backward_contrastive(
                [datum()], num_queries=2, temperature=1.0, num_extra_negatives=1
            )
        with pytest.raises(InvalidArgument, match="temperature"):
            client.forward_backward_contrastive([datum()] * 2, num_queries=1, temperature=0.0)
        with pytest.raises(NotSupported, match="ttl_seconds"):
            client.save_state("name", ttl_seconds=60)
        with pytest.raises(InvalidArgument, match="emit_grad_norm_metrics"):
            client.optim_step(ADAM, None, "much")
        from fireworks_training.compat import AdamParams

        with pytest.raises(ValueError, match="emit_grad_norm_metrics"):
            AdamParams(emit_grad_norm_metrics="much")
        with pytest.raises(InvalidArgument, match="job id"):
            client.resolve_checkpoint_path("state", "Not a job")
        assert client.resolve_checkpoint_path("state", "job-1") == "cross_job://job-1/state"
        assert client.resolve_checkpoint_path("state") == "state"
    assert stub.applied == []


@pytest.mark.parametrize(
    ("of_params", "of_call", "sent"),
    [(None, None, None), (True, None, "basic"), (False, None, "off"), ("basic", "off", "off")],
)
async def test_gradient_norms_are_asked_for_in_the_parameters_or_the_call(
    connect: Any, of_params: Any, of_call: Any, sent: str | None
) -> None:
    from fireworks_training.compat import AdamParams

    stub = TrainerServer()
    async with connect(stub) as client:
        await client.optim_step(AdamParams(emit_grad_norm_metrics=of_params), None, of_call)
    asked = stub.bodies[1]["adam_params"]
    assert asked.get("emit_grad_norm_metrics") == sent
    assert ("emit_grad_norm_metrics" in asked) is (sent is not None)


async def test_a_save_with_a_timeout_waits_but_never_on_its_own_loop(connect: Any) -> None:
    held = asyncio.Event()

    async def hold(_: str) -> None:
        await held.wait()

    stub = TrainerServer()
    async with connect(stub) as client:
        with pytest.raises(WrongLoop, match="result_async"):
            client.save_state("on-the-loop", timeout=5.0)
        assert (await client.save_state_async("first", timeout=5.0)).done()
        assert (await asyncio.to_thread(client.save_state, "second", timeout=5.0)).done()
        stub.before_poll = hold
        with pytest.raises(TimeoutError):
            await client.save_state_async("late", timeout=0.01)
        held.set()
        assert (await client.save_state("last")).path == "last"
    assert stub.applied == [("save_weights", n) for n in (1, 2, 3, 4)]


async def test_what_the_trainer_says_it_supports(connect: Any) -> None:
    stub = TrainerServer(
        capabilities={"supports_reinforce": True, "supports_score_centering": "perhaps"}
    )
    async with connect(stub) as client:
        assert client.supports_reinforce is True
        assert client.supports_score_centering is None
        assert client.supports_router_replay is None
        assert client.supports_target_logprob_support is None
        assert client.supports_policy_importance_sampling is None
        assert client.supports_policy_diagnostics is None
        assert client.supports_rdma_weight_sync is False


# -- requests that go wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["submit", "poll"])
async def test_a_request_that_hangs_is_said_cut_and_sent_again(
    connect: Any, which: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    async def hang(*message: Any) -> None:
        asked.append(message[0])
        if len(asked) == 1:
            await asyncio.Event().wait()

    monkeypatch.setattr(requests, "WaitReporter", partial(WaitReporter, first=0.01))
    stub = TrainerServer()
    async with connect(stub) as client:
        await client.optim_step(ADAM)
        stub.before_submit, stub.before_poll = (hang, None) if which == "submit" else (None, hang)
        monkeypatch.setattr(data_plane, f"{which.upper()}_TIMEOUT", 0.1)
        with caplog.at_level(logging.WARNING):
            await client.optim_step(ADAM)
    assert len(asked) == 2
    assert stub.applied == [("optim_step", 1), ("optim_step", 2)]
    wanted = {"submit": "no answer to its submit", "poll": "no answer to a poll"}[which]
    assert any(wanted in record.getMessage() for record in caplog.records)


def test_time_limits_leave_a_hung_request_recovered_within_50_s() -> None:
    assert max(data_plane.SUBMIT_TIMEOUT, data_plane.POLL_TIMEOUT) + patience.FIRST_PAUSE < 50
    assert data_plane.POLL_TIMEOUT >= 45.0  # servers answer before


async def test_not_ready_at_once_is_not_asked_at_once_again(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real = asyncio.sleep
    asked = [0]

    async def not_ready(request_id: str) -> web.Response | None:
        asked[0] += 1
        return web.json_response({"queue_state": "active"}, status=408) if asked[0] < 6 else None

    async def pause(delay: float) -> None:
        pauses.append(delay)
        await real(0)

    stub = TrainerServer()
    async with connect(stub) as client:
        stub.before_poll = not_ready
        monkeypatch.setattr(data_plane.asyncio, "sleep", pause)
        await client.optim_step(ADAM)
    waited = [delay for delay in pauses if 0 < delay < 10]
    assert len(waited) == 5
    # A share of the time waited, from 20 ms on; up to half of it is random.
    assert all(0.01 <= delay <= 0.5 for delay in waited)


async def test_a_place_that_another_holds_ends_the_session_at_once(connect: Any) -> None:
    async def taken(path: str, body: dict[str, Any]) -> web.Response | None:
        answer = {"error": "place 2 holds another operation", "error_class": "Conflict"}
        return web.json_response(answer, status=409) if body["seq_id"] == 2 else None

    stub = TrainerServer(before_submit=taken)
    async with connect(stub) as client:
        await client.save_state("kept")
        with pytest.raises(SessionLost, match="second client") as lost:
            await client.forward([datum()])
        assert lost.value.last_saved_state == "kept"


async def test_a_large_body_goes_in_pieces_and_again_after_a_cut(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PIECE", 1000)
    stub = TrainerServer(dialects=["protobuf"], lost_answers={1})
    async with connect(stub) as client:
        result = await client.forward_backward([datum(3000)], "cross_entropy")
    assert len(result.loss_fn_outputs[0]["logprobs"].tolist()) == 3000
    assert stub.submitted == [("forward_backward", 1)] * 2
    assert stub.applied == [("forward_backward", 1)]


async def test_the_filler_is_in_the_dialect_of_the_model(connect: Any) -> None:
    async def refuse(path: str, body: dict[str, Any]) -> web.Response | None:
        if refusals:
            return web.json_response({"error": refusals.pop()}, status=422)
        return None

    refusals = ["no"]
    stub = TrainerServer(dialects=["protobuf"], before_submit=refuse)
    async with connect(stub) as client:
        with pytest.raises(RequestFailed):
            await client.forward([datum(1)])
    assert stub.applied == [("forward", 1)]
    assert stub.submitted == [("forward", 1)] * 2
    assert stub.bodies[1]["protobuf"]


async def test_a_dialect_that_the_trainer_does_not_take(connect: Any) -> None:
    with pytest.raises(NotSupported, match="takes json"):
        async with connect(TrainerServer(dialects=["json"]), dialect="protobuf"):
            pass
    async with connect(TrainerServer(dialects=["json", "protobuf"]), dialect="json") as client:
        assert client.dialect == "json"
