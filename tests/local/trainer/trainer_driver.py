"""A client of the trainer's JSON dialect without retries of its own, and data for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
from aiohttp.test_utils import TestClient
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 64
HTTP = TestClient[Any, Any]


def save_tiny_model(path: Path, *, tied: bool = False) -> None:
    """Writes a Hugging Face directory: Qwen3 with random weights, 2 layers, hidden 32."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(path)


class Trainer:
    """A model on a trainer, driven over HTTP as a client would."""

    def __init__(self, http: HTTP, session_id: str, model_id: str, created: dict[str, Any]) -> None:
        self.http = http
        self.session_id = session_id
        self.model_id = model_id
        self.created = created
        self.seq_id = 0

    async def post(
        self, kind: str, body: dict[str, Any], prefix: str = "/api/v1"
    ) -> tuple[int, dict[str, Any]]:
        async with self.http.post(f"{prefix}/{kind}", json=body) as response:
            return response.status, await response.json()

    async def post_internal(self, kind: str, body: dict[str, Any]) -> None:
        status, answer = await self.post(kind, body, "/internal")
        assert status == 200, answer

    async def submit(self, kind: str, seq_id: int | None = None, **fields: Any) -> str:
        """Sends an operation with the next seq_id; returns its request id."""
        status, answer = await self.send(kind, seq_id, **fields)
        assert status == 200, answer
        return answer["request_id"]

    async def send(
        self, kind: str, seq_id: int | None = None, **fields: Any
    ) -> tuple[int, dict[str, Any]]:
        if seq_id is None:
            seq_id = self.seq_id = self.seq_id + 1
        return await self.post(kind, {"model_id": self.model_id, "seq_id": seq_id, **fields})

    async def result(self, request_id: str) -> dict[str, Any]:
        while True:
            status, answer = await self.post("retrieve_future", {"request_id": request_id})
            assert status == 200, answer
            if answer.get("type") != "try_again":
                return answer

    async def run(self, kind: str, **fields: Any) -> dict[str, Any]:
        """One operation and its result; a failure's body is returned like any other."""
        return await self.result(await self.submit(kind, **fields))

    async def ok(self, kind: str, **fields: Any) -> dict[str, Any]:
        answer = await self.run(kind, **fields)
        assert "error" not in answer, answer
        return answer


Starter = Callable[..., Awaitable[Trainer]]


async def new_model(http: HTTP, model_seq_id: int = 0, **fields: Any) -> Trainer:
    """A session of its own, and a model in it."""
    trainer = Trainer(http, "", "", {})
    _, session = await trainer.post("create_session", {"tags": [], "user_metadata": {}})
    body = {
        "session_id": session["session_id"],
        "model_seq_id": model_seq_id,
        "base_model": "accounts/local/models/tiny-qwen3",
        "lora_config": {"rank": 0},
        **fields,
    }
    status, answer = await trainer.post("create_model", body)
    assert status == 200, answer
    created = await trainer.result(answer["request_id"])
    return Trainer(http, session["session_id"], answer["model_id"], created)


def tensor(values: list[float] | list[int], dtype: str = "float32") -> dict[str, Any]:
    return {"data": values, "dtype": dtype, "shape": [len(values)]}


def datum(tokens: list[int], targets: list[int], **inputs: list[float]) -> dict[str, Any]:
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {
            "target_tokens": tensor(targets, "int64"),
            **{name: tensor(values) for name, values in inputs.items()},
        },
    }


def cross_entropy(*data: dict[str, Any], backward: bool = True) -> dict[str, Any]:
    key = "forward_backward_input" if backward else "forward_input"
    return {key: {"data": list(data), "loss_fn": "cross_entropy"}}


def some_data(seed: int = 0, count: int = 3) -> list[dict[str, Any]]:
    """Datums of different lengths with some zero weights."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for index in range(count):
        length = 4 + 3 * index
        ids = torch.randint(VOCAB, (length + 1,), generator=generator).tolist()
        weights = torch.rand(length, generator=generator)
        weights[0] = 0.0
        data.append(datum(ids[:-1], ids[1:], weights=weights.tolist()))
    return data


ADAM: dict[str, float] = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
