"""What belongs to a service beside its policy: references, several models, a lost trainer."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import numpy as np
import pytest

from fireworks_training import (
    AsyncControlPlane,
    FiretitanServiceClient,
    InvalidArgument,
    NotSupported,
    TrainerLost,
)
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, saved_state, service_on, worker_pid

DATA = datums(3, seed=3)


async def logprobs(client: Any) -> Any:
    outputs = (await client.forward(DATA)).loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy() for output in outputs])


async def train(client: Any, *, steps: int = 2) -> None:
    for seed in range(steps):
        await client.forward_backward(datums(4, seed=seed), "cross_entropy")
        await client.optim_step(ADAM)


async def jobs_there(platform: RunningPlatform) -> set[str]:
    async with AsyncControlPlane.connect(
        base_url=platform.base_url, api_key=platform.api_key
    ) as plane:
        return {job.job_id for job in await plane.list_jobs()}


@pytest.mark.as_cloud
async def test_the_reference_of_an_adapter_is_its_trainer_with_the_adapter_off(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, lora_rank=4) as service:
        policy = await service.create_training_client()
        before = await logprobs(policy)
        reference = await service.create_reference_client(policy_client=policy)
        assert await service.create_base_training_client() is reference
        await train(policy)
        assert np.abs(await logprobs(reference) - before).max() < 1e-5
        assert np.abs(await logprobs(policy) - before).max() > 1e-4
        assert service.reference_job_id is None
        assert service.reference_client_job_id == service.trainer_job_id
        with pytest.raises(NotSupported, match="reference client"):
            reference.optim_step(ADAM)
        await service.release_references()
        again = await service.create_reference_client()
        assert again is not reference
        assert np.abs(await logprobs(again) - before).max() < 1e-5


async def test_the_reference_of_full_parameters_is_a_trainer_that_the_service_owns(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, reference_required=True) as service:
        policy = await service.create_training_client()
        job = service.reference_job_id
        assert job is not None
        assert job in await jobs_there(platform)  # it came up together with the policy's
        before = await logprobs(policy)
        reference = await service.create_reference_client()
        await train(policy)
        assert np.abs(await logprobs(reference) - before).max() < 1e-5
        assert np.abs(await logprobs(policy) - before).max() > 1e-4
        assert service.reference_client_job_id == job
        os.kill(worker_pid(platform, job), signal.SIGKILL)
        with pytest.raises(TrainerLost):
            await reference.forward(DATA)
        reference = await service.create_reference_client()
        assert np.abs(await logprobs(reference) - before).max() < 1e-5
        with pytest.raises(NotSupported, match="reference client"):
            reference.forward_backward(DATA, "cross_entropy")
        with pytest.raises(InvalidArgument, match="create_reference_client"):
            await service.create_base_training_client()
        await service.release_references()
        assert job not in await jobs_there(platform)
        assert service.reference_job_id is None


async def test_several_adapters_on_one_trainer(platform: RunningPlatform) -> None:
    async with service_on(platform, max_lora_rank=8) as service:
        with pytest.raises(InvalidArgument, match="rank from 1 to 8"):
            await service.create_training_client()
        with pytest.raises(InvalidArgument, match="rank from 1 to 8"):
            await service.create_training_client(lora_rank=16)
        first = await service.create_training_client(lora_rank=2, seed=1)
        second = await service.create_lora_training_client(rank=8, alpha=16)
        assert (first.lora_rank, second.lora_rank) == (2, 8)
        before = await logprobs(second)
        await train(first)
        assert np.abs(await logprobs(second) - before).max() < 1e-6
        assert np.abs(await logprobs(first) - before).max() > 1e-4
        with pytest.raises(InvalidArgument, match="lost= is needed"):
            await service.recover_training_client()
        with pytest.raises(InvalidArgument, match="not lost"):
            await service.recover_training_client(first)
        with pytest.raises(InvalidArgument, match="policy_client"):
            await service.create_reference_client()
        reference = await service.create_reference_client(policy_client=first)
        assert np.abs(await logprobs(reference) - before).max() < 1e-5


@pytest.mark.as_cloud
async def test_a_lost_trainer_is_recovered_under_the_same_service(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform, seed=5) as service:
        client = await service.create_training_client()
        job = service.trainer_job_id or ""
        with pytest.raises(InvalidArgument, match="not lost"):
            await service.recover_training_client()
        await train(client)
        await client.save_state("half")
        at_half = await logprobs(client)
        await train(client)
        os.kill(worker_pid(platform, job), signal.SIGKILL)
        with pytest.raises(TrainerLost, match="half"):
            await client.forward(DATA)
        recovered = await service.recover_training_client()
        assert recovered is not client
        assert service.trainer_job_id == job
        assert await service.create_training_client() is recovered
        assert np.abs(await logprobs(recovered) - at_half).max() < 1e-6
        assert recovered.last_saved_state == "half"
        await train(recovered, steps=1)
        await recovered.save_state("after")
        assert saved_state(platform, job, "after")
        names = [row.checkpoint_id for row in await service.list_checkpoints()]
        assert {"half", "after"} <= set(names)


async def test_several_lost_models_are_recovered_one_by_one(platform: RunningPlatform) -> None:
    async with service_on(platform, max_lora_rank=8) as service:
        first = await service.create_training_client(lora_rank=2, seed=1)
        second = await service.create_training_client(lora_rank=4, seed=2)
        unsaved = await service.create_training_client(lora_rank=2, seed=3)
        await train(first)
        await first.save_state("first")
        await second.save_state("second")
        before = [await logprobs(first), await logprobs(second)]
        os.kill(worker_pid(platform, service.trainer_job_id or ""), signal.SIGKILL)
        for client in (first, second, unsaved):
            with pytest.raises(TrainerLost):
                await client.forward(DATA)
        again = [await service.recover_training_client(lost) for lost in (second, first)][::-1]
        assert [client.lora_rank for client in again] == [2, 4]
        for client, was in zip(again, before, strict=True):
            assert np.abs(await logprobs(client) - was).max() < 1e-6
        with pytest.raises(InvalidArgument, match="recovered already"):
            await service.recover_training_client(first)
        with pytest.raises(TrainerLost, match="No state was saved"):
            await service.recover_training_client(unsaved)
        await train(again[0], steps=1)


@pytest.mark.as_cloud
async def test_without_a_saved_state_there_is_nothing_to_go_on_from(
    platform: RunningPlatform,
) -> None:
    async with service_on(platform) as service:
        client = await service.create_training_client()
        os.kill(worker_pid(platform, service.trainer_job_id or ""), signal.SIGKILL)
        with pytest.raises(TrainerLost):
            await client.forward(DATA)
        with pytest.raises(TrainerLost, match="No state was saved"):
            await service.recover_training_client()


@pytest.mark.as_cloud
async def test_the_names_of_the_official_sdk(platform: RunningPlatform) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        tokenizer_model=platform.tokenizer if platform.as_cloud else None,
        training_shape_id=platform.training_shape,
        lora_rank=4,
        create_deployment=False,
        cleanup_trainer_on_close=True,
    )
    assert service.managed_trainer_job_id is None
    client = await service.create_lora_training_client_async(rank=4, alpha=32)
    assert client.lora_rank == 4
    assert service.managed_trainer_job_id == service.trainer_job_id
    assert service.managed_max_context_length == service.max_context_length
    assert service.managed_deployment_id is None
    assert service.managed_training_profile == service.training_profile
    assert (service.accelerator_type, service.accelerator_count) == ("CPU", 1)
    assert service.managed_accelerator_type == "CPU"
    assert service.training_session_name == service.training_session_id == client.session_id
    assert (await service.get_server_capabilities_async())["supported_models"]
    await asyncio.to_thread(service.close)
    with pytest.raises(NotSupported, match="serverless"):
        service.delete_training_session()
