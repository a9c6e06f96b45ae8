"""Masters, moments and steps, against torch.optim.AdamW on the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fireworks_training.local.model import optimizer as optimizer_module
from fireworks_training.local.model.optimizer import (
    AdamSettings,
    MasterAdamW,
    NoGradients,
    NonFinite,
)

SETTINGS = AdamSettings(learning_rate=0.03, beta1=0.8, beta2=0.9, eps=1e-8, weight_decay=0.1)


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": nn.Parameter(torch.randn(4, 3, generator=generator)),
        "bias": nn.Parameter(torch.randn(3, generator=generator)),
    }


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)]


def add(optimizer: MasterAdamW, seed: int, loss_tokens: int = 5, sequences: int = 2) -> None:
    optimizer.accumulate(gradients(seed), loss_tokens=loss_tokens, sequences=sequences)


def as_torch(
    rounds: list[tuple[list[torch.Tensor], AdamSettings]], *, fused: bool = True
) -> list[torch.Tensor]:
    """The weights after these steps by torch alone."""
    weights = list(parameters().values())
    adam = torch.optim.AdamW(weights, fused=fused)
    for step_gradients, settings in rounds:
        for weight, gradient in zip(weights, step_gradients, strict=True):
            weight.grad = gradient
        if settings.grad_clip_norm:
            torch.nn.utils.clip_grad_norm_(weights, settings.grad_clip_norm)
        adam.param_groups[0].update(
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        adam.step()
    return [weight.detach() for weight in weights]


def same(optimizer: MasterAdamW, weights: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(optimizer.masters.values(), weights, strict=True))


def test_steps_are_those_of_torch_bit_for_bit() -> None:
    clipped = AdamSettings(learning_rate=0.01, beta1=0.9, beta2=0.99, eps=1e-6, grad_clip_norm=0.5)
    optimizer = MasterAdamW(parameters(), "float32")
    for seed, settings in ((1, SETTINGS), (2, clipped), (3, SETTINGS)):
        add(optimizer, seed)
        optimizer.step(settings, "none")
    rounds = [(gradients(1), SETTINGS), (gradients(2), clipped), (gradients(3), SETTINGS)]
    assert same(optimizer, as_torch(rounds))
    assert optimizer.steps == 3
    for ours, plain in zip(optimizer.masters.values(), as_torch(rounds, fused=False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_many_numbers_are_rounded_as_few_are() -> None:
    size = optimizer_module._ROUNDED_AT_ONCE * 2 + 3
    own = {"weight": nn.Parameter(torch.linspace(-1, 1, size))}
    optimizer = MasterAdamW(own, "bfloat16")
    assert torch.equal(own["weight"], optimizer.masters["weight"].bfloat16().float())


def test_a_first_step_without_memory_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = parameters()
    optimizer = MasterAdamW(own, "float32")
    add(optimizer, 1)
    allocations = iter(range(3))

    def zeros_like(tensor: torch.Tensor, **_: object) -> torch.Tensor:
        if next(allocations, None) is None:
            raise RuntimeError("not enough memory")
        return torch.zeros(tensor.shape)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    with pytest.raises(RuntimeError, match="not enough memory"):
        optimizer.step(SETTINGS, "none")
    monkeypatch.undo()
    assert optimizer.steps == 0
    assert optimizer.moments() == ({}, {})
    assert not optimizer.has_gradients
    assert all(master.grad is None for master in optimizer.masters.values())
    assert same(optimizer, [p.detach() for p in parameters().values()])
    add(optimizer, 1)
    optimizer.step(SETTINGS, "none")
    assert same(optimizer, as_torch([(gradients(1), SETTINGS)]))


def test_the_parameters_hold_the_rounded_masters() -> None:
    own = parameters()
    optimizer = MasterAdamW(own, "bfloat16")
    original = parameters()
    for _ in range(2):
        for name, parameter in own.items():
            assert torch.equal(parameter, optimizer.masters[name].bfloat16().float())
        add(optimizer, 1)
        optimizer.step(SETTINGS, "none")
    assert not torch.equal(own["weight"], optimizer.masters["weight"])
    assert not torch.equal(optimizer.masters["weight"], original["weight"])
    exact = parameters()
    full = MasterAdamW(exact, "float32")
    assert torch.equal(exact["weight"], full.masters["weight"])


@pytest.mark.parametrize(
    ("normalization", "divisor"), [("none", 1), ("num_loss_tokens", 12), ("num_sequences", 4)]
)
def test_gradients_add_up_and_are_normalised(normalization: str, divisor: int) -> None:
    optimizer = MasterAdamW(parameters(), "float32")
    add(optimizer, 1, loss_tokens=5)
    add(optimizer, 2, loss_tokens=7)
    metrics = optimizer.step(SETTINGS, normalization)  # type: ignore[arg-type]
    total = [(a + b) / divisor for a, b in zip(gradients(1), gradients(2), strict=True)]
    norm = torch.cat([g.flatten() for g in total]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert metrics["learning_rate"] == SETTINGS.learning_rate
    assert same(optimizer, as_torch([(total, SETTINGS)]))


def test_normalising_by_no_tokens_divides_by_one() -> None:
    optimizer = MasterAdamW(parameters(), "float32")
    add(optimizer, 1, loss_tokens=0)
    optimizer.step(SETTINGS, "num_loss_tokens")
    assert same(optimizer, as_torch([(gradients(1), SETTINGS)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_adds_nothing(bad: float) -> None:
    optimizer = MasterAdamW(parameters(), "float32")
    add(optimizer, 1)
    spoiled = gradients(2)
    spoiled[1][0] = bad
    with pytest.raises(NonFinite, match="bias"):
        optimizer.accumulate(spoiled, loss_tokens=1, sequences=1)
    optimizer.step(SETTINGS, "none")
    assert same(optimizer, as_torch([(gradients(1), SETTINGS)]))


def test_a_sum_that_overflows_leaves_the_weights() -> None:
    optimizer = MasterAdamW(parameters(), "float32")
    for _ in range(2):
        huge = [torch.full((4, 3), 3e38), torch.zeros(3)]
        optimizer.accumulate(huge, loss_tokens=1, sequences=1)
    with pytest.raises(NonFinite):
        optimizer.step(SETTINGS, "none")
    assert same(optimizer, [p.detach() for p in parameters().values()])
    assert not optimizer.has_gradients


def test_no_gradients_is_an_error_and_dropping_makes_it_so() -> None:
    optimizer = MasterAdamW(parameters(), "float32")
    with pytest.raises(NoGradients):
        optimizer.step(SETTINGS, "none")
    add(optimizer, 1)
    optimizer.drop_gradients()
    with pytest.raises(NoGradients):
        optimizer.step(SETTINGS, "none")
    assert optimizer.steps == 0


def test_restored_with_moments_it_goes_on_bit_for_bit() -> None:
    first = MasterAdamW(parameters(), "bfloat16")
    for seed in (1, 2):
        add(first, seed)
        first.step(SETTINGS, "none")
    own = parameters(9)
    second = MasterAdamW(own, "bfloat16")
    add(second, 5)
    masters = {name: tensor.clone() for name, tensor in first.masters.items()}
    second.restore(masters, first.moments(), first.steps)
    assert not second.has_gradients
    for optimizer in (first, second):
        add(optimizer, 3)
        optimizer.step(SETTINGS, "none")
    assert same(second, list(first.masters.values()))
    assert torch.equal(own["bias"], first.masters["bias"].bfloat16().float())


def test_restored_without_moments_it_starts_anew() -> None:
    first = MasterAdamW(parameters(), "float32")
    add(first, 1)
    first.step(SETTINGS, "none")
    first.restore(dict(parameters()), None, first.steps)
    assert first.steps == 0
    assert first.moments() == ({}, {})
    add(first, 2)
    first.step(SETTINGS, "none")
    assert same(first, as_torch([(gradients(2), SETTINGS)]))
