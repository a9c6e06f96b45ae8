"""Each loss against a loop over tokens, and its gradient against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch

from fireworks_training.local.losses import LOSSES, target_logprobs

M = 24
Reference = Callable[[float, Mapping[str, float], Mapping[str, float]], float]


def cross_entropy(logprob: float, token: Mapping[str, float], config: Mapping[str, float]) -> float:
    return -token["weights"] * logprob


def importance_sampling(
    logprob: float, token: Mapping[str, float], config: Mapping[str, float]
) -> float:
    ratio = math.exp(logprob - token["logprobs"])
    return -token["weights"] * ratio * token["advantages"]


def ppo(logprob: float, token: Mapping[str, float], config: Mapping[str, float]) -> float:
    ratio = math.exp(logprob - token["logprobs"])
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    clipped = low if ratio < low else high if ratio > high else ratio
    better = min(ratio * token["advantages"], clipped * token["advantages"])
    return -token["weights"] * better


REFERENCES: dict[str, Reference] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
}


def tokens(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    logprobs = -3 * torch.rand(M, generator=generator, dtype=torch.float64)
    inputs = {
        "weights": torch.rand(M, generator=generator, dtype=torch.float64),
        "logprobs": logprobs + 0.5 * torch.randn(M, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(M, generator=generator, dtype=torch.float64),
    }
    inputs["weights"][:3] = 0.0
    inputs["advantages"][3:5] = 0.0
    return logprobs, {key: inputs[key] for key in ("weights", *LOSSES[name].required)}


def summed(name: str, logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = LOSSES[name]
    return loss.per_token(logprobs, inputs, loss.config).sum()


def test_every_loss_has_a_reference() -> None:
    assert REFERENCES.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_sum_of_a_loop_over_tokens(name: str) -> None:
    logprobs, inputs = tokens(name)
    wanted = sum(
        REFERENCES[name](
            logprobs[t].item(),
            {key: values[t].item() for key, values in inputs.items()},
            LOSSES[name].config,
        )
        for t in range(M)
    )
    assert summed(name, logprobs, inputs).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_its_gradient_is_that_of_finite_differences(name: str) -> None:
    logprobs, inputs = tokens(name)
    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(summed(name, leaf, inputs), leaf)
    step = 1e-6
    for t in range(M):
        nudge = torch.zeros(M, dtype=torch.float64)
        nudge[t] = step
        above, below = (summed(name, logprobs + s * nudge, inputs).item() for s in (1, -1))
        assert gradient[t].item() == pytest.approx((above - below) / (2 * step), abs=1e-7)
    assert gradient.abs().max() > 0


def test_ppo_stops_the_gradient_beyond_its_bounds() -> None:
    ratios = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    sampled = torch.full((6,), -1.0)
    leaf = (sampled + ratios.log()).requires_grad_()
    inputs = {"weights": torch.ones(6), "logprobs": sampled, "advantages": advantages}
    (gradient,) = torch.autograd.grad(summed("ppo", leaf, inputs), leaf)
    assert (gradient != 0).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", ["importance_sampling", "ppo"])
@pytest.mark.parametrize("muted", ["weights", "advantages"])
def test_a_token_without_a_say_may_have_any_sampling_logprob(name: str, muted: str) -> None:
    leaf = torch.tensor([-1.0, -1.0], requires_grad=True)
    inputs = {
        "weights": torch.ones(2),
        "advantages": torch.ones(2),
        "logprobs": torch.tensor([-1.0, -1e30]),
    }
    assert not torch.isfinite(summed(name, leaf, inputs)) or name == "ppo"
    inputs[muted] = torch.tensor([1.0, 0.0])
    loss = summed(name, leaf, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == -1.0
    assert gradient.tolist() == [-1.0, 0.0]


def test_target_logprobs_are_a_log_softmax() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 6, 3, 3, 1])
    wanted = torch.log_softmax(logits, -1)[torch.arange(5), targets]
    torch.testing.assert_close(target_logprobs(logits, targets), wanted)
