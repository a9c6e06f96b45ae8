"""Policy terms: the loss of each counted token, to be reduced. The legend is the package's.

Each function takes the log-ratio d = l - old and the advantages of T tokens. All are linear in the
size of A, so that a correction's weight can be multiplied into it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLAT = 20.0
"""Log-ratio from which SAPO's sigmoid is 1 and its slope 0 in float64: exp(20) is far beyond."""


def log(bound: float) -> float:
    """The logarithm of a bound of a ratio; that of 0 is minus infinity."""
    return math.log(bound) if bound > 0 else -math.inf


def clipped(
    log_ratio_T: Tensor, advantages_T: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """-min(r A, clip(r, low, high) A), PPO's surrogate (arXiv:1707.06347, eq. 7).

    With `dual` c, a negative advantage's loss is at most c |A| (arXiv:1912.09729, eq. 5). A token
    whose ratio the clip rejects has the bound's value and no gradient.
    """
    up_T, down_T = advantages_T > 0, advantages_T < 0
    most = math.inf if dual is None else log(dual)
    kept_T = torch.where(
        up_T,
        log_ratio_T <= log(high),
        down_T & (log_ratio_T >= log(low)) & (log_ratio_T <= most),
    )
    bound_T = torch.where(up_T, high, low).to(log_ratio_T.dtype)
    if dual is not None:
        bound_T = torch.where(down_T & (log_ratio_T > most), dual, bound_T)
    ratio_T = torch.exp(torch.where(kept_T, log_ratio_T, 0.0))
    return -torch.where(kept_T, ratio_T, bound_T) * advantages_T


def sequence_log_ratio(means_S: Tensor, sequence_T: Tensor, logprobs_T: Tensor) -> Tensor:
    """log s of each token's row, s = exp(mean(l - old)), in the token form of GSPO.

    s_t = sg(s) exp(l_t - sg(l_t)) (arXiv:2507.18071, eq. 14): the value of the row's ratio, and the
    gradient of the token's own logprob.
    """
    return means_S.detach()[sequence_T] + (logprobs_T - logprobs_T.detach())


def cispo(
    logprobs_T: Tensor,
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    min_weight: float,
    max_weight: float,
) -> Tensor:
    """-sg(clamp(r, min_weight, max_weight)) A l (arXiv:2506.13585, eq. 4 and 5).

    The bounds are those of the weight itself: 5.0 is five times, not 1 + 5.
    """
    bounded_T = log_ratio_T.detach().clamp(log(min_weight), log(max_weight))
    active_T = advantages_T != 0
    return -torch.exp(bounded_T) * advantages_T * torch.where(active_T, logprobs_T, 0.0)


def dppo(
    logprobs_T: Tensor,
    old_T: Tensor,
    advantages_T: Tensor,
    delta_low: float,
    delta_high: float,
) -> Tensor:
    """-m r A: m drops a token whose probability moved too far in the direction of A.

    m = 0 if A > 0 and e^l - e^old > delta_high, or A < 0 and e^old - e^l > delta_low, else 1: the
    binary total-variation mask of arXiv:2602.04879.
    """
    moved_T = torch.exp(logprobs_T.detach()) - torch.exp(old_T)
    kept_T = torch.where(
        advantages_T > 0, moved_T <= delta_high, (advantages_T < 0) & (-moved_T <= delta_low)
    )
    return importance(logprobs_T - old_T, torch.where(kept_T, advantages_T, 0.0))


def sapo(
    log_ratio_T: Tensor, advantages_T: Tensor, tau_positive: float, tau_negative: float
) -> Tensor:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A (arXiv:2511.20347, eq. 6 and 7)."""
    taus_T = torch.where(advantages_T > 0, tau_positive, tau_negative).to(log_ratio_T.dtype)
    ratio_T = torch.exp(log_ratio_T.clamp(max=FLAT))
    gated_T = 4.0 / taus_T * torch.sigmoid(taus_T * (ratio_T - 1.0))
    return -gated_T * advantages_T


def importance(log_ratio_T: Tensor, advantages_T: Tensor) -> Tensor:
    """-r A: importance sampling, unclipped."""
    active_T = advantages_T != 0
    return -torch.exp(torch.where(active_T, log_ratio_T, 0.0)) * advantages_T


def reinforce(logprobs_T: Tensor, advantages_T: Tensor) -> Tensor:
    """-A l (Williams 1992): for rows that the current weights sampled."""
    return -advantages_T * torch.where(advantages_T != 0, logprobs_T, 0.0)


def dro(logprobs_T: Tensor, old_T: Tensor, advantages_T: Tensor, beta: float) -> Tensor:
    """-(A l - beta / 2 (l - old)^2): direct reward optimisation, in the form of a token.

    The square pulls on every counted token, also one whose advantage is 0 (after arXiv:2405.19107,
    in the parametrisation of the Tinker documentation).
    """
    return reinforce(logprobs_T, advantages_T) + 0.5 * beta * (logprobs_T - old_T).square()
