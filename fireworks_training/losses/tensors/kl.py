"""Three estimators of KL(pi || ref) from sampled tokens, and what each is good for.

With d = l - ref (Schulman 2020): k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1.

As a *loss*, k2 has the gradient of the reverse KL on policy, k3 a first-order approximation of it,
and k1 none: its gradient is the score, zero in expectation (arXiv:2510.01555). k1 belongs into the
*reward*, without a gradient, where it is right. "k3+" has the value of k3 and the gradient of k2.

Off policy the expectation is over another policy, so that each term has the weight
rho = min(exp(l - q), cap); live for k3, whose own value is being reweighted, else detached.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AS_LOSS = ("k2", "k3", "k3+")
IN_REWARD = "k1_in_reward"
WHY_NOT_K1 = (
    "k1 as a loss has the gradient of the bare logprob, zero in expectation: it holds the policy "
    "to no reference. Use kl='k1_in_reward', or 'k2', 'k3' or 'k3+' as a loss"
)


def k1(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """l - ref: unbiased, of both signs."""
    return logprobs_T - reference_T


def k2(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """(l - ref)^2 / 2: biased in value, with the gradient of the reverse KL."""
    return 0.5 * (logprobs_T - reference_T).square()


def k3(logprobs_T: Tensor, reference_T: Tensor) -> Tensor:
    """exp(ref - l) - (ref - l) - 1: unbiased in value, never negative. Not clamped: a reference far
    away still pulls."""
    gap_T = reference_T - logprobs_T
    return torch.expm1(gap_T) - gap_T


def as_loss(
    kind: str, logprobs_T: Tensor, reference_T: Tensor, sampled_T: Tensor | None, cap: float
) -> Tensor:
    """Compute the term of each token, weighted by rho where the sampler's logprobs are given."""
    terms_T = k3(logprobs_T, reference_T) if kind == "k3" else k2(logprobs_T, reference_T)
    if kind == "k3+":
        terms_T = terms_T - terms_T.detach() + k3(logprobs_T.detach(), reference_T)
    if sampled_T is None:
        return terms_T
    log_weights_T = logprobs_T - sampled_T
    if kind != "k3":
        log_weights_T = log_weights_T.detach()
    return torch.exp(log_weights_T.clamp(max=math.log(cap))) * terms_T
