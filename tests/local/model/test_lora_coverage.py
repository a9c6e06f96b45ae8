"""An adapter covers the linear layers of nine architectures, or is refused with a list.

The judge is the model itself: its own linear modules, and peft's forward against the merged
weights that an engine serves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fireworks_training.local.model.model import (
    LoraNotPossible,
    LoraSettings,
    adapter_parameters,
    apply_lora,
    load_snapshot_,
    parameter_tensors,
)
from fireworks_training.local.store.snapshots import SnapshotStore

IDS = torch.arange(12).reshape(2, 6)
MOE = {"num_experts_per_tok": 2, "intermediate_size": 64, "num_key_value_heads": 2}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 64},
    "falcon": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {**MOE, "num_local_experts": 4},
}


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **{**DENSE, **EXPERTS}[kind],
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def covered(model: PreTrainedModel) -> set[str]:
    names = adapter_parameters(model)
    return {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}


@pytest.mark.parametrize("kind", [*DENSE, *EXPERTS])
def test_every_linear_layer_is_covered_and_served_as_trained(kind: str, tmp_path: Path) -> None:
    plain, model = made(kind), made(kind)
    linear = {n for n, m in plain.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    settings = LoraSettings(rank=2, alpha=8.0, train_mlp=kind in DENSE)
    block = apply_lora(model, settings)
    assert covered(model) == linear
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        before = plain(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
        trained = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    store = SnapshotStore(tmp_path, writer="job")
    tensors = {name: p.detach() for name, p in adapter_parameters(model).items()}
    store.write("s", tensors, base_model="m", dtype="float32", lora=block)
    load_snapshot_(plain, *store.load("s"), base_tensors=parameter_tensors(plain))
    with torch.no_grad():
        served = plain(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    assert (served - trained).abs().max() < 1e-4
    assert (served - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_in_one_tensor_are_refused_with_a_list(kind: str) -> None:
    with pytest.raises(LoraNotPossible, match=r"experts\.down_proj.*train_mlp=False") as caught:
        apply_lora(made(kind), LoraSettings(rank=2))
    assert "model.layers.*.mlp.experts.gate_up_proj" in str(caught.value)


@pytest.mark.parametrize("kind", DENSE)
def test_flags_divide_the_blocks_between_attention_and_the_rest(kind: str) -> None:
    halves = []
    for attention in (True, False):
        model = made(kind)
        flags = {"train_attn": attention, "train_mlp": not attention, "train_unembed": False}
        apply_lora(model, LoraSettings(rank=2, **flags))
        halves.append(covered(model))
    assert halves[0]
    assert halves[1]
    assert not halves[0] & halves[1]
