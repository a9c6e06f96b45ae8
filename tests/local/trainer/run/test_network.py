"""Shared prompts, and logits in turns, against datums one by one: the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fireworks_training.local.model.losses import LOSSES
from fireworks_training.local.model.model import (
    LoraSettings,
    adapter_parameters,
    apply_lora,
    load_model,
)
from fireworks_training.local.trainer.queue.operations import Backward, Datum, Pass
from fireworks_training.local.trainer.run import network as network_module
from fireworks_training.local.trainer.run.graphs import GraphCache
from fireworks_training.local.trainer.run.network import Network
from fireworks_training.local.trainer.run.packing import plan
from fireworks_training.local.trainer.run.passes import ComputedPass, run_backward, run_pass
from tests.local.trainer.trainer_driver import VOCAB

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def rollouts(prompts: Sequence[int], samples: int, seed: int = 0) -> list[Datum]:
    """Datums of prompts of these lengths, with completions of 0 to 6 tokens after the first."""
    random = np.random.default_rng(seed)
    data = []
    for length in prompts:
        prompt = random.integers(0, VOCAB, length)
        for _ in range(samples):
            ids = np.concatenate([prompt, random.integers(0, VOCAB, random.integers(1, 8))])
            active = np.arange(1, len(ids)) >= length
            data.append(
                Datum(
                    ids[:-1],
                    {
                        "target_tokens": ids[1:],
                        "weights": active.astype(np.float32),
                        "logprobs": np.where(active, -4.0, 0.0).astype(np.float32),
                        "advantages": (active * random.normal()).astype(np.float32),
                    },
                )
            )
    order = random.permutation(len(data))
    return [data[place] for place in order]


def passed(
    module: PreTrainedModel, data: list[Datum], loss: str, *, sharing: bool, lora: bool = False
) -> ComputedPass:
    parameters = adapter_parameters(module) if lora else dict(module.named_parameters())
    needed = ("target_tokens", "weights")
    if loss == "cross_entropy":
        data = [Datum(d.tokens, {name: d.inputs[name] for name in needed}) for d in data]
    request = Pass(data, loss, LOSSES[loss].config, backward=True)
    return run_pass(Network(module, sharing=sharing), list(parameters.values()), request)


def assert_equal(shared: ComputedPass, alone: ComputedPass) -> None:
    for a, b in zip(shared.outputs, alone.outputs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], atol=5e-6)
    assert shared.loss == pytest.approx(alone.loss, rel=1e-5, abs=1e-5)
    assert shared.loss_tokens == alone.loss_tokens
    assert shared.gradients is not None
    assert alone.gradients is not None
    for a, b in zip(shared.gradients, alone.gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_separate_datums(model_path: Path, loss: str, lora: bool) -> None:
    module = load_model(model_path)
    if lora:
        apply_lora(module, LoraSettings(rank=4, seed=1))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # at its start B is zero, and A gets no gradient
            for parameter in adapter_parameters(module).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    data = rollouts([9, 9, 12, 5], samples=5)
    shared = passed(module, data, loss, sharing=True, lora=lora)
    assert_equal(shared, passed(module, data, loss, sharing=False, lora=lora))


@pytest.mark.parametrize("kept", [True, False], ids=["graph kept", "computed again"])
def test_a_custom_loss_is_the_same_with_prompts_shared(model_path: Path, kept: bool) -> None:
    module = load_model(model_path)
    data = rollouts([9, 12], samples=4)
    gradients = [np.sin(np.arange(len(datum.tokens))).astype(np.float32) for datum in data]
    results = []
    for sharing in (True, False):
        network, graphs = Network(module, sharing=sharing), GraphCache()
        forward = Pass(data, "cross_entropy", {}, backward=False)
        run_pass(network, list(module.parameters()), forward, graphs if kept else None)
        request = Backward(forward, gradients)
        result, cached = run_backward(network, list(module.parameters()), request, graphs)
        assert (cached > 0) is kept
        results.append(result)
    assert_equal(*results)


def tiny(kind: str) -> PreTrainedModel:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(3)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    elif kind == "mistral":  # a sliding window: prompts can't be shared
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=4))
    elif kind == "gpt2":  # learnt positions
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        )
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "moe"])
def test_other_architectures(kind: str) -> None:
    module = tiny(kind)
    assert Network(module).sharing is (kind != "mistral")
    data = rollouts([6, 9], samples=3)
    shared = passed(module, data, "cross_entropy", sharing=True)
    assert_equal(shared, passed(module, data, "cross_entropy", sharing=False))


def test_a_scaled_head_is_taken_with_its_model() -> None:
    """A model whose logits are not its head's alone: the body and head are not called apart."""

    class Scaled(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            output = super().forward(*args, **kwargs)  # type: ignore[arg-type]
            output.logits = output.logits * 0.5
            return output

    plain = tiny("llama")
    scaled = Scaled(plain.config)
    scaled.load_state_dict(plain.state_dict())
    scaled.eval()
    data = rollouts([6], samples=2)
    halved = passed(scaled, data, "cross_entropy", sharing=False)
    with torch.no_grad():
        logits = scaled(input_ids=torch.from_numpy(data[0].tokens)[None]).logits[0]
    expected = torch.log_softmax(logits, -1)[
        torch.arange(len(logits)), data[0].inputs["target_tokens"]
    ]
    np.testing.assert_allclose(halved.outputs[0]["logprobs"], expected, atol=2e-6)


def test_logits_in_turns(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_model(model_path)
    data = rollouts([9, 4], samples=4)
    whole = passed(module, data, "importance_sampling", sharing=True)
    monkeypatch.setattr(network_module, "LOGITS_BYTES", 4 * VOCAB * 5)
    assert_equal(passed(module, data, "importance_sampling", sharing=True), whole)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_position_without_a_gradient_costs_the_head_its_forward_only(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, lora: bool
) -> None:
    module = load_model(model_path)
    if lora:
        apply_lora(module, LoraSettings(rank=4, seed=1))
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    seen = {True: 0, False: 0}

    def count(_: object, arguments: tuple[torch.Tensor]) -> None:
        seen[torch.is_grad_enabled()] += len(arguments[0])

    data = rollouts([9, 12], samples=3)
    counted = sum(int(datum.inputs["weights"].sum()) for datum in data)
    tokens = sum(len(datum.tokens) for datum in data)
    results = []
    for spared_from, expected in ((1.0, {True: counted, False: tokens - counted}), (0.0, None)):
        monkeypatch.setattr(network_module, "SPARED_FROM", spared_from)
        seen.update({True: 0, False: 0})
        hook = head.register_forward_pre_hook(count)
        results.append(passed(module, data, loss, sharing=False, lora=lora))
        hook.remove()
        seen[False] -= 2  # a Network looks at two tokens when it is made
        assert seen == (expected or {True: tokens, False: 0})
    assert_equal(*results)


def test_a_backward_by_few_gradients(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several targets a position, one of them with a gradient; and a datum with none."""
    module = load_model(model_path)
    random = np.random.default_rng(0)
    data = [
        Datum(
            random.integers(0, VOCAB, 6),
            {"target_tokens": random.integers(0, VOCAB, 18), "weights": np.ones(18, np.float32)},
            width=3,
        )
        for _ in range(3)
    ]
    gradients = [np.zeros(18, np.float32) for _ in data]
    gradients[0][4], gradients[2][17] = 1.5, -0.5
    results = []
    for spared_from in (1.0, 0.0):
        monkeypatch.setattr(network_module, "SPARED_FROM", spared_from)
        request = Backward(Pass(data, "cross_entropy", {}, backward=False), gradients)
        parameters = list(module.parameters())
        results.append(run_backward(Network(module), parameters, request, GraphCache())[0])
    assert_equal(*results)


def test_micro_batches_of_a_split_group(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_model(model_path)
    data = rollouts([9, 9], samples=8)
    whole = passed(module, data, "ppo", sharing=True)
    monkeypatch.setattr(network_module, "ACTIVATION_BYTES", 20 * 8 * 2 * 416)
    budget = Network(module).token_budget
    assert len(plan([datum.tokens for datum in data], budget)) > 2
    assert_equal(passed(module, data, "ppo", sharing=True), whole)


def test_less_is_computed(model_path: Path) -> None:
    """The point of it: tokens that go through the body, counted."""
    module = load_model(model_path)
    counted: list[int] = []
    module.get_decoder().register_forward_pre_hook(  # type: ignore[no-untyped-call]
        lambda _, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    data = rollouts([20, 20], samples=8)
    tokens = {}
    for sharing in (True, False):
        network = Network(module, sharing=sharing)
        counted.clear()
        run_pass(network, list(module.parameters()), Pass(data[:], "ppo", CLIP, backward=False))
        tokens[sharing] = sum(counted)
    assert tokens[True] * 3 < tokens[False]


@pytest.mark.parametrize(
    ("millions", "mebibytes"), [(1, 256), (64, 256), (128, 512), (256, 1024), (9000, 1024)]
)
def test_a_micro_batch_grows_with_the_weights_it_reads(millions: int, mebibytes: int) -> None:
    assert network_module.activation_bytes(millions << 20) == mebibytes << 20


def test_an_adapter_leaves_a_micro_batch_as_large_as_it_was(model_path: Path) -> None:
    module = load_model(model_path)
    before = Network(module).token_budget
    apply_lora(module, LoraSettings(rank=4))
    assert Network(module).token_budget == before
