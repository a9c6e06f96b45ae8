"""Answers of other servers to submits and polls: what is asked again, and what ends what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from aiohttp import web

from fireworks_training import (
    AsyncFiretitanServiceClient,
    FireworksTrainingError,
    InvalidDatum,
    ProtocolError,
    RequestFailed,
    SessionLost,
    TrainerLost,
)
from fireworks_training._async.training import requests, session
from fireworks_training._async.training.passes import combine
from fireworks_training._core import patience
from fireworks_training._wire.training import protobuf, schema
from fireworks_training._wire.training.datums import PassResult
from fireworks_training.testing import TrainerServer
from tests.async_.training.support import ADAM, datum

GARBLED = [
    "<html>log in</html>",
    "null",
    "[]",
    '{"metrics": {"grad_norm": NaN}}',
    '{"metrics": {"grad_norm": 1e999}}',
    '{"request_id": "\\ud800"}',
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(patience, "BILLING_PAUSE", 0.002)
    monkeypatch.setattr(requests, "FILL_AGAIN_AFTER", 0.0)
    monkeypatch.setattr(session, "LOOK_AGAIN_AFTER", 0.0)


class Spoiled(TrainerServer):
    """A trainer that answers the first of some requests with something else."""

    def __init__(self, where: str, answers: list[web.Response | str], **options: Any) -> None:
        super().__init__(**options)
        self.left = answers

        async def next_one(*asked: Any) -> web.Response | None:
            if not self.left or asked[0] == "create":
                return None
            answer = self.left.pop(0)
            return web.Response(text=answer) if isinstance(answer, str) else answer

        self.before_submit, self.before_poll = (
            (next_one, None) if where == "submit" else (None, next_one)
        )


@pytest.mark.parametrize("where", ["submit", "poll"])
@pytest.mark.parametrize("body", GARBLED)
async def test_a_garbled_answer_is_asked_for_again(connect: Any, where: str, body: str) -> None:
    stub = Spoiled(where, [body])
    async with connect(stub) as client:
        assert (await client.optim_step(ADAM)).metrics == {"grad_norm": 1.0}
        await client.optim_step(ADAM)
    assert stub.applied == [("optim_step", 1), ("optim_step", 2)]


@pytest.mark.parametrize(
    ("where", "code", "times"),
    [
        *[(where, code, 3) for where in ("submit", "poll") for code in (402, 408, 425, 429, 503)],
        ("submit", 409, 3),
        ("submit", 400, 2),
        ("poll", 400, 2),
        ("poll", 404, 1),
        ("poll", 401, 1),
        ("poll", 403, 1),
    ],
)
async def test_a_stray_status_is_outlived(connect: Any, where: str, code: int, times: int) -> None:
    stub = Spoiled(where, [web.Response(status=code) for _ in range(times)])
    async with connect(stub) as client:
        await client.optim_step(ADAM)
        await client.optim_step(ADAM)
    assert stub.applied == [("optim_step", 1), ("optim_step", 2)]


async def test_a_billing_pause_is_said(connect: Any, caplog: pytest.LogCaptureFixture) -> None:
    stub = Spoiled("submit", [web.Response(status=402)])
    async with connect(stub) as client:
        await client.optim_step(ADAM)
    assert "billing" in caplog.text


@pytest.mark.parametrize("code", [400, 401, 403, 404])
async def test_polls_refused_again_and_again_fail_one_operation(connect: Any, code: int) -> None:
    lost = {"r2"}

    async def refuse(request_id: str) -> web.Response | None:
        return web.json_response({"error": "no"}, status=code) if request_id in lost else None

    stub = TrainerServer(before_poll=refuse)
    async with connect(stub) as client:
        await client.forward([datum()])
        with pytest.raises(RequestFailed, match="not known") as failed:
            await client.forward_backward([datum()], "cross_entropy")
        assert failed.value.error_class == "ResultExpired"
        await client.forward_backward([datum()] * 3, "cross_entropy")
        await client.optim_step(ADAM)
        assert client.ended is None
    assert stub.steps == [3]


async def test_polls_that_fail_for_long_fail_one_operation(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNDECIDED_SECONDS", 0.0)
    stub = Spoiled("poll", [web.Response(status=503)])
    async with connect(stub) as client:
        with pytest.raises(RequestFailed, match="not known"):
            await client.forward([datum()])
        await client.optim_step(ADAM)


class NoModel(TrainerServer):
    """A trainer without the platform's own words for its death: 404 for the model."""

    session_gone = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        route = request.path.rpartition("/api/v1/")[2]
        if self.lost and (self.session_gone or route != "session_heartbeat"):
            return web.json_response({"error": "not found"}, status=404)
        return await super().handle(request)


@pytest.mark.parametrize("operation", ["submit", "poll"])
async def test_a_dead_foreign_trainer_is_lost_by_a_second_look(
    connect: Any, operation: str
) -> None:
    stub = NoModel(step_protocol=False)
    stub.session_gone = True
    async with connect(stub) as client:
        await client.save_state("kept")
        stub.executing = operation == "submit"
        if operation == "submit":
            stub.lost = True
        future = client.forward([datum()])
        if operation == "poll":
            await stub.until(lambda: len(stub.submitted) == 2)
            stub.lost = True
            await stub.die()
        with pytest.raises(TrainerLost, match="kept"):
            await future


