"""Each loss against a loop over tokens, and its gradient against finite differences.

A reference takes the logprobs twice: those that gradients flow through, and the same ones frozen,
for what a loss holds constant. Finite differences move the first alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from fireworks_training.local.model import losses
from fireworks_training.local.model.losses import LOSSES, target_logprobs

M = 24
SEQUENCE = [0] * 5 + [1] * 12 + [2] * 7
Token = dict[str, float]
Config = dict[str, float]
Reference = Callable[[Sequence[float], Sequence[float], Sequence[Token], Config], float]


def clip(value: float, config: Config) -> float:
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    return low if value < low else high if value > high else value


def cross_entropy(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        total -= token["weights"] * live[t]
    return total


def importance_sampling(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        total -= token["weights"] * math.exp(live[t] - token["logprobs"]) * token["advantages"]
    return total


def ppo(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        ratio, a = math.exp(live[t] - token["logprobs"]), token["advantages"]
        total -= token["weights"] * min(ratio * a, clip(ratio, config) * a)
    return total


def cispo(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        bounded = clip(math.exp(frozen[t] - token["logprobs"]), config)
        total -= token["weights"] * bounded * live[t] * token["advantages"]
    return total


def gspo(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for s in sorted(set(SEQUENCE)):
        members = [t for t in range(M) if SEQUENCE[t] == s]
        weighted = sum(tokens[t]["weights"] * (frozen[t] - tokens[t]["logprobs"]) for t in members)
        mean = weighted / sum(tokens[t]["weights"] for t in members)
        for t in members:
            ratio = math.exp(mean) * math.exp(live[t] - frozen[t])
            a = tokens[t]["advantages"]
            total -= tokens[t]["weights"] * min(ratio * a, clip(ratio, config) * a)
    return total


def dppo(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        moved, a = math.exp(frozen[t]) - math.exp(token["logprobs"]), token["advantages"]
        if (a > 0 and moved > config["delta_high"]) or (a < 0 and -moved > config["delta_low"]):
            continue
        total -= token["weights"] * math.exp(live[t] - token["logprobs"]) * a
    return total


def dro(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        penalty = config["beta"] / 2 * (live[t] - token["logprobs"]) ** 2
        total -= token["weights"] * (live[t] * token["advantages"] - penalty)
    return total


def reinforce(
    live: Sequence[float], frozen: Sequence[float], tokens: Sequence[Token], config: Config
) -> float:
    total = 0.0
    for t, token in enumerate(tokens):
        total -= token["weights"] * live[t] * token["advantages"]
    return total


REFERENCES: dict[str, Reference] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
    "cispo": cispo,
    "gspo": gspo,
    "dppo": dppo,
    "dro": dro,
    "reinforce": reinforce,
}


def some_tokens(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    logprobs = -3 * torch.rand(M, generator=generator, dtype=torch.float64)
    inputs = {
        "weights": torch.rand(M, generator=generator, dtype=torch.float64),
        "logprobs": logprobs + 0.5 * torch.randn(M, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(M, generator=generator, dtype=torch.float64),
    }
    # Sequences whose ratios lie below, above and within the bounds.
    inputs["logprobs"] += torch.tensor([0.7, -0.7, 0.0], dtype=torch.float64)[SEQUENCE]
    inputs["weights"][:3] = 0.0
    inputs["advantages"][3:5] = 0.0
    inputs = {key: inputs[key] for key in ("weights", *LOSSES[name].required)}
    return logprobs, {**inputs, "sequence": torch.tensor(SEQUENCE)}


def rows(inputs: dict[str, torch.Tensor]) -> list[Token]:
    return [{key: float(values[t]) for key, values in inputs.items()} for t in range(M)]


def summed(name: str, logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = LOSSES[name]
    return loss.per_token(logprobs, inputs, loss.config).sum()


def test_every_loss_has_a_reference() -> None:
    assert REFERENCES.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_sum_of_a_loop_over_tokens(name: str) -> None:
    logprobs, inputs = some_tokens(name)
    now = logprobs.tolist()
    wanted = REFERENCES[name](now, now, rows(inputs), dict(LOSSES[name].config))
    assert summed(name, logprobs, inputs).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_its_gradient_is_that_of_finite_differences(name: str) -> None:
    logprobs, inputs = some_tokens(name)
    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(summed(name, leaf, inputs), leaf)
    now, tokens, config, step = logprobs.tolist(), rows(inputs), dict(LOSSES[name].config), 1e-6
    for t in range(M):
        above, below = (
            REFERENCES[name]([*now[:t], now[t] + s * step, *now[t + 1 :]], now, tokens, config)
            for s in (1, -1)
        )
        assert gradient[t].item() == pytest.approx((above - below) / (2 * step), abs=1e-7)
    assert gradient.abs().max() > 0


def test_a_bound_is_met_by_some_token_of_the_data() -> None:
    """Else the references would not tell a loss with bounds from one without."""
    for name in ("ppo", "cispo", "gspo", "dppo"):
        logprobs, inputs = some_tokens(name)
        narrow = summed(name, logprobs, inputs)
        loss = LOSSES[name]
        wide = dict.fromkeys(loss.config, 1e9) | {"clip_low_threshold": 0.0}
        assert loss.per_token(logprobs, inputs, wide).sum() != narrow, name


def test_gspo_is_one_ratio_a_sequence() -> None:
    sampled = torch.zeros(4)
    leaf = torch.tensor([0.1, -0.1, 0.3, 0.1], requires_grad=True)
    inputs = {
        "weights": torch.ones(4),
        "logprobs": sampled,
        "advantages": torch.ones(4),
        "sequence": torch.tensor([0, 0, 1, 1]),
    }
    (gradient,) = torch.autograd.grad(summed("gspo", leaf, inputs), leaf)
    # The second sequence's ratio, exp(0.2), is above 1.2; the first one's is 1.
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1.0, 0.0, 0.0]))


def test_gspo_of_a_sequence_without_weights_is_zero() -> None:
    inputs = {
        "weights": torch.tensor([0.0, 0.0, 1.0]),
        "logprobs": torch.tensor([-1e30, -1e30, -1.0]),
        "advantages": torch.ones(3),
        "sequence": torch.tensor([0, 0, 1]),
    }
    assert summed("gspo", torch.full((3,), -1.0), inputs).item() == -1.0


def test_dppo_lets_a_rare_token_move_by_a_large_factor() -> None:
    live, sampled = math.log(0.05), math.log(0.001)
    inputs = {
        "weights": torch.ones(2),
        "logprobs": torch.tensor([sampled, math.log(0.3)]),
        "advantages": torch.ones(2),
    }
    leaf = torch.tensor([live, math.log(0.6)], requires_grad=True)
    (gradient,) = torch.autograd.grad(summed("dppo", leaf, inputs), leaf)
    assert gradient[0].item() == pytest.approx(-50.0, rel=1e-4)
    assert gradient[1].item() == 0.0


def test_ppo_stops_the_gradient_beyond_its_bounds() -> None:
    ratios = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    sampled = torch.full((6,), -1.0)
    leaf = (sampled + ratios.log()).requires_grad_()
    inputs = {"weights": torch.ones(6), "logprobs": sampled, "advantages": advantages}
    (gradient,) = torch.autograd.grad(summed("ppo", leaf, inputs), leaf)
    assert (gradient != 0).tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dppo"])
@pytest.mark.parametrize("muted", ["weights", "advantages"])
def test_a_token_without_a_say_may_have_any_sampling_logprob(name: str, muted: str) -> None:
    leaf = torch.tensor([-1.0, -1.0], requires_grad=True)
    inputs = {
        "weights": torch.ones(2),
        "advantages": torch.ones(2),
        "logprobs": torch.tensor([-1.0, -1e30]),
    }
    both = summed(name, leaf, inputs)
    assert not torch.isfinite(both) or name != "importance_sampling"
    inputs[muted] = torch.tensor([1.0, 0.0])
    loss = summed(name, leaf, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == (1.0 if name == "cispo" else -1.0)
    assert gradient.tolist() == [-1.0, 0.0]


def naive(name: str, live: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula as it is printed; right where nothing is rejected, infinite or masked."""
    r, a, w = torch.exp(live - inputs["logprobs"]), inputs["advantages"], inputs["weights"]
    if name == "dppo":
        moved = torch.exp(live.detach()) - torch.exp(inputs["logprobs"])
        kept = ~((a > 0) & (moved > 0.2) | (a < 0) & (-moved > 0.2))
        return (-w * r * a * kept).sum()
    if name == "gspo":
        mean = (w * (live.detach() - inputs["logprobs"])).sum() / w.sum()
        r = torch.exp(mean) * torch.exp(live - live.detach())
    if name == "cispo":
        return (-w * r.detach().clamp(0.8, 1.2) * live * a).sum()
    return (-w * torch.minimum(r * a, r.clamp(0.8, 1.2) * a)).sum()


