"""The trainer's numbers over HTTP against a plain torch loop with the same rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fireworks_training.local.model.losses import target_logprobs
from fireworks_training.local.model.model import (
    LoraSettings,
    SnapshotDtype,
    adapter_parameters,
    apply_lora,
    load_model,
    load_snapshot_,
    parameter_tensors,
    round_parameters_,
)
from fireworks_training.local.store.snapshots import SnapshotStore
from fireworks_training.local.trainer.run.states import StateStore
from tests.local.trainer.trainer_driver import (
    ADAM,
    Starter,
    Trainer,
    cross_entropy,
    datum,
    some_data,
)

LORA = {"rank": 4, "alpha": 8.0, "seed": 3}
SETTINGS = {**ADAM, "learning_rate": 1e-3, "weight_decay": 0.01, "grad_clip_norm": 0.5}


class PlainTorch:
    """Three lines of torch a step: round, backward, AdamW. Datums one by one, without padding."""

    def __init__(self, path: Path, dtype: SnapshotDtype, lora: dict[str, Any] | None) -> None:
        self.dtype = dtype
        self.module = load_model(path)
        parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        if lora is not None:
            round_parameters_(self.module, dtype)
            apply_lora(self.module, LoraSettings(**lora))
            parameters = adapter_parameters(self.module)
        self.parameters = parameters
        self.masters = {name: p.detach().clone() for name, p in parameters.items()}
        self.adam = torch.optim.AdamW(
            list(self.masters.values()),
            lr=SETTINGS["learning_rate"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["eps"],
            weight_decay=SETTINGS["weight_decay"],
        )

    def loss(self, data: list[dict[str, Any]]) -> torch.Tensor:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                master = self.masters[name]
                parameter.copy_(master if self.dtype == "float32" else master.bfloat16().float())
        total = torch.zeros(())
        for entry in data:
            ids = torch.tensor(entry["model_input"]["chunks"][0]["tokens"])
            inputs = {k: torch.tensor(v["data"]) for k, v in entry["loss_fn_inputs"].items()}
            logits = self.module(input_ids=ids[None], use_cache=False).logits[0]
            logprobs = target_logprobs(logits, inputs["target_tokens"])
            total = total - (inputs["weights"] * logprobs).sum()
        return total

    def step(self) -> float:
        for name, parameter in self.parameters.items():
            self.masters[name].grad = parameter.grad
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters.values(), SETTINGS["grad_clip_norm"])
        self.adam.step()
        return norm.item()


async def state_of(trainer: Trainer, folder: Path, name: str) -> dict[str, torch.Tensor]:
    await trainer.ok("save_weights", path=name)
    return StateStore(folder / "jobs" / "job-1" / "states").load(name)[1]


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative to the whole tensor: Adam moves an entry by the sign of a gradient however tiny."""
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("lora", [None, LORA])
async def test_three_steps_equal_plain_torch(
    start: Starter,
    tmp_path: Path,
    model_path: Path,
    dtype: SnapshotDtype,
    lora: dict[str, Any] | None,
) -> None:
    trainer = await start(lora=lora, snapshot_dtype=dtype)
    plain = PlainTorch(model_path, dtype, lora)
    for step in range(3):
        for micro_batch in range(2):
            data = some_data(seed=10 * step + micro_batch)
            passed = await trainer.ok("forward_backward", **cross_entropy(*data))
            loss = plain.loss(data)
            loss.backward()
            assert passed["metrics"]["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
        stepped = await trainer.ok("optim_step", adam_params=SETTINGS)
        assert stepped["metrics"]["grad_norm"] == pytest.approx(plain.step(), rel=1e-5)
        state = await state_of(trainer, tmp_path, f"step-{step}")
        for name, master in plain.masters.items():
            assert distance(state[f"master.{name}"], master) <= 1e-5, name
            # The first moment is a sum of the gradients, so it compares those too.
            moment = plain.adam.state[master]["exp_avg"]
            assert moment.norm() == 0 or distance(state[f"exp_avg.{name}"], moment) <= 1e-5, name


async def test_rounding_is_seen(model_path: Path) -> None:
    """Negative control: without the rounding the reference is farther away than the tolerance."""
    data = some_data()
    losses = []
    for dtype in ("bfloat16", "float32"):
        plain = PlainTorch(model_path, dtype, None)
        plain.loss(data).backward()
        plain.step()
        losses.append(plain.loss(data).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


async def run_of(trainer: Trainer, steps: int, first: int = 0) -> list[dict[str, Any]]:
    answers = []
    for step in range(first, first + steps):
        for micro_batch in range(2):
            data = some_data(seed=10 * step + micro_batch)
            answers.append(await trainer.ok("forward_backward", **cross_entropy(*data)))
        answers.append(await trainer.ok("optim_step", adam_params=SETTINGS))
    return answers


@pytest.mark.parametrize("lora", [None, LORA])
async def test_two_runs_are_equal_bit_for_bit(
    start: Starter, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    runs, ends = [], []
    for _ in range(2):
        trainer = await start(lora=lora)
        runs.append(await run_of(trainer, 3))
        ends.append(await state_of(trainer, tmp_path, "end"))
    assert runs[0] == runs[1]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("lora", [None, LORA])
async def test_resumed_in_a_new_process_it_goes_on_bit_for_bit(
    start: Starter, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    straight = await start(lora=lora)
    whole = await run_of(straight, 4)
    first = await start(lora=lora)
    head = await run_of(first, 2)
    await first.ok("save_weights", path="half")
    second = await start(lora=lora)
    await second.ok("load_weights", path="half", optimizer=True)
    tail = await run_of(second, 2, first=2)
    assert head + tail == whole
    ends = [await state_of(trainer, tmp_path, "end") for trainer in (straight, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    third = await start(lora=lora)
    await third.ok("load_weights", path="half", optimizer=False)
    assert await run_of(third, 2, first=2) != tail, "without the moments it is another run"


def logprobs_of(answer: dict[str, Any]) -> list[list[float]]:
    return [output["logprobs"]["data"] for output in answer["loss_fn_outputs"]]


async def test_padding_and_company_do_not_change_a_datum(start: Starter) -> None:
    trainer = await start()
    data = some_data(count=5)
    together = logprobs_of(await trainer.ok("forward", **cross_entropy(*data, backward=False)))
    for entry, logprobs in zip(data, together, strict=True):
        alone = await trainer.ok("forward", **cross_entropy(entry, backward=False))
        np.testing.assert_allclose(logprobs_of(alone)[0], logprobs, atol=2e-6)


async def test_micro_batches_add_up(
    start: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for budget in (64 << 20, 8 * 2 * 416 * 12):
        monkeypatch.setattr("fireworks_training.local.trainer.run.network.ACTIVATION_BYTES", budget)
        trainer = await start()
        passed = await trainer.ok("forward_backward", **cross_entropy(*some_data(count=6)))
        stepped = await trainer.ok("optim_step", adam_params=ADAM)
        ends.append((passed, stepped["metrics"]["grad_norm"]))
    (whole, norm), (split, split_norm) = ends
    for a, b in zip(logprobs_of(whole), logprobs_of(split), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert split["metrics"] == pytest.approx(whole["metrics"], rel=1e-6)
    assert split_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("normalization", ["none", "num_loss_tokens", "num_sequences"])
async def test_normalisation_of_accumulated_gradients(start: Starter, normalization: str) -> None:
    trainer = await start()
    data = some_data(count=3)
    norms = []
    for key in (normalization, None):
        for entry in data:
            await trainer.ok("forward_backward", **cross_entropy(entry))
        fields = {"grad_accumulation_normalization": key} if key else {}
        # A learning rate of 0 leaves the weights, so that both norms are of the same gradient.
        adam = {"learning_rate": 0.0}
        answer = await trainer.ok("optim_step", adam_params=adam, **fields)
        norms.append(answer["metrics"]["grad_norm"])
    weights = [w for d in data for w in d["loss_fn_inputs"]["weights"]["data"]]
    divisor = {"none": 1, "num_loss_tokens": np.count_nonzero(weights), "num_sequences": 3}
    assert norms[0] * divisor[normalization] == pytest.approx(norms[1], rel=1e-5)


async def test_custom_loss_weights_double_the_gradient(start: Starter) -> None:
    trainer = await start()
    norms = []
    for factor in (1.0, 2.0):
        entry = datum([1, 2, 3], [2, 3, 4], weights=[0.5 * factor, -0.25 * factor, factor])
        await trainer.ok("forward_backward", **cross_entropy(entry))
        answer = await trainer.ok("optim_step", adam_params={"learning_rate": 0.0})
        norms.append(answer["metrics"]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
async def test_a_snapshot_serves_the_trainers_numbers(
    start: Starter, tmp_path: Path, model_path: Path, lora: dict[str, Any] | None
) -> None:
    trainer = await start(lora=lora)
    await run_of(trainer, 2)
    saved = await trainer.ok("save_weights_for_sampler", path="s", checkpoint_type="base")
    entry = some_data(count=1)[0]
    answer = await trainer.ok("forward", **cross_entropy(entry, backward=False))

    engine = load_model(model_path)
    round_parameters_(engine, "bfloat16")
    base = {name: tensor.clone() for name, tensor in parameter_tensors(engine).items()}
    ids = torch.tensor(entry["model_input"]["chunks"][0]["tokens"])
    targets = torch.tensor(entry["loss_fn_inputs"]["target_tokens"]["data"])

    def served() -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return target_logprobs(engine(input_ids=ids[None]).logits[0], targets).numpy()

    trained = np.array(logprobs_of(answer)[0])
    assert np.abs(served() - trained).max() > 1e-2, "the base model is another one"
    manifest, tensors = SnapshotStore(tmp_path / "snapshots").load("s")
    load_snapshot_(engine, manifest, tensors, base)
    assert np.abs(served() - trained).max() < 1e-5
    assert set(saved["snapshot"].pop("timings")) <= {"hash", "compress", "write"}
    assert saved["snapshot"] == {
        "identity": "s",
        "kind": "lora" if lora else "base",
        "predecessor": None,
        "bytes": manifest.bytes,
        "sha256": manifest.sha256,
    }
