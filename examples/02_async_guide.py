"""The guide as a coroutine: the same steps with `async with` and `await`.

    python examples/02_async_guide.py

Two things come for free here. The operations of a step are sent without waiting for each other,
since call order is execution order. And nothing is left over: `async with` finishes what was
accepted, cleans up and closes, also when the loop raises.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import tinker
import torch

from fireworks_training import AdaptiveConcurrencyController, AsyncFiretitanServiceClient
from fireworks_training.data import supervised_datum

ADAM = tinker.AdamParams(learning_rate=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
PROBLEMS = [
    (f"Ann has {a} pens and gets {b} more. How many pens does Ann have?", str(a + b))
    for a in range(2, 6)
    for b in range(2, 6)
]


def right_answer(tokenizer: Any, index: int) -> tinker.Datum:
    """One problem with its answer: prompt tokens have weight 0, the answer's 1."""
    question, answer = PROBLEMS[index % len(PROBLEMS)]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    completion = tokenizer.encode(f"#### {answer}", add_special_tokens=False)
    completion.append(tokenizer.eos_token_id)
    return supervised_datum(prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion))


def objective(
    data: Sequence[tinker.Datum], logprobs_list: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Negative log-likelihood of the answers, averaged over their tokens."""
    weights = torch.cat([datum.loss_fn_inputs["weights"].to_torch() for datum in data])
    loss = -(weights * torch.cat(logprobs_list)).sum() / weights.sum()
    return loss, {"loss": float(loss.detach())}


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
        concurrency = AdaptiveConcurrencyController(initial_window=16)
        eval_prompts = [[{"role": "user", "content": question}] for question, _ in PROBLEMS[:4]]

        for step in range(total_steps):
            # Nothing here waits: micro-batches, step and save are under way at once.
            micro_batches = [
                training_client.forward_backward_custom(
                    [right_answer(tokenizer, 4 * step + 2 * micro + i) for i in range(2)], objective
                )
                for micro in range(2)
            ]
            training_client.optim_step(ADAM)
            saving = training_client.save_weights_for_sampler(f"step_{step:05d}")

            losses = [(await result).metrics["loss"] for result in micro_batches]
            saved = await saving
            sampler = await service.create_deployment_sampler(
                model_path=saved.path, tokenizer=tokenizer, concurrency_controller=concurrency
            )
            completions = await sampler.sample_with_tokens(eval_prompts, n=2, max_tokens=32)
            right = [
                c.text.split("####")[-1].strip() == PROBLEMS[c.prompt_index][1] for c in completions
            ]
            print(
                {
                    "step": step,
                    "checkpoint": saved.path,
                    "loss": sum(losses) / len(losses),
                    "eval_score": sum(right) / len(right),
                }
            )


if __name__ == "__main__":
    asyncio.run(main())
