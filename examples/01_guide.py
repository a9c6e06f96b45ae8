"""The guide, "Training and Sampling", as a plain script.

    python examples/01_guide.py

The lines are the guide's; what differs are the import line, `base_url` (the platform embedded in
this package, unless FIREWORKS_BASE_URL says otherwise), the tokenizer's source, and the names of
model and shape. What the guide leaves to the reader (objective, micro-batches, evaluation) is
filled in small.
"""

import asyncio
import os

import tinker

from fireworks_training import AdaptiveConcurrencyController, FiretitanServiceClient
from fireworks_training.data import supervised_datum

api_key = os.environ.get("FIREWORKS_API_KEY")
base_url = os.environ.get("FIREWORKS_BASE_URL", "local")

base_model = "accounts/local/models/tiny-qwen3"
shape_id = "accounts/local/trainingShapes/cpu"

total_steps = 20
eval_interval = 1

service = FiretitanServiceClient.from_firetitan_config(
    api_key=api_key,
    base_url=base_url,
    base_model=base_model,
    lora_rank=0,
    training_shape_id=shape_id,
    deployment_id="research-serving",
    learning_rate=1e-5,
    replica_count=1,  # deployment replicas for rollout/eval throughput
    cleanup_trainer_on_close=True,
    cleanup_deployment_on_close="scale_to_zero",
)
training_client = service.create_training_client(base_model=base_model, lora_rank=0)
tokenizer = service.get_tokenizer()
concurrency = AdaptiveConcurrencyController(initial_window=16)
sampler = service.create_deployment_sampler(
    tokenizer=tokenizer,
    concurrency_controller=concurrency,
)
print({"trainer_job_id": service.trainer_job_id, "deployment_id": service.deployment_id})

problems = [
    (f"Ann has {a} pens and gets {b} more. How many pens does Ann have?", str(a + b))
    for a in range(2, 6)
    for b in range(2, 6)
]
eval_prompts = [[{"role": "user", "content": question}] for question, _ in problems[:4]]


def build_micro_batches(step):
    """Two micro-batches of two right answers each: prompt tokens have weight 0, the answer's 1."""
    batches = []
    for micro in range(2):
        batch = []
        for index in range(2):
            question, answer = problems[(4 * step + 2 * micro + index) % len(problems)]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            )
            completion = tokenizer.encode(f"#### {answer}", add_special_tokens=False)
            completion.append(tokenizer.eos_token_id)
            weights = [0.0] * len(prompt) + [1.0] * len(completion)
            batch.append(supervised_datum(prompt + completion, weights))
        batches.append(batch)
    return batches


def compute_objective(data, logprobs_list):
    """Negative log-likelihood of the answers, averaged over their tokens."""
    total, count = 0.0, 0.0
    for datum, logprobs in zip(data, logprobs_list, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_torch()
        total = total - (weights * logprobs).sum()
        count = count + weights.sum()
    return total / count


def evaluate_responses(completions):
    """Share of completions whose last number is the right answer."""
    right = [
        completion.text.split("####")[-1].strip() == problems[completion.prompt_index][1]
        for completion in completions
    ]
    return sum(right) / len(right)


def objective(data, logprobs_list):
    loss = compute_objective(data=data, logprobs_list=logprobs_list)
    return loss, {"loss": float(loss.item())}


def run_training_loop():
    for step in range(total_steps):
        # Accumulate gradients client-side: run N forward/backward calls, then one optim_step.
        micro_batches = build_micro_batches(step)
        for micro_batch in micro_batches:
            training_client.forward_backward_custom(micro_batch, objective).result()
        training_client.optim_step(
            tinker.AdamParams(
                learning_rate=1e-5,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.01,
            )
        ).result()

        if step % eval_interval == 0:
            saved = training_client.save_weights_for_sampler(f"step_{step:05d}").result()
            # Passing model_path syncs the saved snapshot into the SDK-managed
            # deployment and returns a sampler backed by that deployment.
            sampler = service.create_deployment_sampler(
                model_path=saved.path,
                tokenizer=tokenizer,
                concurrency_controller=concurrency,
            )
            completions = asyncio.run(
                sampler.sample_with_tokens(
                    messages=eval_prompts,
                    n=1,
                    max_tokens=32,
                )
            )
            score = evaluate_responses(completions)
            print({"step": step, "checkpoint": saved.path, "eval_score": score})


try:
    run_training_loop()
finally:
    service.close()
