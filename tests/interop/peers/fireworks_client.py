"""The official Fireworks SDK against a platform: what it saw, as one line of JSON.

Runs in a venv of its own, without this package. Its environment names the platform. The first
argument is "direct" (a trainer by its URL) or "managed" (trainer and deployment provisioned), the
second the base model.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
import uuid

import torch
from fireworks.training.sdk import FiretitanServiceClient
from fireworks.training.sdk.client import types

TOKENS = [[5, 17, 9, 33, 21, 8], [7, 7, 41, 12], [90, 3, 58, 14, 62, 27, 31]]
BASE_URL = os.environ["FIREWORKS_BASE_URL"]
KEY = os.environ["FIREWORKS_API_KEY"]


def tensor(values: list, dtype: str) -> types.TensorData:
    return types.TensorData(data=values, dtype=dtype, shape=[len(values)])


def datums(**inputs: list[list[float]]) -> list[types.Datum]:
    """The same data that `tests.interop.test_clients` gives to our client."""
    data = []
    for index, tokens in enumerate(TOKENS):
        length = len(tokens) - 1
        given = inputs or {"weights": [[0.0] + [1.0] * 9] * len(TOKENS)}
        rows = {name: tensor(rows[index][:length], "float32") for name, rows in given.items()}
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tensor(tokens[1:], "int64"), **rows},
            )
        )
    return data


def custom(data: list, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Something that no built-in loss is."""
    loss = sum((values.exp() ** 2).sum() for values in logprobs)
    return loss, {"count": float(len(data))}


def call(method: str, path: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(
        f"{BASE_URL}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"X-API-Key": KEY, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def train(training) -> tuple[list[float], str]:
    """Two steps, ppo, a custom loss and a saved state; the losses, and the state's name."""
    adam = types.AdamParams(learning_rate=1e-3, eps=1e-8)
    data = datums()
    losses = []
    for _ in range(2):
        passed = training.forward_backward(data, "cross_entropy")
        step = training.optim_step(adam)
        losses.append(passed.result().metrics["loss:sum"])
        step.result()
    rows = {
        "logprobs": [[-3.0] * 9] * len(TOKENS),
        "advantages": [[1.0 - index] * 9 for index in range(len(TOKENS))],
    }
    ppo = training.forward_backward(datums(**rows), "ppo")
    training.optim_step(adam).result()
    losses.append(ppo.result().metrics["loss:sum"])
    made = training.forward_backward_custom(data, custom).result()
    training.optim_step(adam).result()
    assert made.metrics["count"] == 3.0
    path = training.save_state("step-4").result().path
    losses.append(training.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
    return losses, path


def again(training, path: str) -> float:
    """The last loss once more, from the saved state."""
    training.load_state_with_optimizer(path).result()
    return training.forward_backward(datums(), "cross_entropy").result().metrics["loss:sum"]


def direct(model: str) -> dict:
    job = f"direct-{uuid.uuid4().hex[:8]}"
    jobs = "/v1/accounts/local/rlorTrainerJobs"
    training = {"baseModel": model, "loraRank": 8}
    call("POST", f"{jobs}?rlorTrainerJobId={job}", {"trainingConfig": training})
    while call("GET", f"{jobs}/{job}")["state"] != "JOB_STATE_RUNNING":
        time.sleep(0.1)
    url = f"{BASE_URL}/training/v1/rlorTrainerJobs/local/{job}"
    seen: dict = {}
    for part in ("first", "second"):
        service = FiretitanServiceClient(base_url=url, api_key=KEY)
        client = service.create_training_client(base_model=model, lora_rank=8, seed=3)
        if part == "first":
            seen["losses"], path = train(client)
            seen["snapshot"] = client.save_weights_for_sampler_ext("final").snapshot_name
        else:
            seen["resumed"] = again(client, path)
        client.unload_model().result()
    call("DELETE", f"{jobs}/{job}")
    return seen


def managed(model: str) -> dict:
    seen: dict = {}
    options = {
        "base_url": BASE_URL,
        "api_key": KEY,
        "base_model": model,
        "tokenizer_model": os.environ["TOKENIZER"],
        "lora_rank": 8,
        "lora_alpha": 32,
        "training_shape_id": "accounts/local/trainingShapes/cpu",
        "cleanup_trainer_on_close": True,
        "cleanup_deployment_on_close": "delete",
    }
    service = FiretitanServiceClient.from_firetitan_config(**options)
    client = service.create_training_client(base_model=model, lora_rank=8)
    seen["losses"], path = train(client)
    seen["resumed"] = again(client, path)
    snapshot = client.save_weights_for_sampler("final").result().path
    sampler = service.create_deployment_sampler(model_path=snapshot)
    found = asyncio.run(
        sampler.sample_with_prompt_tokens(
            TOKENS[0][:3], n=2, max_tokens=5, temperature=0.0, logprobs=True
        )
    )
    seen["greedy"] = [one.full_tokens[one.prompt_len :] for one in found]
    service.close()
    return seen


if __name__ == "__main__":
    print(json.dumps({"direct": direct, "managed": managed}[sys.argv[1]](sys.argv[2])), flush=True)
