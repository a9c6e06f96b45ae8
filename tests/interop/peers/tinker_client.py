"""The official Tinker client against a platform: what it saw, as one line of JSON.

Runs in a venv of its own, without this package. Its environment names the platform.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tinker
import torch
from tinker import types

TOKENS = [[5, 17, 9, 33, 21, 8], [7, 7, 41, 12], [90, 3, 58, 14, 62, 27, 31]]


def datums() -> list[types.Datum]:
    """The same data that `tests.interop.test_clients` gives to our client."""
    data = []
    for tokens in TOKENS:
        weights = np.ones(len(tokens) - 1, np.float32)
        weights[0] = 0.0
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": types.TensorData.from_numpy(np.array(tokens[1:])),
                    "weights": types.TensorData.from_numpy(weights),
                },
            )
        )
    return data


def custom(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Something that no built-in loss is."""
    loss = sum((values.exp() ** 2).sum() for values in logprobs)
    return loss, {"count": float(len(data))}


def rl_datums(data: list[types.Datum]) -> list[types.Datum]:
    out = []
    for index, datum in enumerate(data):
        length = datum.model_input.length
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "logprobs": types.TensorData.from_numpy(np.full(length, -3.0, np.float32)),
            "advantages": types.TensorData.from_numpy(np.full(length, 1.0 - index, np.float32)),
        }
        out.append(types.Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    return out


def main(model: str) -> None:
    """Create, train, custom loss, save, resume, sample."""
    service = tinker.ServiceClient()
    training = service.create_lora_training_client(model, rank=8, seed=3).result()
    adam = types.AdamParams(learning_rate=1e-3, eps=1e-8)
    data = datums()
    losses = []
    for _ in range(2):
        passed = training.forward_backward(data, "cross_entropy")
        step = training.optim_step(adam)
        losses.append(passed.result().metrics["loss:sum"])
        step.result()
    ppo = training.forward_backward(rl_datums(data), "ppo")
    training.optim_step(adam).result()
    losses.append(ppo.result().metrics["loss:sum"])
    made = training.forward_backward_custom(data, custom).result()
    training.optim_step(adam).result()
    losses.append(made.metrics.get("loss:sum", made.metrics.get("loss")))
    path = training.save_state("step-4").result().path
    losses.append(training.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    again = resumed.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(TOKENS[0][:3])
    params = types.SamplingParams(max_tokens=5, temperature=0.0)
    sampled = sampler.sample(prompt, 2, params).result()
    whole = types.ModelInput.from_ints(TOKENS[0])
    scored = sampler.compute_logprobs(whole).result()
    chosen = torch.tensor(TOKENS[0][1:], dtype=torch.int64)[:, None]
    asked = sampler.sample(
        whole,
        1,
        types.SamplingParams(max_tokens=1, seed=5),
        target_prompt_logprobs=types.TensorData.from_torch_sparse(chosen, pad_value=-1),
        prompt_alt_tokens_k=2,
        topk_prompt_logprobs=1,
    ).result()
    named = training.save_weights_for_sampler("final").result().path
    other = service.create_sampling_client(model_path=named).result()
    base = service.create_sampling_client(base_model=model).result()
    seen = {
        "losses": losses,
        "resumed": again,
        "path": path,
        "named": named,
        "greedy": [sequence.tokens for sequence in sampled.sequences],
        "scored": scored,
        "chosen": asked.target_prompt_logprobs.to_torch().flatten().tolist(),
        "drawn": asked.prompt_alt_tokens.tokens.to_torch().tolist(),
        "best": [row and row[0][1] for row in asked.topk_prompt_logprobs],
        "scored_named": other.compute_logprobs(whole).result(),
        "scored_base": base.compute_logprobs(whole).result(),
        "forward": training.forward(data, "cross_entropy").result().metrics["loss:sum"],
    }
    rest = service.create_rest_client()
    run = rest.get_training_run_by_tinker_path(path).result()
    listed = rest.list_checkpoints(run.training_run_id).result().checkpoints
    seen["listed"] = sorted(checkpoint.tinker_path for checkpoint in listed)
    rest.delete_checkpoint_from_tinker_path(named).result()
    listed = rest.list_checkpoints(run.training_run_id).result().checkpoints
    seen["left"] = [checkpoint.tinker_path for checkpoint in listed]
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    listed = rest.list_checkpoints(run.training_run_id).result().checkpoints
    seen["expires"] = [checkpoint.expires_at is not None for checkpoint in listed]
    session = run.training_run_id.partition(":")[0]
    seen["session_listed"] = session in rest.list_sessions().result().sessions
    seen["runs"] = rest.get_session(session).result().training_run_ids
    try:
        rest.copy_weights(path, "project").result()
    except tinker.TinkerError as error:
        seen["refused"] = str(error)
    print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
