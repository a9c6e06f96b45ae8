"""The types that a user's checker sees. Read by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Unpack, assert_type

import tinker
import torch
from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

from fireworks_training import (
    AdaptiveConcurrencyController,
    APIFuture,
    AsyncFiretitanServiceClient,
    AsyncFiretitanTrainingClient,
    CheckpointType,
    Conversation,
    DeploymentConfig,
    DeploymentSampler,
    Evaluation,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    GradNorms,
    LossConfig,
    LossFunction,
    Normalization,
    OnDrift,
    Output,
    Pooling,
    SampleCall,
    SampledCompletion,
    SamplingOptions,
    SaveWeightsForSamplerResponse,
    Snapshot,
    Tokenizer,
    TrainingProfile,
    WeightSyncResult,
    chat_datum,
    check_alignment,
    completion_datum,
    read_evaluation,
    rl_datum,
    supervised_datum,
    write_evaluation,
)
from fireworks_training.testing import (
    AimdSettings,
    CharacterTokenizer,
    CompletionsServer,
    ControlPlaneServer,
    EngineRun,
    ManualClock,
    TrainerServer,
    simulate_engine,
)
from fireworks_training.testing.completions_server import completes, status

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


def data_and_evaluations(
    service: FiretitanServiceClient, completions: list[SampledCompletion]
) -> None:
    assert_type(supervised_datum([1, 2], [0, 1]), tinker.Datum)
    assert_type(rl_datum([1], [2], logprobs=[-1.0], advantages=0.5), tinker.Datum)
    assert_type(completion_datum(completions[0], 1.0), tinker.Datum)
    assert_type(chat_datum(service.get_tokenizer(), HELLO, train_on="all"), tinker.Datum)
    assert_type(check_alignment([], []), float)
    assert_type(write_evaluation("e.jsonl", completions, scores=[1.0]), Evaluation)
    assert_type(read_evaluation("e.jsonl").mean_score, float | None)


def wrappers(
    service: FiretitanServiceClient,
    client: FiretitanTrainingClient,
    sampler: DeploymentSampler,
    *,
    checkpoint_type: CheckpointType,
    on_drift: OnDrift,
    loss: LossFunction,
    config: LossConfig,
    output: Output,
    pooling: Pooling,
    normalization: Normalization,
    grad_norms: GradNorms,
    conversation: Conversation,
    deployment: DeploymentConfig,
    **options: Unpack[SamplingOptions],
) -> None:
    """A user's own functions pass options on, with the types of the package."""
    client.forward([], "cross_entropy", config)
    custom = client.forward_backward_custom([], loss, output=output, pooling=pooling)
    assert_type(custom, APIFuture[tinker.ForwardBackwardOutput])
    client.forward_backward_custom([], objective)
    step = client.optim_step(
        tinker.AdamParams(),
        grad_accumulation_normalization=normalization,
        emit_grad_norm_metrics=grad_norms,
    )
    assert_type(step, APIFuture[OptimStepResponse])
    client.save_weights_for_sampler("s", checkpoint_type=checkpoint_type)
    synced = client.weight_sync("s", on_drift=on_drift)
    assert_type(synced, APIFuture[WeightSyncResult])
    call = sampler.sample_with_tokens(conversation, **options)
    assert_type(call, SampleCall[list[SampledCompletion]])
    assert_type(sampler.tokenizer, Tokenizer | None)
    made = service.create_inference_deployment_sampler(deployment)
    assert_type(made, DeploymentSampler)


async def servers_for_tests() -> None:
    trainer, completions = TrainerServer(failing={1}), CompletionsServer(script=[status(429)])
    completions.otherwise = completes([7], "7")
    async with ControlPlaneServer(trainer, completions) as platform:
        assert_type(platform, ControlPlaneServer)
        assert_type(platform.url, str)
        assert_type(trainer.applied, list[tuple[str, int]])
    with CompletionsServer() as server:
        assert_type(server, CompletionsServer)
    AdaptiveConcurrencyController(clock=ManualClock())
    run = simulate_engine(AimdSettings(initial_window=4), slots=8, service=0.5, requests=100)
    assert_type(run, EngineRun)
    DeploymentSampler("http://localhost", "m", "key", tokenizer=CharacterTokenizer())
