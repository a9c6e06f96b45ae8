"""Batch polls and the trainer's flags: what a trainer offers or asks is done, over HTTP."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest
import tinker
from aiohttp import web

from fireworks_training import RequestFailed, TrainerLost
from fireworks_training._async.training import batch_polls
from fireworks_training._async.training.client_config import ClientConfig
from fireworks_training._core import patience
from fireworks_training._wire.training.batch_polls import decode_poll
from fireworks_training.errors import ProtocolError
from fireworks_training.testing import TrainerServer
from tests.async_.training.support import ADAM, DIALECTS, datum


@DIALECTS
async def test_a_hundred_results_come_in_a_few_requests(connect: Any, wire: list[str]) -> None:
    stub = TrainerServer(batch_polls=True, dialects=wire)
    async with connect(stub) as client:
        futures = [client.forward_backward([datum()], "cross_entropy") for _ in range(99)]
        await client.optim_step(ADAM)
        results = [await future for future in futures]
        assert all(set(r.loss_fn_outputs[0]["logprobs"].tolist()) == {-1.0} for r in results)
        await client.save_state("said")  # its poll says what came before
    assert stub.counts["retrieve_future"] == 1  # of the model's making
    assert stub.counts["retrieve_futures"] < 100
    assert {f"r{seq_id}" for seq_id in range(1, 50)} <= set(stub.retrieved)
    assert len(set(stub.retrieved)) == len(stub.retrieved)
    assert stub.steps == [99]


async def test_a_large_result_is_fetched(connect: Any) -> None:
    stub = TrainerServer(batch_polls=True, inline_bytes=100)
    async with connect(stub) as client:
        large = client.forward_backward([datum()], "cross_entropy")
        assert len((await large).loss_fn_outputs) == 1
        await client.optim_step(ADAM)
    assert stub.counts["retrieve_future"] == 2


async def test_a_failure_comes_with_its_words(connect: Any) -> None:
    stub = TrainerServer(batch_polls=True, failing={1})
    async with connect(stub) as client:
        with pytest.raises(RequestFailed, match="scripted failure"):
            await client.forward([datum()])


async def test_polls_that_fail_are_made_again(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    answers = [
        lambda: web.Response(status=500),
        lambda: web.json_response({"error": "busy"}, status=429),
        lambda: web.Response(status=408),
    ]

    async def fail(_: str) -> web.Response | None:
        return answers.pop()() if answers else None

    stub = TrainerServer(batch_polls=True)
    async with connect(stub) as client:
        stub.before_poll = fail
        await client.optim_step(ADAM)
    assert answers == []
    assert stub.counts["retrieve_future"] == 1


@pytest.mark.parametrize("answer", [{"completions": 3, "cursor": 0}, {"completions": [{}]}, {}])
async def test_nonsense_turns_batch_polls_off(
    connect: Any, answer: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def nonsense(asked: str) -> web.Response | None:
        return web.json_response(answer) if asked == "batch" else None

    stub = TrainerServer(batch_polls=True)
    async with connect(stub) as client:
        stub.before_poll = nonsense
        futures = [client.optim_step(ADAM) for _ in range(3)]
        for future in futures:
            await future
    assert stub.counts["retrieve_futures"] == 1
    assert stub.counts["retrieve_future"] == 4
    assert any("one by one" in record.getMessage() for record in caplog.records)


async def test_a_refusal_turns_batch_polls_off(connect: Any) -> None:
    stub = TrainerServer(batch_polls=True, inline_bytes=None)
    async with connect(stub) as client:
        await client.optim_step(ADAM)
        await client.optim_step(ADAM)
    assert stub.counts["retrieve_futures"] == 1
    assert stub.counts["retrieve_future"] == 3


async def test_a_refusal_is_no_mode_for_good(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_polls, "TRY_AGAIN_AFTER", 0.0)
    stub = TrainerServer(batch_polls=True, inline_bytes=None)
    async with connect(stub) as client:
        await client.optim_step(ADAM)
        stub.inline_bytes = 1 << 20
        asked = stub.counts["retrieve_future"]
        await client.optim_step(ADAM)
    assert stub.counts["retrieve_future"] == asked


async def test_a_request_that_no_poll_tells_of_is_asked_for(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_polls, "DOUBT_AFTER", 0.0)
    monkeypatch.setattr(batch_polls, "QUICK_POLL", 0.001)
    stub = TrainerServer(batch_polls=True, unreported={"r1"})
    async with connect(stub) as client:
        await client.optim_step(ADAM)
    assert stub.applied == [("optim_step", 1)]


async def test_results_that_are_told_before_their_submits_are_answered(connect: Any) -> None:
    stub = TrainerServer(batch_polls=True, lost_answers=set(range(2, 20)))
    async with connect(stub) as client:
        futures = [client.optim_step(ADAM) for _ in range(20)]
        for future in futures:
            await future
    assert stub.applied == [("optim_step", n) for n in range(1, 21)]
    assert stub.counts["retrieve_future"] == 1


async def test_the_trainers_death_ends_the_wait(connect: Any) -> None:
    stub = TrainerServer(batch_polls=True)
    async with connect(stub) as client:
        stub.executing = False
        waiting = client.optim_step(ADAM)
        await stub.until(lambda: bool(stub.submitted))
        await stub.die()
        with pytest.raises(TrainerLost):
            await waiting


def test_an_answer_that_is_none() -> None:
    for answer in (
        {"completions": [], "cursor": "1"},
        {"completions": [3], "cursor": 1},
        {"completions": [{"request_id": "r", "payload": "no base64!"}], "cursor": 1},
    ):
        with pytest.raises(ProtocolError):
            decode_poll(answer)


async def test_a_fault_in_batch_polls_leaves_nobody_waiting(
    connect: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Any:
        raise LookupError("a fault of ours")

    stub = TrainerServer(batch_polls=True)
    async with connect(stub) as client, asyncio.timeout(10):
        monkeypatch.setattr("fireworks_training._async.training.data_plane.decode_poll", broken)
        await client.optim_step(ADAM)
    assert "LookupError: a fault of ours" in caplog.text


async def test_a_trainer_that_repeats_itself_is_not_hammered(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """asyncio as one module sees it, where no pause takes time."""

        pauses = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        async def sleep(self, _: float) -> None:
            self.pauses += 1
            await asyncio.sleep(0)

    async def again(asked: str) -> web.Response | None:
        if asked != "batch" or stub.counts["retrieve_futures"] > 20:
            return None
        old = {"request_id": "r0", "state": "finished"}
        return web.json_response({"completions": [old], "cursor": 0})

    clock = Clock()
    monkeypatch.setattr(batch_polls, "asyncio", clock)
    stub = TrainerServer(batch_polls=True, before_poll=again)
    async with connect(stub) as client, asyncio.timeout(10):
        await client.optim_step(ADAM)
    assert clock.pauses == 20


# -- the trainer's flags ---------------------------------------------------------------------------


def long_datum() -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([7] * 5000),
        loss_fn_inputs={
            "target_tokens": np.full(5000, 7),
            "weights": np.linspace(0.0, 1.0, 5000, dtype=np.float32),
        },
    )


async def test_requests_are_compressed_where_the_trainer_asks(connect: Any) -> None:
    bodies: list[Any] = []
    results: list[tinker.ForwardBackwardOutput] = []
    for config in ({}, {"proto_compress_fwdbwd": True}):
        stub = TrainerServer(dialects=["json", "protobuf"], client_config=config)
        async with connect(stub) as client:
            results += [
                await client.forward_backward(data, "cross_entropy")
                for data in ([datum()], [long_datum()])
            ]
        assert stub.encodings == [None if not config else "zstd"] * 2
        bodies.append(stub.bodies)
    assert bodies[0] == bodies[1]
    for one, other in zip(results[:2], results[2:], strict=True):
        assert one.metrics == other.metrics
        np.testing.assert_array_equal(
            one.loss_fn_outputs[0]["logprobs"].to_numpy(),
            other.loss_fn_outputs[0]["logprobs"].to_numpy(),
        )


async def test_json_is_never_compressed(connect: Any) -> None:
    stub = TrainerServer(
        dialects=["json", "protobuf"], client_config={"proto_compress_fwdbwd": True}
    )
    async with connect(stub, dialect="json") as client:
        await client.forward([datum()])
    assert stub.encodings == []


async def test_requests_are_cut_as_the_trainer_asks(connect: Any) -> None:
    stub = TrainerServer(client_config={"fwdbwd_max_chunk_len": 2, "parallel_fwdbwd_chunks": False})
    async with connect(stub) as client:
        result = await client.forward_backward([datum()] * 5, "cross_entropy")
        assert len(result.loss_fn_outputs) == 5
        await client.optim_step(ADAM)
    assert stub.steps == [5]
    # One after the other: in order.
    assert stub.submitted == [("forward_backward", n) for n in (1, 2, 3)] + [("optim_step", 4)]


@pytest.mark.parametrize("status", [404, 500, None])
async def test_a_trainer_that_says_nothing_gets_the_defaults(
    connect: Any, status: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    stub = TrainerServer(client_config=None if status == 404 else {"fwdbwd_max_chunk_len": -1})
    if status == 500:
        stub.client_config_fails = True
    with caplog.at_level(logging.WARNING):
        async with connect(stub) as client:
            await client.optim_step(ADAM)
            assert client._model.session.client_config == ClientConfig()
    assert bool(caplog.records) == (status != 404)
