"""A tiny random Qwen3, its folder, and an engine that serves it from a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fireworks_training.local.engine.core import Engine, EngineCapacity
from fireworks_training.local.engine.weights import ServedWeights
from fireworks_training.local.engine.worker import listen, serve
from fireworks_training.local.model.model import parameter_tensors
from fireworks_training.local.store.deltas import encode
from fireworks_training.local.store.snapshots import LoraBlock, Manifest, SnapshotStore, hashes_of

VOCABULARY = 300
EOS = 1
BASE_MODEL = "accounts/local/models/tiny"
LIMITS = EngineCapacity(max_slots=8, max_waiting=16, max_context=256, cache_tokens=1 << 16)


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


def write_base(store: SnapshotStore, name: str, seed: int, base: str = BASE_MODEL) -> Manifest:
    """A snapshot of kind base with the bf16 weights of another random model."""
    tensors = {n: t.bfloat16() for n, t in parameter_tensors(tiny_qwen3(seed)).items()}
    return store.write(name, tensors, base_model=base, dtype="bfloat16")


def write_delta(store: SnapshotStore, name: str, predecessor: str, seed: int) -> Manifest:
    """A delta that adds a little noise to the weights of `predecessor`."""
    before, old = store.load(predecessor)
    generator = torch.Generator().manual_seed(seed)
    new = {
        n: (t.float() + 1e-3 * torch.randn(t.shape, generator=generator)).bfloat16()
        for n, t in old.items()
    }
    delta = encode(old, new)
    assert delta is not None
    return store.write_delta(
        name, delta.tensors, delta.checksums, predecessor=before, hashes=hashes_of(new)
    )


def write_lora(store: SnapshotStore, name: str, seed: int) -> Manifest:
    """An adapter on both attention projections of the first layer."""
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers.0.self_attn"
    tensors = {}
    for layer, out in (("q_proj", 32), ("v_proj", 16)):
        tensors[f"{prefix}.{layer}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        tensors[f"{prefix}.{layer}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    tensors = {n: t.bfloat16() for n, t in tensors.items()}
    block = LoraBlock(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
    return store.write(name, tensors, base_model=BASE_MODEL, dtype="bfloat16", lora=block)


def make_engine(model_path: Path, store: SnapshotStore, **limits: int) -> Engine:
    return Engine(ServedWeights(model_path, store, BASE_MODEL), replace(LIMITS, **limits))


@contextmanager
def engine_thread(engine: Engine, socket: Path) -> Iterator[threading.Thread]:
    """Serves `engine` from a thread; the test has to send `stop` before it leaves."""
    thread = threading.Thread(target=serve, args=(engine, listen(socket)), daemon=True)
    thread.start()
    yield thread
    thread.join(10)
    assert not thread.is_alive(), "the engine was not stopped"
