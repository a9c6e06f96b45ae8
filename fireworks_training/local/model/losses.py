"""Losses of the trainer: plain sums over tokens, each a pure function of target logprobs.

Knows formulas, which inputs and settings a loss takes, and their defaults. Does not know models,
batches, padding or gradients.

Legend: M targets of all datums of a pass, laid end to end (one a token; K a token where a datum has
targets `[N, K]`). For target t: l = logprob under the current weights, q = `logprobs` (under the
weights that sampled it), A = `advantages`, w = `weights`, r = exp(l - q), sg = no gradient flows
through. A token counts, for sums and for a sequence's mean, if and only if its w is not 0. Beside
the inputs that users give, each loss gets `sequence`: the index of the datum that target t belongs
to, int64, not falling.

Every loss is a plain sum; a mean over tokens or sequences is the caller's, in weights or
advantages.
Bounds are defaults of this module, not the papers': gspo has 0.8 to 1.2 as ppo does (its paper:
1 - 3e-4 to 1 + 4e-4), and cispo has a lower bound (its paper: none).

A token whose ratio the bounds reject adds a constant to the loss and nothing to the gradient. Its
ratio is not computed, since it may be infinite, and infinity times a gradient of zero is NaN. A
ratio that is infinite and *not* rejected makes the loss infinite, which the pass refuses.

Formulas: cross_entropy, importance_sampling, ppo, cispo and dro as the Tinker documentation gives
them; gspo in the token form of Zheng et al. 2025 (arXiv:2507.18071, section 4.3); dppo masks by the
total variation of each token's probability; reinforce as Williams 1992. `ratio_log_cap` bounds the
log-ratio as the vendor's cookbook does it in `training/utils/rl/is_loss.py` (20 there, infinite
here unless it is sent).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """Describes one loss: its formula, and the inputs and settings that it takes.

    Attributes:
        per_token: (logprobs_M, inputs of M entries each, settings) -> loss_M, to be summed.
        required: names of `loss_fn_inputs` besides `target_tokens` that must be given, float32.
        optional: names besides `weights` that may be given.
        config: settings and their defaults.
        many_targets: whether targets may be `[N, K]`.
        ratio_mask: whether `sequence_ratio_mask` may name the tokens of a sequence's ratio.
    """

    per_token: Callable[[Tensor, Inputs, Config], Tensor]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)
    many_targets: bool = False
    ratio_mask: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs that may be given."""
        return ("target_tokens", "weights", *self.required, *self.optional)


