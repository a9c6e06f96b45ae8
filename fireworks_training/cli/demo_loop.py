"""GRPO in one file: sample, score, train, sync, and again. Meant to be read, and to be copied.

For each problem a group of completions is sampled; a completion's advantage is its reward less the
mean of its group, over the group's standard deviation (GRPO, arXiv 2402.03300; no KL term, since
sixty steps do not need one). The trainer sums `-ratio * advantage` over the completions' tokens;
dividing the advantages by the number of those tokens makes the sum a mean.

Problems are defined in `demo_problems`, the display of a run in `demo_report`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fireworks_training import (
    AsyncFiretitanServiceClient,
    AsyncFiretitanTrainingClient,
    DeploymentSampler,
    SampledCompletion,
    completion_datum,
    write_evaluation,
)
from fireworks_training.cli.demo_problems import Problem, Score, StepRecord

MAX_TOKENS = 48
"""Tokens of a completion at most; a problem with its working takes about 25."""


@dataclass(frozen=True)
class LoopPlan:
    """Sets how a run trains.

    Attributes:
        steps: updates of the weights.
        prompts: problems a step.
        samples: completions of each, the group.
        learning_rate: reached after `warmup` steps.
        warmup: steps over which the rate rises.
        held_out: problems kept for scoring.
        score_every: steps between two scorings of the held-out problems.
        seed: seed of the order of problems.
    """

    steps: int = 60
    prompts: int = 16
    samples: int = 16
    learning_rate: float = 1e-4
    warmup: int = 5
    held_out: int = 400
    score_every: int = 5
    seed: int = 0


def reward(completion: SampledCompletion, problem: Problem) -> float:
    """Give 1 if the text after the last `####` is the answer, else 0."""
    _, mark, given = completion.text.rpartition("####")
    return float(bool(mark) and given.strip() == problem.answer)


def advantages(rewards: Sequence[float], samples: int) -> list[float]:
    """Compute group-relative advantages of rewards in groups of `samples`."""
    groups = np.asarray(rewards, np.float64).reshape(-1, samples)
    spread = groups.std(axis=1, keepdims=True)
    relative = (groups - groups.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    return [float(value) for value in relative.ravel()]


def conversations(problems: Sequence[Problem]) -> list[list[dict[str, str]]]:
    """Make a conversation of each problem."""
    return [[{"role": "user", "content": problem.prompt}] for problem in problems]


async def score(
    sampler: DeploymentSampler,
    problems: Sequence[Problem],
    *,
    temperature: float,
    seed: int,
    record: Path | None = None,
) -> Score:
    """Score one completion of each problem; `record` is a file for prompts, snapshot and
    completions."""
    settings = {"max_tokens": MAX_TOKENS, "temperature": temperature, "seed": seed}
    prompts = conversations(problems)
    completions = await sampler.sample_with_tokens(
        prompts, max_tokens=MAX_TOKENS, temperature=temperature, seed=seed
    )
    rewards = [reward(c, problems[c.prompt_index]) for c in completions]
    if record is not None:
        write_evaluation(
            record,
            completions,
            prompts=prompts,
            scores=rewards,
            snapshot=sampler.current_snapshot,
            settings=settings,
        )
    return Score(int(sum(rewards)), len(completions))


async def train(
    service: AsyncFiretitanServiceClient,
    problems: Sequence[Problem],
    held_out: Sequence[Problem],
    plan: LoopPlan,
    on_step: Callable[[StepRecord], None],
) -> DeploymentSampler:
    """Run the loop; calls `on_step` after every step. Returns a sampler of the trained weights."""
    client = await service.create_training_client()
    order = random.Random(plan.seed + 1)  # noqa: S311 - an order, not a secret
    sampler = await sync(service, client, "start")
    for step in range(plan.steps):
        began = time.monotonic()
        batch = order.sample(list(problems), min(plan.prompts, len(problems)))
        completions = await sampler.sample_with_tokens(
            conversations(batch),
            n=plan.samples,
            max_tokens=MAX_TOKENS,
            logprobs=True,
            seed=(plan.seed * plan.steps + step) * plan.prompts * plan.samples,
        )
        sampled_in = time.monotonic() - began
        rewards = [reward(c, batch[c.prompt_index]) for c in completions]
        drift, grad_norm = await update(client, completions, rewards, plan, step)
        snapshot = sampler.current_snapshot or ""
        sampler = await sync(service, client, f"step-{step:05d}")
        score_now = (step + 1) % plan.score_every == 0 and step + 1 < plan.steps
        on_step(
            StepRecord(
                step=step,
                reward=sum(rewards) / len(rewards),
                held_out_accuracy=(
                    (await score(sampler, held_out, temperature=1.0, seed=step)).accuracy
                    if score_now
                    else None
                ),
                window=sampler.concurrency_controller.step_completed()["window"],
                tokens_per_second=sum(c.completion_len for c in completions) / sampled_in,
                drift_mean_abs=float(drift.mean()),
                drift_max_abs=float(drift.max()),
                grad_norm=grad_norm,
                snapshot=snapshot,
                seconds=time.monotonic() - began,
            )
        )
    return sampler


async def update(
    client: AsyncFiretitanTrainingClient,
    completions: Sequence[SampledCompletion],
    rewards: Sequence[float],
    plan: LoopPlan,
    step: int,
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]:
    """Train one step on scored completions.

    Returns:
        |engine's logprob - trainer's| of each sampled token, and the gradient's norm. The trainer
        still has the weights that sampled, so the two are of the same model.
    """
    import tinker

    tokens = sum(c.completion_len for c in completions)
    data = [
        completion_datum(c, advantage / tokens)
        for c, advantage in zip(completions, advantages(rewards, plan.samples), strict=True)
    ]
    # Both are sent at once: call order is execution order, and they are applied together or not.
    training = client.forward_backward(data, "importance_sampling")
    stepping = client.optim_step(
        tinker.AdamParams(
            learning_rate=plan.learning_rate * min(1.0, (step + 1) / plan.warmup),
            grad_clip_norm=1.0,
        )
    )
    outputs = (await training).loss_fn_outputs
    differences = [
        np.abs(
            output["logprobs"].to_numpy()[-c.completion_len :] - np.asarray(c.inference_logprobs)
        )
        for output, c in zip(outputs, completions, strict=True)
    ]
    metrics = (await stepping).metrics or {}
    return np.concatenate(differences), metrics.get("grad_norm", math.nan)


async def sync(
    service: AsyncFiretitanServiceClient, client: AsyncFiretitanTrainingClient, name: str
) -> DeploymentSampler:
    """Save the weights, load them into the deployment, and sample from there."""
    saved = await client.save_weights_for_sampler(name)
    return await service.create_deployment_sampler(saved.path)
