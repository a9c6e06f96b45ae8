"""The path of the guide: train, save, sync, sample; again and again, on the right weights."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fireworks_training import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    FiretitanServiceClient,
    FixedConcurrencyController,
    HotLoadFailed,
    InvalidArgument,
    rl_datum,
)
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, curved_loss, datums, service_on, told

QUESTION = [{"role": "user", "content": "Ann has 3 pens and buys 4. How many pens has she?"}]


async def drift(client: Any, sampler: DeploymentSampler) -> tuple[float, float]:
    """Mean and largest difference of sampled tokens' logprobs between engine and trainer."""
    completions = await sampler.sample_with_tokens(
        [QUESTION] * 2, n=4, max_tokens=24, logprobs=True
    )
    assert len(completions) == 8
    data = [
        rl_datum(c.prompt_tokens, c.completion_tokens, logprobs=c.inference_logprobs, advantages=0)
        for c in completions
        if c.inference_logprobs is not None
    ]
    outputs = (await client.forward(data)).loss_fn_outputs
    differences = np.concatenate(
        [
            np.abs(output["logprobs"].to_numpy()[-c.completion_len :] - c.inference_logprobs)
            for output, c in zip(outputs, completions, strict=True)
        ]
    )
    return float(differences.mean()), float(differences.max())


async def train(client: Any, seed: int) -> None:
    await client.forward_backward_custom(datums(4, seed=seed), curved_loss)
    await client.optim_step(ADAM)


@pytest.mark.extension("perf_metrics")
@pytest.mark.parametrize("rank", [0, 4])
async def test_engine_and_trainer_agree_after_each_sync(
    platform: RunningPlatform, rank: int
) -> None:
    async with service_on(platform, create_deployment=True, lora_rank=rank) as service:
        client = await service.create_training_client()
        for step in range(2):
            await train(client, step)
            saved = await client.save_weights_for_sampler(f"step_{step:05d}")
            assert saved.snapshot.kind == ("lora" if rank else ("base", "delta")[step])
            sampler = await service.create_deployment_sampler(saved.path)
            assert sampler.current_snapshot == saved.path
            mean, largest = await drift(client, sampler)
            assert mean <= 1e-4
            assert largest <= 1e-2
        # The negative control: the snapshot before stays in the engine.
        await train(client, 7)
        await client.save_weights_for_sampler("not_loaded")
        mean, largest = await drift(client, sampler)
        assert mean > 1e-4
        completion = (await sampler.sample_with_tokens(QUESTION, max_tokens=1))[0]
        assert completion.snapshot_identity == told(platform, saved.path)


@pytest.mark.extension("perf_metrics")
async def test_a_snapshot_that_does_not_exist_is_refused_and_the_old_one_serves(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        saved = await client.save_weights_for_sampler("good")
        sampler = await service.create_deployment_sampler(saved.path)
        with pytest.raises(HotLoadFailed, match="keeps serving"):
            await service.create_deployment_sampler("never-saved")
        completion = (await sampler.sample_with_tokens(QUESTION, max_tokens=1))[0]
        assert completion.snapshot_identity == told(platform, saved.path)


def test_the_blocking_names_and_twenty_loops_on_one_sampler(
    platform: RunningPlatform, tmp_path: Path
) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        tokenizer_model=platform.tokenizer if platform.as_cloud else None,
        training_shape_id=platform.training_shape,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        client = service.create_training_client(base_model=platform.model, lora_rank=0)
        client.forward_backward_custom(datums(2), curved_loss).result()
        client.optim_step(ADAM).result()
        saved = client.save_weights_for_sampler("step_00000").result()
        controller = FixedConcurrencyController(2)
        sampler = service.create_deployment_sampler(
            model_path=saved.path,
            tokenizer=service.get_tokenizer(),
            concurrency_controller=controller,
        )
        process = psutil.Process(os.getpid())

        def sample() -> None:
            completions = asyncio.run(sampler.sample_with_tokens(QUESTION, n=4, max_tokens=4))
            assert [c.sample_index for c in completions] == [0, 1, 2, 3]

        def connections() -> set[Any]:
            return {
                (c.laddr, c.raddr)
                for c in process.net_connections("tcp")
                if c.status == "ESTABLISHED"
            }

        sample()
        first, descriptors = connections(), process.num_fds()
        for _ in range(19):
            sample()
        assert connections() <= first  # no new connection after the first loop
        assert process.num_fds() <= descriptors
        assert len(sampler.sample_with_tokens([QUESTION] * 3, n=2, max_tokens=2).result()) == 6
        assert controller.window_size == 2


async def test_the_blocking_names_work_where_a_loop_runs_already(
    platform: RunningPlatform,
) -> None:
    """As in a notebook, whose cells run on a loop."""
    service = FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        tokenizer_model=platform.tokenizer if platform.as_cloud else None,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )
    try:
        client = service.create_training_client()
        client.forward_backward(datums(1), "cross_entropy")
        assert "grad_norm" in (client.optim_step(ADAM).result().metrics or {})
        assert "logprobs" in (await client.forward(datums(1))).loss_fn_outputs[0]
        sampler = service.create_deployment_sampler()
        assert len(sampler.sample_with_tokens(QUESTION, max_tokens=2).result()) == 1
        assert len(await sampler.sample_with_tokens(QUESTION, max_tokens=2)) == 1
    finally:
        service.close()


async def test_conversations_come_back_in_order(platform: RunningPlatform) -> None:
    async with service_on(platform, create_deployment=True) as service:
        sampler = await service.create_deployment_sampler(
            concurrency_controller=AdaptiveConcurrencyController(initial_window=16)
        )
        completions = await sampler.sample_with_tokens([QUESTION] * 3, n=2, max_tokens=2)
        places = [(c.prompt_index, c.sample_index) for c in completions]
        assert places == [(p, s) for p in range(3) for s in range(2)]
        with pytest.raises(InvalidArgument):
            sampler.sample_with_tokens([])


@pytest.mark.as_cloud
async def test_a_service_without_a_deployment_says_so(platform: RunningPlatform) -> None:
    async with service_on(platform) as service:
        with pytest.raises(InvalidArgument, match="create_deployment=False"):
            await service.create_deployment_sampler()


async def test_what_this_service_made_is_gone_after_close_and_what_it_found_stays(
    platform: RunningPlatform,
) -> None:
    keeper = service_on(
        platform,
        create_deployment=True,
        cleanup_trainer_on_close=False,
        cleanup_deployment_on_close=None,
    )
    await keeper.create_training_client()
    found = {"trainer_job_id": keeper.trainer_job_id, "deployment_id": keeper.deployment_id}
    await keeper.close()
    async with service_on(platform, create_deployment=True, **found) as guest:
        await guest.create_training_client()
    async with service_on(platform, create_deployment=True, **found) as again:
        await again.create_training_client()
        plane = await again._on_owner(again._platform.open, "test")
        assert (await plane.get_job(found["trainer_job_id"] or "")) is not None
        await plane.delete_job(found["trainer_job_id"] or "")
        await plane.delete_deployment(found["deployment_id"] or "")
