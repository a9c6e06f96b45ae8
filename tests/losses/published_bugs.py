"""Errors that were published in losses, each rebuilt small, with the place that describes it.

Each is the smallest function that makes the same error; none is anybody's code. They are the
negative controls of the court: `test_court.py` holds that it convicts every one, by the law that
names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fireworks_training.losses import Totals
from fireworks_training.losses.conformance import Objective, objectives
from fireworks_training.losses.conformance.runs import Implementation

Returned = tuple[Tensor, dict[str, float]]


@dataclass(frozen=True)
class Row:
    """The arrays of a row, in the dtype of its logprobs."""

    tokens: list[int]
    m: Tensor
    lp: Tensor
    inputs: dict[str, Tensor]

    def __getattr__(self, name: str) -> Tensor:
        return self.inputs[name]


def rows_of(data: Sequence[Any], leaves: Sequence[Tensor]) -> list[Row]:
    found = []
    for datum, lp in zip(data, leaves, strict=True):
        arrays = {k: torch.tensor(v.to_numpy()).to(lp) for k, v in datum.loss_fn_inputs.items()}
        tokens = datum.loss_fn_inputs["target_tokens"].to_numpy().tolist()
        found.append(Row(tokens, arrays.pop("weights"), lp, arrays))
    return found


def surrogate(row: Row, low: float = 0.8, high: float = 1.2) -> Tensor:
    """The right PPO term, for errors that lie elsewhere; masked contents do no harm."""
    ratio = torch.exp(torch.where(row.m > 0, row.lp - row.logprobs, 0.0))
    return -torch.minimum(ratio * row.advantages, ratio.clamp(low, high) * row.advantages)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    return (mask * torch.where(mask > 0, values, 0.0)).sum() / mask.sum().clamp(min=1)


def by_sequence(term: Callable[[Row], Tensor]) -> Implementation:
    """The mean over rows of the means of their tokens."""

    def loss(data: Any, leaves: list[Tensor]) -> Returned:
        rows = [row for row in rows_of(data, leaves) if row.m.sum() > 0]
        return torch.stack([mean(term(row), row.m) for row in rows]).mean(), {}

    return loss


def summed(term: Callable[[Row], Tensor]) -> Implementation:
    def loss(data: Any, leaves: list[Tensor]) -> Returned:
        rows = rows_of(data, leaves)
        return torch.stack([(row.m * term(row)).sum() for row in rows]).sum(), {}

    return loss


def of_pairs(pair: Callable[[Row, Row], Tensor]) -> Implementation:
    def loss(data: Any, leaves: list[Tensor]) -> Returned:
        rows = rows_of(data, leaves)
        pairs = zip(rows[0::2], rows[1::2], strict=True)
        return torch.stack([pair(won, lost) for won, lost in pairs]).mean(), {}

    return loss


# -- a KL that does nothing, or something else --------------------------------------------------


def detached_kl_of_igpo(row: Row) -> Tensor:
    return surrogate(row) + 0.1 * (row.lp.detach() - row.ref_logprobs)


def detached_kl_of_reinforce(row: Row) -> Tensor:
    return -row.lp * row.advantages + 0.1 * (row.lp.detach() - row.ref_logprobs)


def k1_as_loss(row: Row) -> Tensor:
    return surrogate(row) + 0.1 * (row.lp - row.ref_logprobs)


def kl_without_weight_off_policy(row: Row) -> Tensor:
    return surrogate(row) + 0.1 * 0.5 * (row.lp - row.ref_logprobs).square()


def kl_weighted_by_the_whole_row(row: Row) -> Tensor:
    gap = row.ref_logprobs - row.lp
    log_ratio = torch.where(row.m > 0, row.lp - row.logprobs, 0.0)
    weight = torch.exp((log_ratio * row.m).sum().clamp(max=2.3))
    return surrogate(row) + 0.1 * weight * (torch.expm1(gap) - gap)


def clamped_k3(row: Row) -> Tensor:
    gap = row.ref_logprobs - row.lp
    log_ratio = torch.where(row.m > 0, row.lp - row.logprobs, 0.0)
    weight = torch.exp(log_ratio.clamp(max=2.302585092994046))
    # The published bound is 10; the tiny policies here are nearer, and so is this bound.
    return surrogate(row) + 0.1 * weight * (torch.expm1(gap) - gap).clamp(-0.3, 0.3)


# -- masks -----------------------------------------------


def gspo_over_masked_tokens(data: Any, leaves: list[Tensor]) -> Returned:
    terms = []
    for row in rows_of(data, leaves):
        log_ratio = row.lp - row.logprobs
        ratio = torch.exp(log_ratio.mean())  # the mean before the mask
        a = row.advantages[row.m > 0].mean()
        terms.append(-torch.minimum(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a))
    return torch.stack(terms).mean(), {}


def dpo_drops_first_token(won: Row, lost: Row) -> Tensor:
    def score(row: Row) -> Tensor:
        late = row.m.clone()
        late[int(row.m.nonzero()[0])] = 0
        return (late * (row.lp - row.ref_logprobs)).sum()

    return -logsigmoid(0.1 * (score(won) - score(lost)))


def dpo_mask_inverted(won: Row, lost: Row) -> Tensor:
    def score(row: Row) -> Tensor:
        return ((1 - row.m) * (row.lp - row.ref_logprobs)).sum()

    return -logsigmoid(0.1 * (score(won) - score(lost)))


def dpo_counts_all_after_the_prompt(won: Row, lost: Row) -> Tensor:
    def score(row: Row) -> Tensor:
        start = int(row.m.nonzero()[0])
        return (row.lp - row.ref_logprobs)[start:].sum()

    return -logsigmoid(0.1 * (score(won) - score(lost)))


def sft_off_by_one(data: Any, leaves: list[Tensor]) -> Returned:
    rows = rows_of(data, leaves)
    late = [torch.cat([row.m[1:], row.m.new_zeros(1)]) for row in rows]
    total = torch.stack([(m * row.lp).sum() for m, row in zip(late, rows, strict=True)]).sum()
    return -total / torch.stack([row.m.sum() for row in rows]).sum(), {}


# -- preference terms -----------------------------------------------


def log_odds(a: Tensor) -> Tensor:
    return a - torch.log(-torch.expm1(a))


def orpo_skips_shared_opening(won: Row, lost: Row) -> Tensor:
    first = [
        [t for t, keep in zip(row.tokens, row.m.tolist(), strict=True) if keep]
        for row in (won, lost)
    ]
    shared = 0
    while shared < min(map(len, first)) - 1 and first[0][shared] == first[1][shared]:
        shared += 1

    def average(row: Row) -> Tensor:
        return row.lp[row.m > 0][shared:].mean()

    a, b = average(won), average(lost)
    return -a - 0.1 * logsigmoid(log_odds(a) - log_odds(b))


def orpo_over_the_prompt(won: Row, lost: Row) -> Tensor:
    a, b = mean(won.lp, won.m), mean(lost.lp, lost.m)
    return -won.lp.mean() - 0.1 * logsigmoid(log_odds(a) - log_odds(b))


def orpo_with_a_shifted_log(won: Row, lost: Row) -> Tensor:
    a, b = mean(won.lp, won.m), mean(lost.lp, lost.m)
    odds = (a - b) - (torch.log(1.0001 - torch.exp(a)) - torch.log(1.0001 - torch.exp(b)))
    return -a - 0.1 * logsigmoid(odds)


def orpo_without_gradient(won: Row, lost: Row) -> Tensor:
    a, b = mean(won.lp, won.m).detach(), mean(lost.lp, lost.m).detach()
    return -0.1 * logsigmoid(log_odds(a) - log_odds(b)) + 0.0 * won.lp.sum()


def ipo_of_sums(won: Row, lost: Row) -> Tensor:
    def score(row: Row) -> Tensor:
        return (row.m * (row.lp - row.ref_logprobs)).sum()

    return (score(won) - score(lost) - 1 / 0.2).square()


# -- weights and clips -----------------------------------------------


def cispo_cut_to_epsilon(data: Any, leaves: list[Tensor]) -> Returned:
    rows = rows_of(data, leaves)
    total = torch.zeros((), dtype=leaves[0].dtype)
    for row in rows:
        ratio = torch.exp(torch.where(row.m > 0, row.lp - row.logprobs, 0.0)).detach()
        total = total - (row.m * ratio.clamp(max=0.2) * row.advantages * row.lp).sum()
    return total / torch.stack([row.m.sum() for row in rows]).sum(), {}


def gspo_weighted_by_length(data: Any, leaves: list[Tensor]) -> Returned:
    rows = rows_of(data, leaves)
    total = torch.zeros((), dtype=leaves[0].dtype)
    for row in rows:
        log_ratio = torch.where(row.m > 0, row.lp - row.logprobs, 0.0)
        s, a = torch.exp(mean(log_ratio, row.m)), row.advantages[row.m > 0].mean()
        term = -torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)
        total = total + (term * row.m).sum()  # one value a row, spread over its tokens
    return total / torch.stack([row.m.sum() for row in rows]).sum(), {}


def ratio_without_gradient(row: Row) -> Tensor:
    ratio = torch.exp(torch.where(row.m > 0, row.lp - row.logprobs, 0.0).detach())
    return -ratio * row.advantages + 0.0 * row.lp


def gspo_clipped_as_ppo(row: Row) -> Tensor:
    log_ratio = torch.where(row.m > 0, row.lp - row.logprobs, 0.0)
    a = row.advantages
    s = torch.exp(mean(log_ratio, row.m))
    return -torch.minimum(s * a, s.clamp(0.8, 1.2) * a)


def dppo_with_a_documented_clamp(row: Row) -> Tensor:
    ratio = torch.exp(torch.where(row.m > 0, row.lp - row.logprobs, 0.0))
    moved = torch.exp(row.lp.detach()) - torch.exp(row.logprobs)
    dropped = torch.where(row.advantages > 0, moved > 0.2, -moved > 0.2)
    return torch.where(dropped, 0.0, -ratio.clamp(max=1.2) * row.advantages)


def dro_square_only_where_rewarded(row: Row) -> Tensor:
    log_ratio = torch.where(row.m > 0, row.lp - row.logprobs, 0.0)
    square = torch.where(row.advantages != 0, 0.025 * log_ratio.square(), 0.0)
    return -row.lp * row.advantages + square


# -- reductions -----------------------------------------------


def sft_mean_of_the_call(data: Any, leaves: list[Tensor]) -> Returned:
    rows = rows_of(data, leaves)
    total = torch.stack([(row.m * row.lp).sum() for row in rows]).sum()
    return -total / torch.stack([row.m.sum() for row in rows]).sum().clamp(min=1), {}


def token_mean_of_the_call(data: Any, leaves: list[Tensor]) -> Returned:
    rows = rows_of(data, leaves)
    total = torch.stack([(row.m * surrogate(row, 0.8, 1.28)).sum() for row in rows]).sum()
    return total / torch.stack([row.m.sum() for row in rows]).sum().clamp(min=1), {}


def grpo_without_a_divisor(row: Row) -> Tensor:
    return surrogate(row)


def normalised_again(data: Any, leaves: list[Tensor]) -> Returned:
    rows = rows_of(data, leaves)
    every = torch.cat([row.advantages[row.m > 0] for row in rows])
    terms = []
    for row in rows:
        row.inputs["advantages"] = (row.advantages - every.mean()) / (every.std() + 1e-8)
        terms.append(mean(surrogate(row), row.m))
    return torch.stack(terms).mean(), {}


def ignoring(loss: Implementation) -> Callable[[Totals], Implementation]:
    """What takes the totals of a batch, and does not use them."""
    return lambda totals: loss


@dataclass(frozen=True)
class Bug:
    """One error.

    Attributes:
        reference: where it is described.
        loss: the error, rebuilt.
        objective: what it claims to be.
        law: a law that must be broken, among others.
        spread: for errors that lie in what is done with a batch in parts.
    """

    reference: str
    loss: Implementation
    objective: Objective
    law: str
    spread: Callable[[Totals], Implementation] | None = None


GITHUB = "https://github.com/"
COOKBOOK = f"{GITHUB}fw-ai/cookbook/"
K2 = objectives.grpo(kl="k2", kl_coef=0.1)
K3 = objectives.grpo(kl="k3", kl_coef=0.1)

BUGS: dict[str, Bug] = {
    "IGPO's KL is detached": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/rl/igpo.py",
        by_sequence(detached_kl_of_igpo),
        K2,
        "reference",
    ),
    "REINFORCE's KL is detached": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/rl/reinforce.py",
        summed(detached_kl_of_reinforce),
        objectives.reinforce(kl="k2", kl_coef=0.1),
        "reference",
    ),
    "k1 as a loss ignores the reference": Bug(
        f"{GITHUB}allenai/open-instruct/pull/535", by_sequence(k1_as_loss), K2, "reference"
    ),
    "a KL off policy without a weight": Bug(
        f"{GITHUB}NVIDIA-NeMo/RL/pull/2506",
        by_sequence(kl_without_weight_off_policy),
        K2,
        "gradient, far",
    ),
    "a token's KL weighted by its whole row": Bug(
        f"{GITHUB}huggingface/trl/pull/6594",
        by_sequence(kl_weighted_by_the_whole_row),
        K3,
        "gradient, far",
    ),
    "a clamped k3 lets a far policy go": Bug(
        "https://arxiv.org/abs/2510.01555", by_sequence(clamped_k3), K3, "gradient, near"
    ),
    "GSPO's mean runs over masked tokens": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/rl/gspo.py",
        gspo_over_masked_tokens,
        objectives.gspo(),
        "masked contents",
    ),
    "DPO drops the first token": Bug(
        f"{COOKBOOK}pull/388",
        of_pairs(dpo_drops_first_token),
        objectives.dpo(),
        "gradient, on policy",
    ),
    "DPO's mask is inverted": Bug(
        f"{GITHUB}FunAudioLLM/CosyVoice/issues/1449",
        of_pairs(dpo_mask_inverted),
        objectives.dpo(),
        "masked contents",
    ),
    "DPO counts tool tokens": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/losses.py",
        of_pairs(dpo_counts_all_after_the_prompt),
        objectives.dpo(),
        "masked contents",
    ),
    "SFT is off by one": Bug(
        f"{COOKBOOK}pull/388", sft_off_by_one, objectives.sft(), "gradient, on policy"
    ),
    "ORPO skips the opening that both share": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/supervised.py",
        of_pairs(orpo_skips_shared_opening),
        objectives.orpo(),
        "gradient, on policy",
    ),
    "ORPO's NLL runs over the prompt": Bug(
        f"{GITHUB}huggingface/trl/blob/f2cd577/trl/experimental/orpo/orpo_trainer.py",
        of_pairs(orpo_over_the_prompt),
        objectives.orpo(),
        "prompt length",
    ),
    "ORPO's log(1 - p) is shifted": Bug(
        f"{GITHUB}hpcaitech/ColossalAI/pull/6407",
        of_pairs(orpo_with_a_shifted_log),
        objectives.orpo(),
        "gradient, on policy",
    ),
    "ORPO has no gradient": Bug(
        f"{GITHUB}Goekdeniz-Guelmez/mlx-lm-lora/issues/65",
        of_pairs(orpo_without_gradient),
        objectives.orpo(),
        "gradient, on policy",
    ),
    "IPO takes sums": Bug(
        f"{GITHUB}modelscope/ms-swift/pull/9925",
        of_pairs(ipo_of_sums),
        objectives.ipo(),
        "gradient, near",
    ),
    "CISPO's weight is cut to epsilon": Bug(
        f"{GITHUB}huggingface/trl/blob/f2cd577/trl/trainer/grpo_trainer.py",
        cispo_cut_to_epsilon,
        objectives.cispo(),
        "gradient, on policy",
    ),
    "GSPO's rows are weighted by their length": Bug(
        f"{GITHUB}huggingface/trl/issues/3823",
        gspo_weighted_by_length,
        objectives.gspo(),
        "gradient, on policy",
    ),
    "GSPO with PPO's clips never clips": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/rl/gspo.py",
        by_sequence(gspo_clipped_as_ppo),
        objectives.gspo(),
        "gradient, near",
    ),
    "DPPO clamps the ratio, as documented": Bug(
        f"{GITHUB}PrimeIntellect-ai/prime-rl/blob/559b447/docs/algorithms.md",
        summed(dppo_with_a_documented_clamp),
        objectives.dppo(reduction="sum"),
        "gradient, far",
    ),
    "DRO's square only where there is an advantage": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/rl/dro.py",
        summed(dro_square_only_where_rewarded),
        objectives.dro(),
        "equal rewards",
    ),
    "SFT takes the mean of a call": Bug(
        f"{GITHUB}allenai/open-instruct/pull/1137",
        sft_mean_of_the_call,
        objectives.sft(),
        "split",
        ignoring(sft_mean_of_the_call),
    ),
    "DAPO's token mean is the call's": Bug(
        "https://arxiv.org/abs/2503.14476",
        token_mean_of_the_call,
        objectives.dapo(),
        "split",
        ignoring(token_mean_of_the_call),
    ),
    "GRPO has no divisor": Bug(
        f"{COOKBOOK}blob/76821fa/training/utils/rl/grpo.py",
        summed(grpo_without_a_divisor),
        objectives.grpo(),
        "gradient, on policy",
    ),
    "advantages are normalised again over the call": Bug(
        f"{GITHUB}axon-rl/gem/pull/113", normalised_again, objectives.grpo(), "gradient, on policy"
    ),
    "top-p samples are compared as they are": Bug(
        f"{GITHUB}huggingface/trl/issues/6789",
        by_sequence(surrogate),
        objectives.grpo(truncated=True),
        "gradient, on policy",
    ),
    "GRPO's ratio has no gradient": Bug(
        f"{GITHUB}Goekdeniz-Guelmez/mlx-lm-lora/issues/55",
        by_sequence(ratio_without_gradient),
        objectives.grpo(),
        "gradient, on policy",
    ),
}
