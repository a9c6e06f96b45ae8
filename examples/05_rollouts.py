"""Rollouts sampled while the batch before them is trained, never more than one batch ahead.

    python examples/05_rollouts.py

The pool starts a group only when the bound allows it, and hands out groups in the order in which
they started: no finished rollout is thrown away, and long ones are trained like short ones.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import tinker

from fireworks_training import AsyncFiretitanServiceClient
from fireworks_training.rollouts import Episode, RolloutContext, RolloutPool

ADAM = tinker.AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8)
TASKS = [(a, b) for a in range(2, 6) for b in range(2, 6)]


async def rollout(task: tuple[int, int], ctx: RolloutContext) -> Any:
    """One answer to one problem; the pool calls it for each member of a group."""
    a, b = task
    question = f"Ann has {a} pens and gets {b} more. How many pens does Ann have?"
    messages = [{"role": "user", "content": question}]
    (completion,) = await ctx.sampler.sample_with_tokens(messages, max_tokens=16)
    return completion


def right(episode: Episode, task: tuple[int, int]) -> float:
    """The reward: 1 for the right number."""
    return float(episode.text.split("####")[-1].strip() == str(sum(task)))


async def main(total_steps: int = 5) -> None:
    async with AsyncFiretitanServiceClient.from_firetitan_config(
        api_key=os.environ.get("FIREWORKS_API_KEY"),
        base_url=os.environ.get("FIREWORKS_BASE_URL", "local"),
        base_model="accounts/local/models/tiny-qwen3",
        training_shape_id="accounts/local/trainingShapes/cpu",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        client = await service.create_training_client()
        async with RolloutPool(
            service,
            TASKS,
            rollout,
            groups_per_batch=2,
            group_size=4,
            max_lag=1,
            steps=total_steps,
            reward=right,
            shuffle=True,
        ) as pool:
            async for batch in pool:
                client.forward_backward(batch.data(), "importance_sampling")
                client.optim_step(ADAM)
                await pool.publish(client)
                score = batch.mean_reward or 0.0
                print({"step": batch.number, "lag": batch.lag, "eval_score": score})


if __name__ == "__main__":
    asyncio.run(main())
