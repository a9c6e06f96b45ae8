"""Models are computed on one device: no tensor of a pass is made on another.

There is no second device on most machines. A fake one stands in: tensors without numbers, which
refuse to be mixed with the CPU's. What needs numbers (sampling, checks for NaN) is held by a look
at the source instead.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from transformers import Qwen3ForCausalLM

import fireworks_training.local
from fireworks_training.local.engine import lanes as engine_lanes
from fireworks_training.local.engine.attention import ForwardPass, PromptPiece
from fireworks_training.local.engine.decoder import Decoder
from fireworks_training.local.engine.lanes import Lane, LaneKind
from fireworks_training.local.engine.prompts import Prompt
from fireworks_training.local.model import devices
from fireworks_training.local.model.losses import LOSSES
from fireworks_training.local.model.model import LoraSettings, adapter_parameters, apply_lora
from fireworks_training.local.trainer.queue.operations import Datum
from fireworks_training.local.trainer.run import network as trainer_network
from fireworks_training.local.trainer.run import passes
from fireworks_training.local.trainer.run.network import Network
from fireworks_training.local.trainer.run.packing import plan
from tests.local.engine.tiny_model import tiny_qwen3

ELSEWHERE = torch.device("meta")
ROOT = Path(fireworks_training.local.__file__).parent


def test_the_device_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.chosen() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.chosen() == torch.device("cpu")


def test_arrays_go_there_and_back() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = devices.on(torch.device("cpu"), array)
    assert np.shares_memory(devices.array_of(tensor), array)
    assert devices.on(ELSEWHERE, array).device == ELSEWHERE
    grown = torch.nn.Parameter(torch.ones(2)) * 2
    assert devices.array_of(grown).tolist() == [2.0, 2.0]


# -- with a second device --------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Qwen3ForCausalLM]:
    """A model on the other device."""
    # Two looks at numbers, which there are none of.
    monkeypatch.setattr(torch, "equal", lambda one, other: one.shape == other.shape)
    monkeypatch.setattr(Decoder, "_check", lambda *_: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(ELSEWHERE):
            model = tiny_qwen3()
        yield model


def some_data() -> list[Datum]:
    """Datums that share prompts, and one that stands alone."""
    random = np.random.default_rng(0)
    heads = [random.integers(4, 300, 40) for _ in range(2)]
    rows = [np.concatenate([h, random.integers(4, 300, 3 + i)]) for h in heads for i in range(3)]
    rows.append(random.integers(4, 300, 9))
    made = []
    for ids in rows:
        ones = np.ones(len(ids) - 1, np.float32)
        inputs = {"target_tokens": ids[1:], "weights": ones, "logprobs": -ones, "advantages": ones}
        made.append(Datum(ids[:-1], inputs))
    return made


def train(model: Qwen3ForCausalLM, parameters: list[torch.nn.Parameter]) -> None:
    """A forward and a backward pass, with every loss."""
    network, data = Network(model), some_data()
    (batch,) = plan([datum.tokens for datum in data], network.token_budget)
    assert batch.buckets, "prompts are to be shared"
    data = [data[index] for index in trainer_network.datums_of(batch)]
    targets: Any = [datum.inputs["target_tokens"] for datum in data]
    for name, loss in LOSSES.items():
        if name == "gspo":
            continue  # counts its sequences by a look at numbers
        inputs = passes._concatenated(data, network.device)
        computed = network.compute(batch)
        network.top(computed, 2)
        logprobs_M = network.logprobs(computed, targets)
        total = loss.per_token(logprobs_M, inputs, loss.config).sum()
        torch.autograd.backward(total, inputs=parameters)
        assert all(p.grad is not None and p.grad.device == ELSEWHERE for p in parameters)
        for parameter in parameters:
            parameter.grad = None


def decode(model: Qwen3ForCausalLM, *, fuse: bool) -> None:
    """Prompts read in two pieces, then a step of shared rows and of single ones."""
    decoder = Decoder(model, 128, fuse=fuse)
    assert decoder.fused == fuse
    with torch.inference_mode():
        prompts = [Prompt(tuple(range(4, 4 + n)), decoder.geometry) for n in (20, 30, 7)]
        for end in (5, 1 << 10):
            pieces = [PromptPiece(prompt, min(end, len(prompt.tokens))) for prompt in prompts]
            ids = np.concatenate([np.array(piece.tokens) for piece in pieces])
            hidden = decoder.hidden(
                devices.on(ELSEWHERE, ids), devices.on(ELSEWHERE, ids), ForwardPass([], pieces)
            )
            for piece in pieces:
                piece.prompt.done = piece.end
        lanes = []
        for shared in (True, False):
            lane = Lane(LaneKind.of(len(prompts[1].tokens), 8, shared=shared), decoder.geometry)
            for slot, prompt in enumerate(prompts):
                lane.join(prompt, [2 * slot, 2 * slot + 1], [40, 40])
            lanes.append(lane)
        for _ in range(2 * engine_lanes._AHEAD + 2):  # until columns are laid out anew
            ids = np.arange(12)
            hidden = decoder.hidden(
                devices.on(ELSEWHERE, ids), devices.on(ELSEWHERE, ids), ForwardPass(lanes, [])
            )
            assert decoder.logits(hidden).device == ELSEWHERE
            lanes[0].leave({3})
            lanes[0].join(prompts[1], [3], [40])


def on_the_cpu(device: torch.device, array: Any) -> torch.Tensor:
    """`on`, if it were forgotten."""
    del device
    return torch.from_numpy(array)


def test_training_stays_on_the_models_device(
    elsewhere: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(elsewhere, list(elsewhere.parameters()))
    for module in (trainer_network, passes):
        with monkeypatch.context() as forgetting:
            forgetting.setattr(module, "on", on_the_cpu)
            with pytest.raises(FakeTensorDeviceMismatchError):
                train(elsewhere, list(elsewhere.parameters()))


def test_so_does_an_adapter(elsewhere: Qwen3ForCausalLM) -> None:
    with torch.device(ELSEWHERE):  # peft makes an adapter where its layer is
        apply_lora(elsewhere, LoraSettings(rank=2))
    train(elsewhere, list(adapter_parameters(elsewhere).values()))


@pytest.mark.parametrize("fuse", [True, False])
def test_decoding_stays_on_the_models_device(
    elsewhere: Qwen3ForCausalLM, monkeypatch: pytest.MonkeyPatch, fuse: bool
) -> None:
    decode(elsewhere, fuse=fuse)
    monkeypatch.setattr(engine_lanes, "zeros", lambda *shape, device: torch.zeros(shape))
    with pytest.raises(FakeTensorDeviceMismatchError):
        decode(elsewhere, fuse=fuse)


# -- by the source ---------------------------------------------------------------------------------

FACTORIES = {"zeros", "empty", "ones", "full", "arange", "tensor", "eye", "rand", "randn"}
PATHS = ["engine", "trainer", "model/losses.py", "model/optimizer.py", "model/model.py"]


def forgotten(source: str) -> list[int]:
    """Lines that make a tensor without saying where, or that read one where it lies."""
    lines = list[int]()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        given = {keyword.arg for keyword in node.keywords}
        if of_torch and node.func.attr in FACTORIES and "device" not in given:
            lines.append(node.lineno)
        if node.func.attr == "numpy" or (of_torch and node.func.attr == "from_numpy"):
            lines.append(node.lineno)
    return lines


def test_no_tensor_is_made_without_a_device() -> None:
    files = [file for path in PATHS for file in sorted((ROOT / path).rglob("*.py"))]
    files += [ROOT / path for path in PATHS if path.endswith(".py")]
    assert len(files) > 20
    found = {file.name: lines for file in files if (lines := forgotten(file.read_text()))}
    assert not found
    source = "torch.zeros(3)\ntorch.zeros(3, device=d)\nx.numpy()\ntorch.from_numpy(a)\n"
    assert forgotten(source) == [1, 3, 4]  # the look sees what it looks for
