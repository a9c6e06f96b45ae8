"""The official clients on the platform, each from its own environment, beside ours.

Each creates a model, trains, uses a custom loss, saves, resumes and samples; the same adapter and
the same data must give the same losses as our client sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import tinker
import torch

from fireworks_training.local.settings import OFFERS
from tests.conftest import RunningPlatform
from tests.end_to_end.support import model_folder, service_on
from tests.interop.conftest import Peer
from tests.interop.record import Exchange, passing, recording

pytestmark = pytest.mark.slow

TOKENS = [[5, 17, 9, 33, 21, 8], [7, 7, 41, 12], [90, 3, 58, 14, 62, 27, 31]]
ADAM = tinker.AdamParams(learning_rate=1e-3, eps=1e-8)
CLOSE = {"rel": 1e-5, "abs": 1e-5}


def datums(**inputs: list[float]) -> list[tinker.Datum]:
    data = []
    for index, tokens in enumerate(TOKENS):
        length = len(tokens) - 1
        given = inputs or {"weights": [0.0] + [1.0] * 9}
        rows = {
            name: np.array([value - (index if name == "advantages" else 0) for value in values])
            for name, values in given.items()
        }
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:])),
                    **{
                        name: tinker.TensorData.from_numpy(row[:length].astype(np.float32))
                        for name, row in rows.items()
                    },
                },
            )
        )
    return data


def custom(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = torch.stack([(values.exp() ** 2).sum() for values in logprobs]).sum()
    return loss, {"count": float(len(data))}


async def ours(platform: RunningPlatform, seed: int | None) -> list[float]:
    """Two steps of cross_entropy, one of ppo, one of the custom loss, and what came of them."""
    options = {"lora_rank": 8} if seed is None else {"lora_rank": 8, "seed": seed}
    async with service_on(platform, **options) as service:
        client = await service.create_training_client(platform.model, **options)
        losses = []
        for _ in range(2):
            passed = await client.forward_backward(datums(), "cross_entropy")
            losses.append(passed.metrics["loss:sum"])
            await client.optim_step(ADAM)
        rl = datums(logprobs=[-3.0] * 9, advantages=[1.0] * 9)
        losses.append((await client.forward_backward(rl, "ppo")).metrics["loss:sum"])
        await client.optim_step(ADAM)
        made = await client.forward_backward_custom(datums(), custom)
        losses.append(made.metrics["loss:sum"])
        await client.optim_step(ADAM)
        losses.append(
            (await client.forward_backward(datums(), "cross_entropy")).metrics["loss:sum"]
        )
    return losses


async def check_the_tinker_client(platform: RunningPlatform, seen: dict[str, Any]) -> None:
    """What `tinker_client.py` saw is what our client sees, and agrees with itself."""
    assert seen["losses"] == pytest.approx(await ours(platform, seed=3), **CLOSE)
    assert seen["resumed"] == pytest.approx(seen["losses"][-1], **CLOSE)
    assert seen["forward"] == pytest.approx(seen["losses"][-1], **CLOSE)
    # Engine and trainer agree on the trained weights, and the base model's are others.
    scored = -sum(seen["scored"][2:])
    first = [-value for value in seen["scored"][1:]]
    assert seen["scored"][0] is None
    assert scored < seen["losses"][-1]
    assert seen["scored_named"] == seen["scored"]
    assert not np.allclose(seen["scored_base"][1:], [-value for value in first])
    assert seen["chosen"] == pytest.approx(seen["scored"][1:], **CLOSE)
    assert [len(row) for row in seen["drawn"]] == [2] * len(seen["chosen"])
    assert all(b >= c - 1e-6 for b, c in zip(seen["best"][1:], seen["chosen"], strict=True))
    assert seen["greedy"][0] == seen["greedy"][1]
    assert len(seen["greedy"][0]) == 5
    assert seen["listed"] == sorted([seen["path"], seen["named"]])
    assert seen["left"] == [seen["path"]]
    assert seen["expires"] == [True]
    assert seen["session_listed"]
    assert len(seen["runs"]) == 2
    assert "use the checkpoint by its path" in seen["refused"]


async def test_the_tinker_client(platform: RunningPlatform, peer: Peer) -> None:
    async with recording(platform, "tinker") as url:
        seen = await peer("tinker", "tinker_client.py", str(model_folder()), base_url=url)
    await check_the_tinker_client(platform, seen)


async def test_the_tinker_client_with_all_that_is_offered(
    own_platform: Callable[..., AbstractContextManager[RunningPlatform]], peer: Peer
) -> None:
    offers = [option for offer in OFFERS for option in ("--offer", offer)]
    exchanges: list[Exchange] = []
    with own_platform(*offers) as platform:
        async with passing(platform, exchanges.append) as url:
            seen = await peer(
                "tinker", "tinker_client.py", str(model_folder()), platform=platform, base_url=url
            )
        await check_the_tinker_client(platform, seen)
    passes = [e for e in exchanges if e.request.path == "/api/v1/forward_backward"]
    assert passes
    assert {e.request.headers["Content-Encoding"] for e in passes} == {"zstd"}
    # Samples are asked for when they are there; nothing else is polled for in batches.
    polled = [e for e in exchanges if e.request.path == "/api/v1/retrieve_futures"]
    told = {row["request_id"] for e in polled for row in json.loads(e.answer)["completions"]}
    assert len(told) == 5
    fetches = [json.loads(e.body) for e in exchanges if e.request.path == "/api/v1/retrieve_future"]
    samples = [f["request_id"] for f in fetches if ":sampler:" in f["request_id"]]
    assert sorted(samples) == sorted(told)


@pytest.mark.parametrize("mode", ["direct", "managed"])
async def test_the_fireworks_sdk(platform: RunningPlatform, peer: Peer, mode: str) -> None:
    async with recording(platform, f"fireworks-{mode}") as url:
        seen = await peer("fireworks", "fireworks_client.py", mode, platform.model, base_url=url)
    losses = await ours(platform, seed=3 if mode == "direct" else None)
    del losses[3]  # that SDK reports no loss of a custom one
    assert seen["losses"] == pytest.approx(losses, **CLOSE)
    assert seen["resumed"] == pytest.approx(losses[-1], **CLOSE)
    if mode == "managed":
        assert seen["greedy"][0] == seen["greedy"][1]
        assert len(seen["greedy"][0]) == 5
    else:
        assert seen["snapshot"].startswith("final")


async def test_the_cookbook_trains_supervised(peer: Peer) -> None:
    seen = await peer("tinker", "cookbook_supervised.py", str(model_folder()))
    assert len(seen["losses"]) == 6
    assert seen["losses"] == sorted(seen["losses"], reverse=True)
    assert [row["name"] for row in seen["saved"]] == ["000003", "final"]


async def test_the_cookbook_trains_by_rl(peer: Peer) -> None:
    seen = await peer("tinker", "cookbook_rl.py", str(model_folder()))
    assert len(seen["rewards"]) == 3
    # Sampled by the engine, scored by the trainer: the same weights on both sides.
    assert max(abs(value) for value in seen["divergence"]) < 1e-4
