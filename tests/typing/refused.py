"""What a user's checker refuses: every line marked `# error`, and no other. Never run."""

from __future__ import annotations

from typing import assert_type

import fireworks_training
from fireworks_training import (
    AsyncFiretitanServiceClient,
    DeploymentSampler,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    SamplingOptions,
)


def blocking(service: FiretitanServiceClient, client: FiretitanTrainingClient) -> None:
    print(fireworks_training.FiretitanServisClient)  # error: no such name
    FiretitanServiceClient.from_firetitan_config(base_modell="m")  # error: no such keyword
    FiretitanServiceClient.from_firetitan_config(lora_rank="8")  # error: a number
    service.create_training_client(lora_rank="8")  # error: a number
    assert_type(service.close(), int)  # error: it returns nothing
    assert_type(service.trainer_job_id, str)  # error: it may be None
    client.optim_step()  # error: without parameters
    client.optim_step({"learning_rate": 1e-5})  # error: not AdamParams
    print(client.save_weights_for_sampler("s").path)  # error: of the future, not of its result


async def awaited(service: AsyncFiretitanServiceClient) -> None:
    service.create_training_client().forward([])  # error: not awaited


def sampled(sampler: DeploymentSampler) -> None:
    turn = {"role": "user", "content": "hi"}
    sampler.sample_with_tokens(["hi"])  # error: text is no conversation
    sampler.sample_with_tokens([turn, [turn]])  # error: one conversation, or a list of them
    sampler.sample_with_tokens(turn)  # error: a turn is no conversation


def options() -> None:
    made: SamplingOptions = {"top_p": 0.9}
    made["top_q"] = 1  # error: no such option