@pytest.mark.parametrize("exponent", [80.0, 90.0, 110.0, 9999.0])
@pytest.mark.parametrize("name", ["ppo", "dppo", "cispo", "gspo"])
def test_one_token_with_a_huge_ratio_leaves_the_others_right(name: str, exponent: float) -> None:
    """In float32, where e^90 is infinite: the bounds reject or hold the token."""
    generator = torch.Generator().manual_seed(1)
    sampled = -torch.rand(6, generator=generator)
    leaf = (sampled + 0.1 * torch.randn(6, generator=generator)).requires_grad_()
    sampled[2] = leaf.detach()[2] - exponent
    weights, sequence = torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])
    inputs = {"weights": weights, "logprobs": sampled, "advantages": torch.ones(6)}
    loss = summed(name, leaf, {**inputs, "sequence": sequence})
    (gradient,) = torch.autograd.grad(loss, leaf)
    rest = [3, 4, 5] if name == "gspo" else [0, 1, 3, 4, 5]
    others = leaf.detach()[rest].requires_grad_()
    plain = naive(name, others, {key: value[rest] for key, value in inputs.items()})
    (wanted,) = torch.autograd.grad(plain, others)
    torch.testing.assert_close(gradient[rest], wanted)
    held = {"ppo": -1.2, "dppo": 0.0, "cispo": -1.2 * leaf[2].item(), "gspo": -3.6}[name]
    assert loss.item() == pytest.approx(plain.item() + held, rel=1e-5)
    assert gradient[2].item() == pytest.approx(-1.2 if name == "cispo" else 0.0)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_a_ratio_that_no_bound_rejects_has_its_own_value(name: str) -> None:
    """A < 0 has no upper bound: e^12 counts in full, and what float32 can't hold is infinite."""
    for exponent in (12.0, 90.0):
        leaf = torch.tensor([-1.0, -1.0], requires_grad=True)
        inputs = {
            "weights": torch.ones(2),
            "logprobs": torch.full((2,), -1.0 - exponent),
            "advantages": -torch.ones(2),
            "sequence": torch.zeros(2, dtype=torch.int64),
        }
        loss = summed(name, leaf, inputs)
        if exponent == 12.0:
            assert loss.item() == pytest.approx(2 * math.exp(12.0), rel=1e-5)
        else:
            assert loss.item() == math.inf


