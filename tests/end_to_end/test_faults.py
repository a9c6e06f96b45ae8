"""Faults on the way to a real trainer leave no trace in the weights.

One service does all runs: each begins at the same saved state, so each must end at equal weights.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from fireworks_training._async.training.session import Capabilities
from fireworks_training._core import patience
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, curved_loss, datums, saved_state, service_on
from tests.fault_proxy import FAULTS, FaultProxy

PAIRS = 40


def thirty(client: Any, end: str) -> list[Any]:
    """Thirty operations; a custom loss is two."""
    futures = [client.load_state_with_optimizer("begin")]
    for index in range(8):
        futures.append(client.forward_backward(datums(2, seed=index), "cross_entropy"))
        futures.append(client.forward(datums(1, seed=index)))
        futures.append(client.optim_step(ADAM))
    futures.append(client.forward_backward_custom(datums(2, seed=50), curved_loss))
    futures.append(client.optim_step(ADAM))
    futures.append(client.save_weights_for_sampler(f"{end}-sampler"))
    futures.append(client.save_state(end))
    return futures


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(
        torch.equal(got[name], wanted[name]) for name in wanted
    )


@pytest.mark.slow
@pytest.mark.extension("retrieve_futures")
@pytest.mark.parametrize("batched", [False, True])
async def test_every_message_spoilt_and_pairs_of_them(
    platform: RunningPlatform, monkeypatch: pytest.MonkeyPatch, batched: bool
) -> None:
    """Polled one by one, or in batches, of which there are now more and now fewer."""
    if batched and platform.as_cloud:
        pytest.skip("no batch polls are offered: it would be the other case again")
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    read = Capabilities.read
    monkeypatch.setattr(
        Capabilities,
        "read",
        lambda payload: replace(read(payload), batch_polls=batched and read(payload).batch_polls),
    )
    proxy, missed = FaultProxy(platform.base_url), list[int]()
    async with proxy.running() as url, service_on(platform, base_url=url) as service:
        client = await service.create_training_client()
        job = service.trainer_job_id
        assert job is not None
        await client.save_state("begin")

        async def run(name: str, spoil: dict[int, str]) -> dict[str, torch.Tensor]:
            proxy.restart(spoil)
            for future in thirty(client, name):
                await future
            assert batched or not proxy.spoil, "a fault has not struck"
            missed.append(len(proxy.spoil))
            return saved_state(platform, job, name)

        wanted = await run("clean", {})
        messages = proxy.seen
        assert messages >= (40 if batched else 60)
        assert not same(wanted, saved_state(platform, job, "begin"))
        choose = random.Random(7)
        spoils = [{at: FAULTS[(at + at // len(FAULTS)) % len(FAULTS)]} for at in range(messages)]
        for _ in range(PAIRS):
            one, two = choose.sample(range(messages), 2)
            spoils.append({one: choose.choice(FAULTS), two: choose.choice(FAULTS)})
        if platform.as_cloud:  # whose own faults make each run slow
            spoils = spoils[::3]
        for index, spoil in enumerate(spoils):
            assert same(await run(f"run-{index}", spoil), wanted), spoil
    assert sum(missed) <= len(spoils) / 4, "most faults strike"
