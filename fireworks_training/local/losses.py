"""Losses of the trainer: plain sums over tokens, each a pure function of target logprobs.

Knows: formulas, which inputs and settings a loss takes, and their defaults. Does not know models,
batches, padding or gradients.

Legend: M tokens of all datums of a pass, laid end to end. For token t: l = logprob of its target
under the current weights, q = `logprobs` (under the weights that sampled it), A = `advantages`,
w = `weights` (1 where none are given), r = exp(l - q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss.

    Attributes:
        per_token: (logprobs_M, inputs of M entries each, settings) -> loss_M, to be summed.
        required: names of `loss_fn_inputs` besides `target_tokens` that must be given, float32.
        config: settings and their defaults.
    """

    per_token: Callable[[Tensor, Inputs, Config], Tensor]
    required: tuple[str, ...] = ()
    config: Mapping[str, float] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs that may be given."""
        return ("target_tokens", "weights", *self.required)


def cross_entropy(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w l"""
    del config
    return -inputs["weights"] * logprobs_M


def _ratio(logprobs_M: Tensor, inputs: Inputs) -> Tensor:
    """r = exp(l - q), and 1 where the token has no say.

    A token with w = 0 or A = 0 adds nothing whatever its ratio, and often has a placeholder for q
    (a prompt token): exp of it could overflow, and infinity times zero is not zero.
    """
    active_M = (inputs["weights"] != 0) & (inputs["advantages"] != 0)
    return torch.exp(torch.where(active_M, logprobs_M - inputs["logprobs"], 0.0))


def importance_sampling(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w r A"""
    del config
    return -inputs["weights"] * _ratio(logprobs_M, inputs) * inputs["advantages"]


def ppo(logprobs_M: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w min(r A, clip(r, low, high) A); the thresholds are bounds of the ratio itself."""
    r_M = _ratio(logprobs_M, inputs)
    clipped_M = r_M.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    advantages_M = inputs["advantages"]
    return -inputs["weights"] * torch.minimum(r_M * advantages_M, clipped_M * advantages_M)


LOSSES: Mapping[str, Loss] = {
    "cross_entropy": Loss(cross_entropy),
    "importance_sampling": Loss(importance_sampling, required=("logprobs", "advantages")),
    "ppo": Loss(
        ppo,
        required=("logprobs", "advantages"),
        config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    ),
}


def target_logprobs(logits_UV: Tensor, targets_M: Tensor, rows_M: Tensor | None = None) -> Tensor:
    """Logprob of each target under its row of logits; `rows_M` None means row after row."""
    if rows_M is None:
        chosen_M = logits_UV.gather(-1, targets_M[:, None]).squeeze(-1)
        return chosen_M - torch.logsumexp(logits_UV, dim=-1)
    chosen_M = torch.take(logits_UV, rows_M * logits_UV.shape[-1] + targets_M)
    return chosen_M - torch.logsumexp(logits_UV, dim=-1).index_select(0, rows_M)