async def test_a_404_of_a_session_that_lives_is_no_death(connect: Any) -> None:
    stub = NoModel(step_protocol=False)
    async with connect(stub) as client:
        stub.lost = True
        with pytest.raises(FireworksTrainingError) as failed:
            await client.forward([datum()])
        assert not isinstance(failed.value, TrainerLost)


async def test_after_a_lost_session_the_service_makes_a_new_client() -> None:
    async def taken(path: str, body: dict[str, Any]) -> web.Response | None:
        answer = {"error": "taken", "error_class": "Conflict"}
        return web.json_response(answer, status=409) if spoil else None

    spoil: list[bool] = []
    async with TrainerServer(before_submit=taken) as stub:
        service = AsyncFiretitanServiceClient.from_tinker_server(
            base_url=stub.url, api_key="tml-test-key", base_model="m", lora_rank=1
        )
        async with service:
            first = await service.create_training_client()
            spoil.append(True)
            with pytest.raises(SessionLost):
                await first.forward([datum()])
            spoil.clear()
            second = await service.create_training_client()
            assert second is not first
            assert await service.create_training_client() is second


@pytest.mark.parametrize(
    ("values", "says"),
    [([-1.0], "1 logprobs for 3"), ([-1.0] * 4, "4 logprobs for 3"), ([], "0 logprobs for 3")],
)
async def test_logprobs_of_another_number_fail_their_pass_alone(
    connect: Any, values: list[float], says: str
) -> None:
    output = {"logprobs": {"data": values, "dtype": "float32", "shape": [len(values)]}}
    answer = {"loss_fn_output_type": "x", "loss_fn_outputs": [output], "metrics": {}}
    stub = Spoiled("poll", [web.json_response(answer)])
    async with connect(stub) as client:
        with pytest.raises(ProtocolError, match=says):
            await client.forward([datum()])
        await client.forward([datum()])


def test_numbers_that_are_not_finite_are_no_answer() -> None:
    for value in (math.nan, math.inf, -math.inf):
        output = {"logprobs": np.array([-1.0, value], np.float32)}
        body = protobuf.encode_result(PassResult("x", [output], {}))
        with pytest.raises(ProtocolError, match="not finite"):
            combine([body], [range(1)], [2])


def test_a_count_is_believed_as_far_as_datums_were_sent() -> None:
    message = schema.ForwardBackwardOutput(loss_fn_output_type="x")
    message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=20_000_000)
    with pytest.raises(ProtocolError, match="more outputs than the 2 datums"):
        combine([message.SerializeToString()], [range(2)])


async def test_a_forward_counts_its_response_tokens_too(connect: Any) -> None:
    async with connect(TrainerServer()) as client:
        forward = await client.forward([datum()])
        backward = await client.forward_backward([datum()], "cross_entropy")
    assert forward.metrics["response_tokens"] == backward.metrics["response_tokens"] == 3.0


class Embeds(TrainerServer):
    """A trainer whose passes answer with embeddings of 64 numbers."""

    def _one(self, path: str, body: dict[str, Any], seq_id: int) -> dict[str, Any]:
        result = super()._one(path, body, seq_id)
        for output in result.get("loss_fn_outputs", ()):
            output["embedding"] = {"data": [0.5] * 64, "dtype": "float32", "shape": [64]}
        return result


@pytest.mark.parametrize(
    ("output", "fits"), [("embedding", True), ("cos_similarity_matrix", False)]
)
async def test_gradients_by_embeddings_may_take_several_requests(
    connect: Any, output: str, fits: bool
) -> None:
    """The forward fits into one request, and the gradients, which are larger, do not."""

    def loss(_: Any, values: list[torch.Tensor]) -> Any:
        return torch.stack(values).square().sum() / 3.0, {}

    datums = [
        tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2]), loss_fn_inputs={})
        for _ in range(8)
    ]
    stub = Embeds(client_config={"fwdbwd_max_chunk_bytes_count": 3000})
    async with connect(stub) as client:
        future = client.forward_backward_custom(datums, loss, output=output)
        if fits:
            assert len((await future).loss_fn_outputs) == 8
            assert len([path for path, _ in stub.applied if path == "forward"]) == 1
            assert len([path for path, _ in stub.applied if path == "forward_backward"]) > 1
        else:
            with pytest.raises(InvalidDatum, match="depend on each other"):
                await future


async def test_the_same_key_goes_with_each_sending_again(connect: Any) -> None:
    keys: list[str | None] = []

    class Keys(TrainerServer):
        async def handle(self, request: web.Request) -> web.StreamResponse:
            if request.path.endswith("optim_step"):
                keys.append(request.headers.get("X-Idempotency-Key"))
            return await super().handle(request)

    stub = Keys(lost_answers={1})
    async with connect(stub) as client:
        await client.optim_step(ADAM)
        await client.optim_step(ADAM)
    assert keys[0]
    assert keys[0] == keys[1] != keys[2]
