"""A backward by an earlier forward: the same gradient as the linearised pass, or no place taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fireworks_training.local.trainer.queue.leases import Leases, UnknownForward
from fireworks_training.local.trainer.queue.operations import Datum, Pass
from fireworks_training.local.trainer.run.graphs import GraphCache
from tests.local.trainer.trainer_driver import (
    ADAM,
    Starter,
    Trainer,
    cross_entropy,
    some_data,
    tensor,
)
from tests.local.trainer.wire.test_proto_codec import HEADERS

DATA = some_data(count=4)


def gradients(seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    lengths = [len(entry["loss_fn_inputs"]["weights"]["data"]) for entry in DATA]
    return [tensor(random.normal(size=n).astype(np.float32).tolist()) for n in lengths]


def linearised(given: list[dict[str, Any]]) -> dict[str, Any]:
    data = []
    for entry, gradient in zip(DATA, given, strict=True):
        inputs = dict(entry["loss_fn_inputs"])
        inputs["weights"] = tensor([-value for value in gradient["data"]])
        data.append({**entry, "loss_fn_inputs": inputs})
    return cross_entropy(*data)


async def forward(trainer: Trainer) -> int:
    await trainer.ok("forward", **cross_entropy(*DATA, backward=False))
    return trainer.seq_id


async def step(trainer: Trainer) -> dict[str, float]:
    answer = await trainer.ok("optim_step", adam_params=ADAM)
    metrics: dict[str, float] = answer["metrics"]
    return metrics


async def test_it_is_the_linearised_pass_from_the_graph_and_without(start: Starter) -> None:
    first, second = await start(), await start()
    cached = []
    for seed in range(3):
        place = await forward(first)
        got = await first.ok("backward", forward_seq_id=place, gradients=gradients(seed))
        wanted = await second.ok("forward_backward", **linearised(gradients(seed)))
        assert got["loss_fn_outputs"] == [{}] * 4
        cached.append(got["metrics"].pop("backward_cached_tokens:sum"))
        # Tokens count as they did in the forward, whatever gradient the caller's loss gave them.
        counted = sum(np.count_nonzero(e["loss_fn_inputs"]["weights"]["data"]) for e in DATA)
        assert (
            got["metrics"]["num_loss_tokens:sum"]
            == counted
            < wanted["metrics"].pop("num_loss_tokens:sum")
        )
        del got["metrics"]["num_loss_tokens:sum"]
        assert got["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5)
        assert (await step(first))["grad_norm"] == pytest.approx(
            (await step(second))["grad_norm"], rel=1e-5
        )
    tokens = got["metrics"]["num_tokens:sum"]
    # The first one tells the trainer that graphs are worth keeping.
    assert cached == [0.0, tokens, tokens]


async def test_changed_weights_drop_the_graph_and_not_the_inputs(start: Starter) -> None:
    trainer = await start()
    first = await forward(trainer)
    await trainer.ok("backward", forward_seq_id=first, gradients=gradients())
    place = await forward(trainer)
    await step(trainer)
    got = await trainer.ok("backward", forward_seq_id=place, gradients=gradients())
    assert got["metrics"]["backward_cached_tokens:sum"] == 0
    again = await trainer.ok("backward", forward_seq_id=place, gradients=gradients())
    assert again["metrics"] == got["metrics"]


async def test_what_is_refused_takes_no_place(start: Starter) -> None:
    trainer = await start()
    place = await forward(trainer)
    fields = {"seq_id": place + 1, "gradients": gradients()}
    for changes, wanted in [
        ({"forward_seq_id": 7}, (404, "UnknownForward")),
        ({"forward_seq_id": place, "gradients": gradients()[:2]}, (400, "InvalidRequest")),
        ({"forward_seq_id": place, "gradients": [tensor([1.0])] * 4}, (400, "InvalidRequest")),
        ({"forward_seq_id": place, "gradients": 7}, (400, "InvalidRequest")),
        ({"forward_seq_id": 0}, (400, "InvalidRequest")),
    ]:
        status, answer = await trainer.send("backward", **{**fields, **changes})
        assert (status, answer["error_class"]) == wanted, answer
    assert await trainer.ok("forward_backward", **linearised(gradients()))


async def test_a_backward_is_no_forward_to_refer_to(start: Starter) -> None:
    trainer = await start()
    await trainer.ok("forward_backward", **cross_entropy(*DATA))
    status, _ = await trainer.send("backward", 2, forward_seq_id=1, gradients=gradients())
    assert status == 404


async def test_a_repeat_finds_its_first_answer(start: Starter) -> None:
    trainer = await start()
    place = await forward(trainer)
    fields = {"forward_seq_id": place, "gradients": gradients()}
    first = await trainer.send("backward", 2, **fields)
    again = await trainer.send("backward", 2, **fields)
    other = await trainer.send("backward", 2, **{**fields, "gradients": gradients(1)})
    assert first == again
    assert other[0] == 409


async def test_it_goes_in_protobuf_too(start: Starter) -> None:
    from fireworks_training._wire.training import protobuf

    trainer = await start()
    place = await forward(trainer)
    data = [
        protobuf.encode_datum((), {"gradients": np.float32(g["data"])}, i)
        for i, g in enumerate(gradients())
    ]
    body = protobuf.encode_request(
        "forward_backward",
        protobuf.join(data),
        loss_fn="backward",
        loss_fn_config={"forward_seq_id": place},
        model_id=trainer.model_id,
        seq_id=2,
    )
    async with trainer.http.post(
        "/api/v1/backward", data=b"".join(body), headers=HEADERS
    ) as response:
        assert response.status == 200, await response.text()
        request_id = (await response.json())["request_id"]
    poll = {"request_id": request_id}
    async with trainer.http.post("/api/v1/retrieve_future", json=poll) as response:
        got = protobuf.decode_result(await response.read())
    wanted = await (await start()).ok("forward_backward", **linearised(gradients()))
    assert got.metrics["loss:sum"] == pytest.approx(wanted["metrics"]["loss:sum"], rel=1e-5)


# -- leases and graphs ---------------------------------------------------------------------------


def some_pass(tokens: int = 4) -> Pass:
    ids = np.arange(tokens)
    return Pass([Datum(ids, {"target_tokens": ids})], "cross_entropy", {}, backward=False)


def test_a_lease_ends_by_time_and_by_bytes() -> None:
    leases = Leases(lease_s=10.0, budget=1000)
    leases.keep(1, some_pass(), now=0.0)
    assert leases.find(1, now=9.9)
    with pytest.raises(UnknownForward):
        leases.find(1, now=10.0)
    leases.keep(2, some_pass(40), now=1.0)  # 640 bytes
    leases.keep(3, some_pass(40), now=2.0)
    with pytest.raises(UnknownForward):
        leases.find(2, now=2.0)
    assert leases.find(3, now=2.0)
    leases.keep(4, some_pass(400), now=3.0)  # more than fits is not kept at all
    with pytest.raises(UnknownForward):
        leases.find(4, now=3.0)


def test_graphs_are_kept_within_their_budget() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    graphs = GraphCache(budget=40_000)
    old, new = some_pass(), some_pass()

    def record(request: Pass, place: int) -> None:
        with graphs.measured():
            value = (torch.ones(64, 64) @ weight).exp().sum(0)  # holds on to 32 kB
        graphs.put(request, place, value)

    record(old, 0)
    record(new, 0)
    assert graphs.take(old, 0) is None, "an older pass makes room"
    record(new, 1)
    assert graphs.take(new, 1) is None, "a pass does not push itself out"
    kept = graphs.take(new, 0)
    assert kept is not None
    kept.sum().backward()
    assert weight.grad is not None
    assert graphs.take(new, 0) is None, "a graph is good for one backward"
    record(new, 0)
    graphs.clear()
    assert graphs.take(new, 0) is None
