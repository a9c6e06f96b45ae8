"""Passes in protobuf: the same numbers as in JSON; refusals have their place in the queue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fireworks_training._wire.training import protobuf
from fireworks_training._wire.training.compression import compress
from tests.local.trainer.trainer_driver import ADAM, Starter, Trainer, some_data

HEADERS = {"Content-Type": protobuf.CONTENT_TYPE}


def arrays(entry: dict[str, Any]) -> tuple[list[int], dict[str, np.ndarray[Any, Any]]]:
    tokens = [t for chunk in entry["model_input"]["chunks"] for t in chunk["tokens"]]
    inputs = {
        name: np.array(value["data"], value["dtype"]).reshape(value["shape"])
        for name, value in entry["loss_fn_inputs"].items()
    }
    return tokens, inputs


def message(
    trainer: Trainer, data: list[dict[str, Any]], seq_id: int, *, backward: bool = True, **loss: Any
) -> bytes:
    datums = [protobuf.encode_datum(*arrays(entry), index) for index, entry in enumerate(data)]
    return b"".join(
        protobuf.encode_request(
            "forward_backward" if backward else "forward",
            protobuf.join(datums),
            loss_fn=loss.get("loss_fn", "cross_entropy"),
            loss_fn_config=loss.get("loss_fn_config"),
            model_id=trainer.model_id,
            seq_id=seq_id,
        )
    )


async def send(
    trainer: Trainer, body: bytes, kind: str = "forward_backward", **headers: str
) -> tuple[int, dict[str, Any]]:
    url = f"/api/v1/{kind}"
    async with trainer.http.post(url, data=body, headers={**HEADERS, **headers}) as response:
        return response.status, await response.json()


async def passed(trainer: Trainer, body: bytes, **headers: str) -> Any:
    status, answer = await send(trainer, body, **headers)
    assert status == 200, answer
    poll = {"request_id": answer["request_id"]}
    async with trainer.http.post("/api/v1/retrieve_future", json=poll) as response:
        assert response.content_type == protobuf.CONTENT_TYPE
        return protobuf.decode_result(await response.read())


@pytest.mark.parametrize("loss", ["cross_entropy", "ppo"])
async def test_both_dialects_give_the_same_numbers(start: Starter, loss: str) -> None:
    data = some_data()
    if loss == "ppo":
        for entry in data:
            inputs = entry["loss_fn_inputs"]
            length = inputs["weights"]["shape"]
            for name in ("logprobs", "advantages"):
                values = np.linspace(-2, 1, length[0]).tolist()
                inputs[name] = {"data": values, "dtype": "float32", "shape": length}
    config = {"clip_low_threshold": 0.7} if loss == "ppo" else None
    first, second = await start(), await start()
    body = {"data": data, "loss_fn": loss, **({"loss_fn_config": config} if config else {})}
    wanted = await first.ok("forward_backward", forward_backward_input=body)
    got = await passed(second, message(second, data, 1, loss_fn=loss, loss_fn_config=config))
    assert got.metrics == wanted["metrics"]
    for output, other in zip(got.outputs, wanted["loss_fn_outputs"], strict=True):
        np.testing.assert_array_equal(output["logprobs"], np.float32(other["logprobs"]["data"]))
    second.seq_id = 1
    norms = [(await t.ok("optim_step", adam_params=ADAM))["metrics"] for t in (first, second)]
    assert norms[0] == norms[1]


async def test_the_flag_makes_it_a_forward(start: Starter) -> None:
    trainer = await start()
    result = await passed(trainer, message(trainer, some_data(), 1, backward=False))
    assert len(result.outputs) == 3
    trainer.seq_id = 1
    assert (await trainer.run("optim_step", adam_params=ADAM))["error_class"] == "NoGradients"


async def test_a_compressed_body_is_taken_within_bounds(start: Starter) -> None:
    trainer = await start()
    body = message(trainer, some_data(), 1)
    encoded = {"Content-Encoding": "zstd"}
    assert len((await passed(trainer, compress(body), **encoded)).outputs) == 3
    status, answer = await send(trainer, compress(bytes(65 << 20)), **encoded)
    assert (status, answer["error_class"]) == (400, "Malformed")
    status, _ = await send(trainer, body, **{"Content-Encoding": "br"})
    assert status == 415


async def test_repeats_are_told_by_content(start: Starter) -> None:
    trainer = await start()
    data = some_data()
    first = await send(trainer, message(trainer, data, 1))
    again = await send(trainer, message(trainer, data, 1))
    other = await send(trainer, message(trainer, data[:2], 1))
    assert first == again
    assert other[0] == 409


async def test_a_refusal_takes_its_place(start: Starter) -> None:
    trainer = await start()
    status, answer = await send(trainer, message(trainer, some_data(), 1, loss_fn="dpo"))
    assert status == 400
    assert "there are cross_entropy" in answer["error"]
    trainer.seq_id = 1
    answer = await trainer.run("optim_step", adam_params=ADAM)
    assert answer["error_class"] == "PrecedingOperationFailed"


async def test_what_is_no_message_takes_no_place(start: Starter) -> None:
    trainer = await start()
    assert (await send(trainer, b"\xff\xff\xff"))[0] == 400
    assert (await send(trainer, message(trainer, some_data(), 0)))[0] == 400
    assert (await send(trainer, b"", kind="optim_step"))[0] == 415
    assert await trainer.ok(
        "forward_backward", forward_backward_input={"data": some_data(), "loss_fn": "cross_entropy"}
    )
