"""A tiny random Qwen3 for the engine's tests, and what a plain forward pass says about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 300
EOS = 1


def tiny_qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.4,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Qwen3ForCausalLM:
    return tiny_qwen3()


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, model: Qwen3ForCausalLM) -> Path:
    path = tmp_path_factory.mktemp("tiny-qwen3")
    model.save_pretrained(path)
    return path
