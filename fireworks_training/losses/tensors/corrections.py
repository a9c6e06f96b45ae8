"""Weights for rows whose sampler and trainer disagree: w = exp(old - q), one a token or a row.

The same weights compute slightly other logprobs in an engine than in a trainer. A correction
multiplies each token's policy term by a weight without a gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fireworks_training.losses.corrections import Correction
from fireworks_training.losses.tensors.rows import Rows


def correction_weights(how: Correction, log_weights_T: Tensor, rows: Rows) -> Tensor:
    """Compute the weight of each token from log w = old - q.

    Kinds, with the bounds a and b: "tis": min(w, b) (truncated importance sampling,
    arXiv:1606.02647). "icepop": w if a <= w <= b, else 0 (arXiv:2510.18855). "sequence_mask": a
    row's W = exp(sum log w) if a <= W <= b, else 0. "geometric": 1 if a <= exp(mean log w) <= b,
    else 0. "decoupled": w itself (decoupled PPO, arXiv:2110.00641).
    """
    log_w_T = log_weights_T.detach()
    low = math.log(how.low) if how.low > 0 else -math.inf
    high = math.log(how.high)
    if how.kind == "tis":
        return torch.exp(log_w_T.clamp(max=high))
    if how.kind == "decoupled":
        return torch.exp(log_w_T)
    if how.kind in ("sequence_mask", "geometric"):
        log_rows_S = rows.means(log_w_T) if how.kind == "geometric" else rows.sums(log_w_T)
        log_w_T = log_rows_S[rows.sequence_T]
    kept_T = (log_w_T >= low) & (log_w_T <= high)
    if how.kind == "geometric":
        return kept_T.to(log_w_T.dtype)
    return torch.where(kept_T, torch.exp(torch.where(kept_T, log_w_T, 0.0)), 0.0)
