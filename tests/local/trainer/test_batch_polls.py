"""`retrieve_futures` of a model: completions in their order, results along with them."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from fireworks_training.local.trainer.queue.line import QueueLimits
from tests.local.trainer.trainer_driver import ADAM, Starter, Trainer, cross_entropy, some_data


async def poll(trainer: Trainer, cursor: int, **fields: Any) -> tuple[int, dict[str, Any]]:
    target = {"type": "model", "model_id": trainer.model_id}
    body = {"target": target, "prev_cursor": cursor, **fields}
    return await trainer.post("retrieve_futures", body)


async def test_one_poll_tells_of_all_that_ended(start: Starter) -> None:
    trainer = await start()
    assert trainer.created["retrieve_futures"] == 1
    status, answer = await poll(trainer, 0, timeout=0)
    assert status == 200
    assert [row["request_id"] for row in answer["completions"]] == [f"{trainer.model_id}:create"]
    cursor = answer["cursor"]
    ids = [
        await trainer.submit("forward_backward", **cross_entropy(*some_data())),
        await trainer.submit("optim_step", adam_params=ADAM),
        await trainer.submit("save_weights_for_sampler", path="a"),
        await trainer.submit("load_weights", path="nothing", optimizer=False),
    ]
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while len(seen) < len(ids):
            status, answer = await poll(trainer, cursor, inline_bytes=1 << 16)
            assert status == 200
            assert answer["completions"], "held until something has ended"
            seen += answer["completions"]
            cursor = answer["cursor"]
    # A save is finished beside the line, so it may come later than what follows it.
    assert sorted(row["request_id"] for row in seen) == sorted(ids)
    assert [row["request_id"] for row in seen][:2] == ids[:2]
    by_id = {row["request_id"]: row for row in seen}
    assert [by_id[id_]["state"] for id_ in ids] == ["finished"] * 3 + ["failed"]
    for request_id, row in by_id.items():
        payload = base64.b64decode(row["payload"])
        assert json.loads(payload) == await trainer.result(request_id)
        if row["state"] == "finished":
            assert row["response_payload_uncompressed_size"] == len(payload)
    status, answer = await poll(trainer, cursor, timeout=0)
    assert (status, answer) == (200, {"completions": [], "cursor": cursor})


async def test_what_was_retrieved_makes_room(start: Starter) -> None:
    trainer = await start(app={"limits": QueueLimits(results=2)})
    step = {"adam_params": ADAM}
    first, second = (
        await trainer.submit("discard_gradients"),
        await trainer.submit("discard_gradients"),
    )
    await trainer.result(second)
    status, _ = await poll(trainer, 0, timeout=0, retrieved_request_ids=["x", "x:op-1", second])
    assert status == 200
    await trainer.result(await trainer.submit("optim_step", **step))
    assert "error" not in await trainer.result(first), "the other one had to go"
    status, answer = await trainer.post("retrieve_future", {"request_id": second})
    assert (status, answer["error_class"]) == (410, "ResultExpired")
    _, answer = await poll(trainer, 0, timeout=0)
    gone = {"state": "finished", "request_id": second}
    assert gone in answer["completions"]


async def test_what_no_poll_is_about(start: Starter) -> None:
    trainer = await start()
    status, answer = await poll(trainer, 99, timeout=0)
    assert (status, answer["error_class"]) == (404, "NotFound")
    other = {"type": "model", "model_id": "ts-0:train:0"}
    status, answer = await poll(trainer, 0, target=other)
    assert (status, answer["error_class"]) == (410, "ModelLost")
    sampling = {"type": "sampling_session", "sampling_session_id": "s"}
    status, answer = await poll(trainer, 0, target=sampling)
    assert (status, answer["error_class"]) == (400, "Malformed")
    status, answer = await poll(trainer, 0, retrieved_request_ids=3)
    assert status == 400
