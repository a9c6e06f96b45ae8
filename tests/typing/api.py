"""The types that a user's checker sees. Read by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import assert_type

import tinker
import torch
from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

from fireworks_training import (
    AdaptiveConcurrencyController,
    APIFuture,
    AsyncFiretitanServiceClient,
    AsyncFiretitanTrainingClient,
    DeploymentSampler,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    SampleCall,
    SampledCompletion,
    SaveWeightsForSamplerResponse,
    Snapshot,
    TrainingProfile,
)

HELLO = [{"role": "user", "content": "hello"}]


def objective(
    data: Sequence[tinker.Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {"datums": float(len(data))}


def blocking(data: list[tinker.Datum]) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        api_key=None, base_url="local", base_model="m", lora_rank=0, replica_count=1
    )
    assert_type(service, FiretitanServiceClient)
    assert_type(service.trainer_job_id, str | None)
    assert_type(service.training_profile, TrainingProfile | None)
    with service as entered:
        assert_type(entered, FiretitanServiceClient)

    client = service.create_training_client(base_model="m", lora_rank=0)
    assert_type(client, FiretitanTrainingClient)
    future = client.forward_backward_custom(data, objective)
    assert_type(future, APIFuture[tinker.ForwardBackwardOutput])
    assert_type(future.result(), tinker.ForwardBackwardOutput)
    assert_type(client.forward(data).result(10.0), tinker.ForwardBackwardOutput)
    assert_type(client.optim_step(tinker.AdamParams()).result(), OptimStepResponse)
    assert_type(client.save_state("s").result(), SaveWeightsResponse)
    assert_type(client.load_state_with_optimizer("s").result(), LoadWeightsResponse)
    saved = client.save_weights_for_sampler("s").result()
    assert_type(saved, SaveWeightsForSamplerResponse)
    assert_type(saved.path, str)
    assert_type(saved.snapshot, Snapshot)

    sampler = service.create_deployment_sampler(
        model_path=saved.path,
        tokenizer=service.get_tokenizer(),
        concurrency_controller=AdaptiveConcurrencyController(initial_window=16),
    )
    assert_type(sampler, DeploymentSampler)
    call = sampler.sample_with_tokens(messages=HELLO, n=2, max_tokens=8)
    assert_type(call, SampleCall[list[SampledCompletion]])
    assert_type(call.result(), list[SampledCompletion])
    assert_type(asyncio.run(call), list[SampledCompletion])
    assert_type(
        asyncio.run(sampler.sample_with_tokens(messages=[HELLO, HELLO])), list[SampledCompletion]
    )
    service.close()


async def awaited(data: list[tinker.Datum]) -> None:
    async with AsyncFiretitanServiceClient.from_firetitan_config(base_model="m") as service:
        assert_type(service, AsyncFiretitanServiceClient)
        client = await service.create_training_client()
        assert_type(client, AsyncFiretitanTrainingClient)
        assert_type(await client.forward(data), tinker.ForwardBackwardOutput)
        assert_type(await client.forward_async(data), APIFuture[tinker.ForwardBackwardOutput])
        output = await (await client.forward_backward_async(data, "cross_entropy"))
        assert_type(output, tinker.ForwardBackwardOutput)
        assert_type(await client.optim_step(tinker.AdamParams()), OptimStepResponse)
        saved = await client.save_weights_for_sampler("s")
        assert_type(saved, SaveWeightsForSamplerResponse)
        sampler = await service.create_deployment_sampler(model_path=saved.path)
        assert_type(sampler, DeploymentSampler)
        assert_type(await sampler.sample_with_tokens(messages=HELLO), list[SampledCompletion])


async def blocking_client_on_a_loop(
    client: FiretitanTrainingClient, data: list[tinker.Datum]
) -> None:
    assert_type(await client.forward(data), tinker.ForwardBackwardOutput)
    assert_type(await client.forward_async(data), APIFuture[tinker.ForwardBackwardOutput])
