"""The official SDK's managed flow, as its users write it; run by an interpreter that has it.

Nothing of this package is imported. Each part prints one JSON line; the test looks at the platform.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from fireworks.training import sdk  # type: ignore[import-not-found]

BASE_URL, API_KEY, MODEL, SHAPE, PART = sys.argv[1:6]
JOB, DEPLOYMENT = "official-job", "official-deployment"
TOKENS = [5, 6, 7, 8, 9, 10]


def say(**facts: Any) -> None:
    print("FACTS" + json.dumps(facts), flush=True)


def service(**options: Any) -> Any:
    return sdk.FiretitanServiceClient.from_firetitan_config(
        api_key=API_KEY,
        base_url=BASE_URL,
        base_model=MODEL,
        training_shape_id=SHAPE,
        reattach_poll_interval_s=1,
        **options,
    )


def datum() -> Any:
    count = len(TOKENS) - 1
    return sdk.Datum(
        model_input=sdk.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": sdk.TensorData(data=TOKENS[1:], dtype="int64", shape=[count]),
            "weights": sdk.TensorData(data=[1.0] * count, dtype="float32", shape=[count]),
        },
    )


def reinforce(client: Any) -> float:
    """A pass by a loss that the SDK sends only to a trainer that says it has it."""
    data = datum()
    count = len(TOKENS) - 1
    data.loss_fn_inputs["advantages"] = sdk.TensorData(
        data=[0.5] * count, dtype="float32", shape=[count]
    )
    output = client.forward_backward([data], "reinforce").result()
    client.optim_step(sdk.AdamParams(learning_rate=0.0)).result()
    return float(output.metrics["loss:sum"])


def centred(client: Any) -> str:
    """What the SDK says of an option of that loss which the trainer says it lacks."""
    try:
        client.forward_backward([datum()], "reinforce", {"score_centering": True})
    except ValueError as error:
        return str(error)
    return ""


def step(client: Any) -> float:
    output = client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(sdk.AdamParams(learning_rate=1e-3)).result()
    return float(output.metrics["loss:sum"])


def sample(sampler: Any) -> list[list[int]]:
    found = asyncio.run(sampler.sample_with_prompt_tokens([1, 2, 3], n=2, max_tokens=4))
    return [list(completion.full_tokens) for completion in found]


def managed() -> None:
    """Provision, train, save, hot load twice, sample; leave everything running."""
    made = service(trainer_job_id=JOB, deployment_id=DEPLOYMENT)
    client = made.create_training_client(MODEL, lora_rank=0)
    losses = [step(client) for _ in range(3)]
    client.save_state("official-state").result()
    snapshots = []
    for name in ("official-a", "official-b"):
        saved = client.save_weights_for_sampler_ext(name)
        sampler = made.create_deployment_sampler(model_path=saved.path)
        snapshots.append(saved.snapshot_name)
        losses.append(step(client))
    by_reinforce, loss = reinforce(client), step(client)
    reference = made.create_reference_client(MODEL)
    output = reference.forward([datum()], "cross_entropy").result()
    say(
        job=made.trainer_job_id,
        deployment=made.deployment_id,
        context=made.max_context_length,
        shape=made.deployment_shape,
        reference=made.reference_job_id,
        losses=losses,
        reinforce=[by_reinforce, loss],
        centred=centred(client),
        reference_loss=float(output.metrics["loss:sum"]),
        states=client.list_checkpoints(),
        snapshots=snapshots,
        completions=sample(sampler),
        checkpoints=[row["name"].rsplit("/", 1)[-1] for row in made.list_checkpoints(JOB)],
    )
    made.close()


def lora() -> None:
    """An adapter beside its reference: train, hot load twice, sample; leave nothing behind."""
    made = service(cleanup_trainer_on_close=True, cleanup_deployment_on_close="delete")
    client = made.create_training_client(MODEL, lora_rank=8)
    losses, snapshots = [step(client) for _ in range(3)], []
    for name in ("adapter-a", "adapter-b"):
        saved = client.save_weights_for_sampler_ext(name)
        sampler = made.create_deployment_sampler(model_path=saved.path)
        snapshots.append(saved.snapshot_name)
        losses.append(step(client))
    say(losses=losses, snapshots=snapshots, completions=sample(sampler))
    made.close()


def reconnect() -> None:
    """Find both again, whatever became of the trainer; load the state; go on; clean up nothing."""
    made = service(
        trainer_job_id=JOB,
        deployment_id=DEPLOYMENT,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
        hot_load_transition_type="SYNC",
    )
    client = made.create_training_client(MODEL, lora_rank=0)
    client.load_state_with_optimizer("official-state").result()
    output = client.forward([datum()], "cross_entropy").result()
    saved = client.save_weights_for_sampler_ext("official-c")
    sampler = made.create_deployment_sampler(model_path=saved.path)
    say(loss=float(output.metrics["loss:sum"]), completions=sample(sampler))
    made.close()


def cleanup() -> None:
    """Make both, use them, and leave nothing behind."""
    made = service(cleanup_trainer_on_close=True, cleanup_deployment_on_close="delete")
    client = made.create_training_client(MODEL, lora_rank=0)
    say(loss=step(client), job=made.trainer_job_id, deployment=made.deployment_id)
    made.close()


def managers() -> None:
    """The managers by hand: wait, promote, scale to zero, delete."""
    trainers = sdk.TrainerJobManager(api_key=API_KEY, base_url=BASE_URL)
    deployments = sdk.DeploymentManager(api_key=API_KEY, base_url=BASE_URL)
    endpoint = trainers.reconnect_and_wait(JOB)
    rows = [row for row in trainers.list_checkpoints(JOB) if row["promotable"]]
    model = trainers.promote_checkpoint(
        name=rows[0]["name"], output_model_id="official-model", base_model=MODEL
    )
    ready = deployments.wait_for_ready(DEPLOYMENT)
    deployments.scale_to_zero(DEPLOYMENT)
    say(
        url=endpoint.base_url,
        model=model["name"],
        state=model["state"],
        transition=ready.hot_load_transition_type,
        moe=trainers.model_is_moe(MODEL),
        profile=trainers.resolve_training_profile(SHAPE).training_shape_version,
    )
    deployments.delete(DEPLOYMENT)
    trainers.delete(JOB)


if __name__ == "__main__":
    parts = (managed, lora, reconnect, cleanup, managers)
    {part.__name__: part for part in parts}[PART]()
