"""Preference terms: the loss of each of B pairs. The legend is the package's.

h = (l_c - ref_c) - (l_r - ref_r) of a pair, with the sums over a response's counted tokens, or its
means where that is said.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOG_HALF = -math.log(2.0)


def dpo(margins_B: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    arXiv:2305.18290, eq. 7, with h of sums; label smoothing e as "conservative DPO" (Mitchell
    2023); with h of means it is the length-normalised form (arXiv:2411.15124, section 5).
    """
    logits_B = beta * margins_B
    kept = 1.0 - label_smoothing
    return -kept * logsigmoid(logits_B) - label_smoothing * logsigmoid(-logits_B)


def ipo(margins_B: Tensor, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2 (arXiv:2310.12036, eq. 17), with h of means."""
    return (margins_B - 1.0 / (2.0 * tau)).square()


def log1mexp(values_B: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0, exact at both ends (Maechler 2012); -inf at 0."""
    near_B = values_B > LOG_HALF
    close_B = torch.log(-torch.expm1(torch.where(near_B, values_B, -1.0)))
    far_B = torch.log1p(-torch.exp(torch.where(near_B, -1.0, values_B)))
    return torch.where(near_B, close_B, far_B)


def log_odds(means_B: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = e^a, a the mean logprob of a response.

    A response of probability 1 has infinite odds; a is held below 0 by the smallest step of its
    type, without a gradient beyond.
    """
    bounded_B = means_B.clamp(max=-torch.finfo(means_B.dtype).tiny)
    return bounded_B - log1mexp(bounded_B)


def orpo(chosen_B: Tensor, rejected_B: Tensor, lam: float) -> Tensor:
    """-a_c - lam log sigmoid(log odds_c - log odds_r) (arXiv:2403.07691, eq. 6 and 7).

    a is the mean logprob of *all* counted tokens of a response: words that both share count in it.
    """
    return -chosen_B - lam * logsigmoid(log_odds(chosen_B) - log_odds(rejected_B))