def test_importance_sampling_is_infinite_unless_it_is_capped() -> None:
    leaf = torch.tensor([-1.0, -1.0], requires_grad=True)
    inputs = {
        "weights": torch.ones(2),
        "logprobs": torch.tensor([-1.0, -101.0]),
        "advantages": torch.ones(2),
    }
    assert summed("importance_sampling", leaf, inputs).item() == -math.inf
    capped = LOSSES["importance_sampling"].per_token(leaf, inputs, {"ratio_log_cap": 20.0}).sum()
    assert capped.item() == pytest.approx(-1.0 - math.exp(20.0), rel=1e-5)
    assert torch.autograd.grad(capped, leaf)[0].tolist() == [-1.0, 0.0]


def test_target_logprobs_are_a_log_softmax() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 6, 3, 3, 1])
    wanted = torch.log_softmax(logits, -1)[torch.arange(5), targets]
    torch.testing.assert_close(target_logprobs(logits, targets), wanted)


def test_a_row_may_have_many_targets() -> None:
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    targets, positions = torch.tensor([0, 6, 3, 3]), torch.tensor([0, 0, 1, 1])
    wanted = torch.log_softmax(logits, -1)[positions, targets]
    torch.testing.assert_close(target_logprobs(logits, targets, positions), wanted)


@pytest.mark.parametrize("at_once", [1, 14, 1 << 18])
def test_the_gradient_of_target_logprobs(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows with no target, one and several, one of them twice; in pieces or not."""
    monkeypatch.setattr(losses, "_AT_ONCE", at_once)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    targets, positions = torch.tensor([0, 6, 3, 3, 1]), torch.tensor([4, 0, 1, 1, 1])
    weights = torch.tensor([0.3, -2.0, 1.0, 0.5, 0.0], dtype=torch.double)
    gradients = []
    for function in (
        lambda leaf: target_logprobs(leaf, targets, positions),
        lambda leaf: torch.log_softmax(leaf, -1)[positions, targets],
    ):
        leaf = logits.clone().requires_grad_()
        gradients += torch.autograd.grad((weights * function(leaf)).sum(), leaf)
    torch.testing.assert_close(*gradients)
    assert not gradients[0][2:4].any()