def cross_entropy(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w l"""
    del config
    return -inputs["weights"] * logprobs_M


def _speaks(inputs: Inputs) -> Tensor:
    """Tell which tokens add to a loss that multiplies by w and A.

    Others add nothing whatever their ratio, and often have a placeholder for q (a prompt token):
    exp of it could overflow, and infinity times zero is not zero.
    """
    return (inputs["weights"] != 0) & (inputs["advantages"] != 0)


def _log_ratio(logprobs_M: Tensor, inputs: Inputs) -> Tensor:
    """l - q, and 0 where the token has no say."""
    return torch.where(_speaks(inputs), logprobs_M - inputs["logprobs"], 0.0)


def importance_sampling(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w r A, r = exp(clip(l - q, -ratio_log_cap, ratio_log_cap)); no gradient beyond the cap."""
    cap = config["ratio_log_cap"]
    log_r_M = _log_ratio(logprobs_M, inputs).clamp(-cap, cap)
    return -inputs["weights"] * torch.exp(log_r_M) * inputs["advantages"]


def _clipped(log_r_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w min(r A, clip(r, low, high) A)"""
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    advantages_M = inputs["advantages"]
    r_M = torch.exp(log_r_M.detach())
    # clip's side is the smaller one exactly where A pushes the ratio on beyond its bound.
    too_high_M = (advantages_M > 0) & (r_M > high)
    too_low_M = (advantages_M < 0) & (r_M < low)
    rejected_M = too_high_M | too_low_M
    kept_M = torch.exp(torch.where(rejected_M, 0.0, log_r_M))
    value_M = torch.where(rejected_M, r_M.clamp(low, high), kept_M)
    return -inputs["weights"] * value_M * advantages_M


def ppo(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w min(r A, clip(r, low, high) A); the thresholds are bounds of the ratio itself."""
    return _clipped(_log_ratio(logprobs_M, inputs), inputs, config)


def cispo(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w sg(clip(r, low, high)) l A: no token loses its gradient, only its weight is bounded."""
    r_M = torch.exp(_log_ratio(logprobs_M.detach(), inputs))
    clipped_M = r_M.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -inputs["weights"] * clipped_M * logprobs_M * inputs["advantages"]


def gspo(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """ppo's form with one ratio a sequence: s = exp(sum_t w (l - q) / sum_t w).

    Each token's ratio has the value s and the gradient s of its own l, so that advantages may
    differ between the tokens of a sequence.
    """
    sequence_M, weights_M = inputs["sequence"], inputs["weights"]
    # Every token that counts belongs to the mean, also one whose own advantage is 0.
    deltas_M = torch.where(weights_M != 0, logprobs_M.detach() - inputs["logprobs"], 0.0)
    sums_S = logprobs_M.new_zeros(int(sequence_M[-1]) + 1)
    totals_S = sums_S.index_add(0, sequence_M, weights_M)
    means_S = sums_S.index_add(0, sequence_M, weights_M * deltas_M) / torch.where(
        totals_S == 0, 1.0, totals_S
    )
    log_s_M = means_S[sequence_M] + (logprobs_M - logprobs_M.detach())
    return _clipped(torch.where(_speaks(inputs), log_s_M, 0.0), inputs, config)


def dppo(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w r A m: m is 0 for a token whose probability has moved too far the way A pushes it.

    With p = exp(l) and u = exp(q): m = 0 if A > 0 and p - u > delta_high, or if A < 0 and
    u - p > delta_low; else 1. The distance is one of probabilities, not of their ratio, so a rare
    token may move by a large factor.
    """
    advantages_M = inputs["advantages"]
    moved_M = torch.exp(logprobs_M.detach()) - torch.exp(inputs["logprobs"])
    too_high_M = (advantages_M > 0) & (moved_M > config["delta_high"])
    too_low_M = (advantages_M < 0) & (-moved_M > config["delta_low"])
    kept_M = ~(too_high_M | too_low_M)
    r_M = torch.exp(torch.where(kept_M, _log_ratio(logprobs_M, inputs), 0.0))
    return -inputs["weights"] * torch.where(kept_M, r_M, 0.0) * advantages_M


def dro(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w (l A - beta / 2 (l - q)^2)"""
    weights_M = inputs["weights"]
    delta_M = torch.where(weights_M != 0, logprobs_M - inputs["logprobs"], 0.0)
    gain_M = logprobs_M * inputs["advantages"]
    return -weights_M * (gain_M - 0.5 * config["beta"] * delta_M.square())


def reinforce(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w l A. For data that the current weights sampled: `logprobs` may be given and is not used"""
    del config
    return -inputs["weights"] * logprobs_M * inputs["advantages"]


_OFF_POLICY = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, many_targets=True),
    "importance_sampling": Loss(
        importance_sampling, required=_OFF_POLICY, config={"ratio_log_cap": math.inf}
    ),
    "ppo": Loss(ppo, required=_OFF_POLICY, config=_CLIP),
    "cispo": Loss(cispo, required=_OFF_POLICY, config=_CLIP),
    "gspo": Loss(gspo, required=_OFF_POLICY, config=_CLIP, ratio_mask=True),
    "dppo": Loss(dppo, required=_OFF_POLICY, config={"delta_low": 0.2, "delta_high": 0.2}),
    "dro": Loss(dro, required=_OFF_POLICY, config={"beta": 0.05}),
    "reinforce": Loss(reinforce, required=("advantages",), optional=("logprobs",)),
}


_AT_ONCE = 1 << 18
"""Logits of one block: they stay in the processor's cache from one operation to the next."""


class _TargetLogprobs(torch.autograd.Function):
    """Computes logprobs whose gradient is written once: row u's is the sum over its targets of
    g (onehot(t) - softmax(logits_u)). Autograd fills three arrays of the logits' size for it."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits_UV: Tensor, targets_M: Tensor, rows_M: Tensor) -> Tensor:
        size = max(_AT_ONCE // logits_UV.shape[-1], 1)
        sums_U = torch.cat(
            [torch.logsumexp(piece, dim=-1) for piece in torch.split(logits_UV, size)]
        )
        places_M = rows_M * logits_UV.shape[-1] + targets_M
        ctx.save_for_backward(logits_UV, sums_U, places_M, rows_M)
        return torch.take(logits_UV, places_M) - sums_U.index_select(0, rows_M)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_M,) = grad_outputs
        logits_UV, sums_U, places_M, rows_M = ctx.saved_tensors
        scale_U = torch.zeros_like(sums_U).index_add_(0, rows_M, grad_M).neg_()
        grad_UV = torch.empty_like(logits_UV, memory_format=torch.contiguous_format)
        size = max(_AT_ONCE // logits_UV.shape[-1], 1)
        columns = (sums_U[:, None], scale_U[:, None])
        pieces = (torch.split(tensor, size) for tensor in (grad_UV, logits_UV, *columns))
        for grad, logits, sums, scale in zip(*pieces, strict=True):
            torch.sub(logits, sums, out=grad).exp_().mul_(scale)
        grad_UV.view(-1).index_add_(0, places_M, grad_M)
        return grad_UV, None, None


def target_logprobs(logits_UV: Tensor, targets_M: Tensor, rows_M: Tensor | None = None) -> Tensor:
    """Compute the logprob of each target under its row of logits; `rows_M` None: row after row."""
    if rows_M is None:
        rows_M = torch.arange(len(targets_M), device=targets_M.device)
    apply: Callable[..., Any] = _TargetLogprobs.apply
    return cast(Tensor, apply(logits_UV, targets_M, rows_M))
