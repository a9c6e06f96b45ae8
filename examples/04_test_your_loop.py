"""Test a training loop without the platform: three servers in this process, and scripted faults.

    python examples/04_test_your_loop.py

`train` is the loop under test; it knows nothing of the test. Run it with pytest or by hand. The
servers answer over real HTTP and note what they were asked; nothing is trained, and completions are
scripted, so a test takes a fraction of a second.
"""

from __future__ import annotations

import asyncio
from typing import Any

import tinker

from fireworks_training import AsyncFiretitanServiceClient, completion_datum
from fireworks_training.testing import (
    CharacterTokenizer,
    CompletionsServer,
    ControlPlaneServer,
    TrainerServer,
)
from fireworks_training.testing.completions_server import completes, status

QUESTION = [{"role": "user", "content": "What is 6 * 7?"}]
STEPS = 5
ADAM = tinker.AdamParams(learning_rate=1e-5)


async def train(service: AsyncFiretitanServiceClient, tokenizer: Any, steps: int) -> list[float]:
    """Sample four answers a step, reward the right ones, train on them; the mean rewards."""
    client = await service.create_training_client()
    rewards: list[float] = []
    for step in range(steps):
        sync = await client.weight_sync(f"step-{step}")
        sampler = await service.create_deployment_sampler(
            model_path=sync.identity, tokenizer=tokenizer
        )
        answers = await sampler.sample_with_tokens(QUESTION, n=4, max_tokens=8, logprobs=True)
        scores = [float(answer.text == "42") for answer in answers]
        rewards.append(sum(scores) / len(scores))
        data = [completion_datum(a, s - rewards[-1]) for a, s in zip(answers, scores, strict=True)]
        client.forward_backward(data, "importance_sampling")
        await client.optim_step(ADAM)
        print({"step": step, "checkpoint": sync.identity, "eval_score": rewards[-1]})
    return rewards


async def test_the_loop() -> None:
    tokenizer = CharacterTokenizer()
    right, wrong = (completes(tokenizer.encode(text), text) for text in ("42", "41"))
    faults = [status(503), status(429, Retry_After="0")]
    trainer = TrainerServer(lost_answers={2})  # the answer to the first step is lost
    completions = CompletionsServer(script=[*faults, right, wrong, right, wrong], otherwise=right)
    async with (
        ControlPlaneServer(trainer, completions) as platform,
        AsyncFiretitanServiceClient.from_firetitan_config(
            base_url=platform.url,
            api_key="any",
            base_model="accounts/me/models/any",
            cleanup_trainer_on_close=True,
            cleanup_deployment_on_close="delete",
        ) as service,
    ):
        assert await train(service, tokenizer, STEPS) == [0.5] + [1.0] * (STEPS - 1)
    assert trainer.steps == [4] * STEPS  # datums in each optimizer step: none lost, none twice
    assert len(platform.loads) == STEPS  # snapshots that were hot-loaded
    assert len(completions.bodies) == 4 * STEPS + len(faults)
    assert platform.left() == []  # the trainer and the deployment are gone


if __name__ == "__main__":
    asyncio.run(test_the_loop())
