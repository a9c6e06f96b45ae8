"""Loading, rounding, adapters, and snapshots into a module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fireworks_training.local.model.model import (
    LoraNotPossible,
    LoraSettings,
    adapter_parameters,
    apply_lora,
    configure_torch,
    load_model,
    load_snapshot_,
    parameter_tensors,
    round_parameters_,
    vocab_size,
)
from fireworks_training.local.store.snapshots import LoraBlock, SnapshotMismatch, SnapshotStore
from tests.local.trainer.trainer_driver import VOCAB, save_tiny_model

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    configure_torch()
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def module(path: Path) -> PreTrainedModel:
    return load_model(path)


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path, writer="job")


@torch.no_grad()
def logits(module: PreTrainedModel) -> torch.Tensor:
    return module(input_ids=IDS, use_cache=False).logits


def copy(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in parameter_tensors(module).items()}


def trained_adapter(module: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Adapter tensors that are not zero, rounded as a snapshot has them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            value = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value.bfloat16().float())
    return {name: p.detach().bfloat16() for name, p in adapter_parameters(module).items()}


def test_it_is_fp32_in_eval_mode(module: PreTrainedModel) -> None:
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not module.training
    assert vocab_size(module) == VOCAB


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        load_model(tmp_path)


def test_rounding_covers_every_parameter(module: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1e-4)
    before = copy(module)
    round_parameters_(module, "float32")
    assert all(torch.equal(before[name], t) for name, t in parameter_tensors(module).items())
    round_parameters_(module, "bfloat16")
    for name, tensor in parameter_tensors(module).items():
        assert torch.equal(tensor, before[name].bfloat16().float())
        assert tensor.dtype == torch.float32
    assert any(not torch.equal(before[name], t) for name, t in parameter_tensors(module).items())


@pytest.mark.parametrize(
    ("flags", "leaves"),
    [
        ({}, "down_proj gate_proj k_proj lm_head o_proj q_proj up_proj v_proj"),
        ({"train_mlp": False, "train_unembed": False}, "k_proj o_proj q_proj v_proj"),
        ({"train_attn": False, "train_unembed": False}, "down_proj gate_proj up_proj"),
        ({"train_attn": False, "train_mlp": False}, "lm_head"),
    ],
)
def test_flags_choose_the_adapted_layers(
    module: PreTrainedModel, flags: dict[str, bool], leaves: str
) -> None:
    block = apply_lora(module, LoraSettings(rank=2, alpha=8.0, **flags))
    assert block == LoraBlock(rank=2, alpha=8.0, target_modules=tuple(leaves.split()))
    trainable = {p for p in module.parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(module).values())
    assert {name.split(".")[-3] for name in adapter_parameters(module)} == set(leaves.split())


def test_a_new_adapter_changes_nothing_and_follows_its_seed(path: Path) -> None:
    plain = logits(load_model(path))
    modules = [load_model(path) for _ in range(3)]
    state = torch.get_rng_state()
    for module, seed in zip(modules, (1, 1, 2), strict=True):
        apply_lora(module, LoraSettings(rank=2, seed=seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(logits(module), plain) for module in modules)
    name = "base_model.model.lm_head.lora_A.weight"
    first, again, other = (adapter_parameters(module)[name] for module in modules)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_adapter_that_would_train_nothing(module: PreTrainedModel) -> None:
    nothing = LoraSettings(rank=2, train_mlp=False, train_attn=False, train_unembed=False)
    with pytest.raises(LoraNotPossible, match="nothing"):
        apply_lora(module, nothing)


def test_an_adapter_on_a_tied_output_layer(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tied=True)
    with pytest.raises(LoraNotPossible, match="train_unembed=False"):
        apply_lora(load_model(tmp_path), LoraSettings(rank=2))
    assert apply_lora(load_model(tmp_path), LoraSettings(rank=2, train_unembed=False))


def test_a_base_snapshot_gives_the_same_numbers(path: Path, store: SnapshotStore) -> None:
    trainer, engine = load_model(path), load_model(path)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.mul_(1.1)
    round_parameters_(trainer, "bfloat16")
    tensors = {name: t.bfloat16() for name, t in parameter_tensors(trainer).items()}
    store.write("s", tensors, base_model="m", dtype="bfloat16")
    assert not torch.equal(logits(engine), logits(trainer))
    load_snapshot_(engine, *store.load("s"), base_tensors={})
    assert torch.equal(logits(engine), logits(trainer))


def test_an_adapter_is_merged_into_the_base_every_time(path: Path, store: SnapshotStore) -> None:
    trainer, engine = load_model(path), load_model(path)
    for module in (trainer, engine):
        round_parameters_(module, "bfloat16")
    base = copy(engine)
    untrained = logits(engine)
    block = apply_lora(trainer, LoraSettings(rank=3, alpha=6.0))
    store.write("s", trained_adapter(trainer), base_model="m", dtype="bfloat16", lora=block)
    for _ in range(2):  # loading again must not add the adapter twice
        load_snapshot_(engine, *store.load("s"), base_tensors=base)
        torch.testing.assert_close(logits(engine), logits(trainer), atol=1e-5, rtol=1e-5)
    assert (logits(engine) - untrained).abs().max() > 1e-2
    half = LoraBlock(rank=3, alpha=3.0, target_modules=block.target_modules)
    store.write("h", trained_adapter(trainer), base_model="m", dtype="bfloat16", lora=half)
    load_snapshot_(engine, *store.load("h"), base_tensors=base)
    assert (logits(engine) - logits(trainer)).abs().max() > 1e-3, "alpha has its say"


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[0])


def with_one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["new.weight"] = torch.zeros(1)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(3, 5)


@pytest.mark.parametrize("spoil", [without_one, with_one_more, reshaped])
@pytest.mark.parametrize("kind", ["base", "lora"])
def test_a_snapshot_of_another_model_changes_nothing(
    path: Path, store: SnapshotStore, kind: str, spoil: object
) -> None:
    engine = load_model(path)
    base, before = copy(engine), logits(engine)
    block = None
    if kind == "lora":
        trainer = load_model(path)
        block = apply_lora(trainer, LoraSettings(rank=2))
        tensors = trained_adapter(trainer)
    else:
        tensors = {name: 2 * tensor for name, tensor in base.items()}
    spoil(tensors)  # type: ignore[operator]
    store.write("s", tensors, base_model="m", dtype="float32", lora=block)
    with pytest.raises(SnapshotMismatch, match="'s'"):
        load_snapshot_(engine, *store.load("s"), base_tensors=base)
    assert torch.equal(logits(engine), before)
