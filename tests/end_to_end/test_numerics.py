"""The trainer computes what plain torch computes, and computes it again when asked again."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any, cast

import pytest
import tinker
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from fireworks_training import TrainerLost
from tests.conftest import RunningPlatform
from tests.end_to_end.support import (
    ADAM,
    curved_loss,
    datums,
    model_folder,
    part,
    relative,
    saved_state,
    service_on,
    worker_pid,
)

STEPS = 3
MICRO_BATCHES = 2


class Reference:
    """The same training in plain torch: masters in fp32, the forward at their rounded values."""

    def __init__(self, masters: dict[str, torch.Tensor], *, rounding: bool, alpha: int = 0) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
        self.model.eval()
        self.rounding = rounding
        self.alpha = alpha
        self.masters = {name: value.clone().requires_grad_() for name, value in masters.items()}
        self.optimizer = torch.optim.AdamW(
            self.masters.values(),
            lr=ADAM.learning_rate,
            betas=(ADAM.beta1, ADAM.beta2),
            eps=ADAM.eps,
            weight_decay=ADAM.weight_decay,
        )
        self.base = {n: self._round(p.detach()) for n, p in self.model.named_parameters()}

    def _round(self, value: torch.Tensor) -> torch.Tensor:
        return value.bfloat16().float() if self.rounding else value

    def logprobs(self, data: list[tinker.Datum], values: dict[str, torch.Tensor]) -> Any:
        ids = torch.tensor([datum.model_input.to_ints() for datum in data])
        targets = torch.stack([d.loss_fn_inputs["target_tokens"].to_torch() for d in data])
        logits = functional_call(self.model, self._weights(values), (ids,)).logits
        return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].unbind()

    def _weights(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.alpha:
            return values
        weights = dict(self.base)
        for name in [n for n in values if ".lora_A." in n]:
            down, up = values[name], values[name.replace("lora_A", "lora_B")]
            full = next(n for n in weights if n == _full_name(name))
            weights[full] = weights[full] + self.alpha / down.shape[0] * (up @ down)
        return weights

    def gradients(
        self, batches: list[list[tinker.Datum]], masters: dict[str, torch.Tensor]
    ) -> tuple[list[float], dict[str, torch.Tensor]]:
        values = {n: self._round(m.detach()).requires_grad_() for n, m in masters.items()}
        losses: list[float] = []
        for batch in batches:
            loss, _ = curved_loss(batch, list(self.logprobs(batch, values)))
            loss.backward()
            losses.append(float(loss.detach()))
        return losses, {name: cast(torch.Tensor, value.grad) for name, value in values.items()}

    def step(self, batches: list[list[tinker.Datum]]) -> list[float]:
        losses, gradients = self.gradients(batches, self.masters)
        for name, master in self.masters.items():
            master.grad = gradients[name]
        self.optimizer.step()
        return losses


def _full_name(adapter: str) -> str:
    return adapter.replace(".lora_A.weight", ".weight").removeprefix("base_model.model.")


@pytest.mark.parametrize(("rank", "dtype"), [(0, "bfloat16"), (4, "bfloat16"), (0, "float32")])
async def test_three_custom_steps_equal_plain_torch(
    platform: RunningPlatform, rank: int, dtype: Any
) -> None:
    batches = [
        [datums(3, seed=10 * step + micro, spread=1) for micro in range(MICRO_BATCHES)]
        for step in range(STEPS)
    ]
    async with service_on(platform, lora_rank=rank, snapshot_dtype=dtype, seed=3) as service:
        client = await service.create_training_client()
        job = service.trainer_job_id
        assert job is not None
        await client.save_state("start")
        start = part(saved_state(platform, job, "start"), "master")
        reference = Reference(start, rounding=dtype == "bfloat16", alpha=32 if rank else 0)
        previous = start
        first_moment = {name: torch.zeros_like(value) for name, value in start.items()}
        for index, step in enumerate(batches):
            results = [client.forward_backward_custom(batch, curved_loss) for batch in step]
            optim = client.optim_step(ADAM)
            losses = [(await result).metrics["loss"] for result in results]
            await optim
            await client.save_state(f"after-{index}")
            state = saved_state(platform, job, f"after-{index}")
            assert losses == pytest.approx(reference.step(step), rel=1e-5)
            # Gradients at the trainer's own last masters: of a last-bit difference between two
            # masters the rounding to bf16 makes, now and then, one of 2^-8.
            _, wanted = reference.gradients(step, previous)
            moment = part(state, "exp_avg")
            gradients = {
                n: (moment[n] - ADAM.beta1 * first_moment[n]) / (1 - ADAM.beta1) for n in moment
            }
            first_moment, previous = moment, part(state, "master")
            assert relative(gradients, wanted) < 1e-5
            masters = {name: value.detach() for name, value in reference.masters.items()}
            assert relative(previous, masters) < 1e-5


async def _train(client: Any, steps: range) -> list[float]:
    losses: list[float] = []
    for step in steps:
        result = client.forward_backward(datums(4, seed=step), "cross_entropy")
        await client.optim_step(ADAM)
        losses.append((await result).metrics["loss:sum"])
    return losses


@pytest.mark.parametrize("rank", [0, 4])
async def test_two_runs_with_one_seed_are_equal_bit_for_bit(
    platform: RunningPlatform, rank: int
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        async with service_on(platform, lora_rank=rank, seed=5) as service:
            client = await service.create_training_client()
            await _train(client, range(4))
            await client.save_state("end")
            states.append(saved_state(platform, service.trainer_job_id or "", "end"))
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.extension("ModelLost")
@pytest.mark.parametrize("rank", [0, 4])
async def test_training_goes_on_bit_for_bit_after_a_kill(
    platform: RunningPlatform, rank: int
) -> None:
    async with service_on(platform, lora_rank=rank, seed=5) as service:
        client = await service.create_training_client()
        await _train(client, range(10))
        await client.save_state("whole")
        whole = saved_state(platform, service.trainer_job_id or "", "whole")

    first = service_on(platform, lora_rank=rank, seed=5, cleanup_trainer_on_close=False)
    client = await first.create_training_client()
    job = first.trainer_job_id or ""
    await _train(client, range(5))
    await client.save_state("half")
    open_operations = [
        client.forward_backward(datums(40, seed=index), "cross_entropy") for index in range(50)
    ]
    os.kill(worker_pid(platform, job), signal.SIGKILL)
    # At once; where a router only finds the name gone, once the job's state has confirmed it.
    soon = 20.0 if platform.as_cloud else 1.0
    done, late = await asyncio.wait(
        [asyncio.ensure_future(future.result_async()) for future in open_operations], timeout=soon
    )
    assert not late
    failures = [task.exception() for task in done]
    assert any(isinstance(failure, TrainerLost) for failure in failures)
    lost = next(failure for failure in failures if isinstance(failure, TrainerLost))
    assert lost.last_saved_state == "half"
    assert all(failure is None or isinstance(failure, TrainerLost) for failure in failures)
    await first.close()

    async with service_on(platform, lora_rank=rank, seed=5, trainer_job_id=job) as second:
        client = await second.create_training_client()
        await client.load_state_with_optimizer("half")
        await _train(client, range(5, 10))
        await client.save_state("whole")
        resumed = saved_state(platform, job, "whole")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
