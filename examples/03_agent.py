"""An agent in OpenAI's chat API, trained on the very tokens that the model sampled.

    python examples/03_agent.py

The agent below knows nothing of training: it sends messages to an endpoint, as it would to any
OpenAI-compatible server, and answers with what a tool told it. The endpoint keeps the tokens. Each
trajectory gives rows of tokens with logprobs and a loss mask; all of its rows share one reward.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import aiohttp
import tinker

from fireworks_training import (
    AsyncFiretitanServiceClient,
    ChatTemplateRenderer,
    TITOSidecar,
    rollout_datum,
)

ADAM = tinker.AdamParams(learning_rate=1e-4, beta1=0.9, beta2=0.999, eps=1e-8)
AGENTS = 4


async def agent(base_url: str, api_key: str, a: int, b: int) -> float:
    """Asks, checks the answer with a tool, asks once more, and returns its reward."""
    question = f"Ann has {a} pens and gets {b} more. How many pens does Ann have?"
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    said = ""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api_key}"}) as session:
        for _ in range(2):
            body = {"model": "policy", "messages": messages, "max_tokens": 32}
            async with session.post(f"{base_url}/chat/completions", json=body) as answer:
                answer.raise_for_status()
                message = (await answer.json())["choices"][0]["message"]
            said = message["content"].split("####")[-1].strip()
            verdict = "right" if said == str(a + b) else "wrong"
            messages += [message, {"role": "user", "content": f"That is {verdict}. Once more?"}]
    return float(said == str(a + b))


async def rollout(sidecar: TITOSidecar, index: int) -> tuple[float, list[Any]]:
    """One trajectory: its reward, and its rows."""
    endpoint = await sidecar.create_trajectory_async(metadata={"problem": index})
    reward = await agent(endpoint.openai_base_url, endpoint.api_key, 2 + index, 3)
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    return reward, list(artifact.segments)


async def main(total_steps: int = 5) -> None:
    async with AsyncFiretitanServiceClient.from_firetitan_config(
        api_key=os.environ.get("FIREWORKS_API_KEY"),
        base_url=os.environ.get("FIREWORKS_BASE_URL", "local"),
        base_model="accounts/local/models/tiny-qwen3",
        training_shape_id="accounts/local/trainingShapes/cpu",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        training_client = await service.create_training_client()
        tokenizer = await service.get_tokenizer()
        sampler = await service.create_deployment_sampler(tokenizer=tokenizer)
        async with TITOSidecar.from_deployment_sampler(
            sampler,
            renderer=ChatTemplateRenderer(tokenizer),
            max_context_tokens=512,
            max_output_tokens=64,
            prompt_mode="incremental",
        ) as sidecar:
            for step in range(total_steps):
                done = await asyncio.gather(*(rollout(sidecar, i) for i in range(AGENTS)))
                mean = sum(reward for reward, _ in done) / AGENTS
                data = [
                    rollout_datum(
                        row.tokens,
                        logprobs=row.logprobs,
                        loss_mask=row.loss_mask,
                        advantages=reward - mean,
                    )
                    for reward, rows in done
                    for row in rows
                ]
                training_client.forward_backward(data, "importance_sampling")
                training_client.optim_step(ADAM)
                saved = await training_client.save_weights_for_sampler(f"step_{step:05d}")
                await service.create_deployment_sampler(model_path=saved.path)
                print({"step": step, "rows": len(data), "eval_score": mean})


if __name__ == "__main__":
    asyncio.run(main())
