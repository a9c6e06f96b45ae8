"""The policy losses, each with its paper, its reduction and its defaults.

All take the keywords of `PolicyOptions` beside their own. Rows carry `logprobs` (as sampled),
`advantages` and `weights` (the mask), as `rl_datum` and `rollout_datum` make them; `old_logprobs`,
`ref_logprobs`, `teacher_logprobs` and `kept_mass` come by `losses.attach`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Unpack

from torch import Tensor

from fireworks_training._checks import number
from fireworks_training.errors import InvalidArgument
from fireworks_training.losses.library.policy import (
    PolicyLoss,
    PolicyOptions,
    Term,
    Tokens,
    checked,
)
from fireworks_training.losses.reductions import (
    Reduction,
    constant,
    per_sequence,
    per_token,
    plain_sum,
    reduction_of,
)
from fireworks_training.losses.tensors import policy

Twin = tuple[str, Mapping[str, float]]


def _loss(
    name: str,
    term: Callable[[Tokens], Term],
    reduction: Reduction,
    options: PolicyOptions,
    *,
    twin: Twin | None = None,
    compares: bool = True,
    teacher: float | None = None,
) -> PolicyLoss:
    return PolicyLoss(
        name=name,
        term=term,
        reduction=reduction_of(options.get("reduction", reduction)),
        twin=twin,
        compares=compares,
        teacher=teacher,
        **checked(options),
    )


def _clip(
    name: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    reduction: Reduction,
    options: PolicyOptions,
    ratio: Callable[[Tokens], Tensor] | None = None,
) -> PolicyLoss:
    """A clipped surrogate; the ratio is the token's unless another is given."""
    low, high = (
        1.0 - number("clip_low", clip_low, 0.0, 1.0),
        1.0 + number("clip_high", clip_high, 0.0),
    )
    if dual_clip is not None:
        number("dual_clip", dual_clip, high)

    def term(tokens: Tokens) -> Term:
        log_ratio_T = tokens.logprobs_T - tokens.old_T if ratio is None else ratio(tokens)
        advantages_T = tokens.advantages_T
        loss_T = policy.clipped(log_ratio_T, advantages_T, low, high, dual_clip)
        found_T = log_ratio_T.detach()
        return Term(
            loss_T,
            low_T=(advantages_T < 0) & (found_T < policy.log(low)),
            high_T=(advantages_T > 0) & (found_T > policy.log(high)),
        )

    kind = "ppo" if ratio is None else "gspo"
    twin = (kind, {"clip_low_threshold": low, "clip_high_threshold": high})
    return _loss(name, term, reduction, options, twin=twin if dual_clip is None else None)


def grpo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """GRPO (arXiv:2402.03300, eq. 3): -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    The mean over each row's tokens, then over rows. No KL by default; the paper's is kl="k3" with
    kl_coef=0.04. With reduction "sum" it is the trainer's `ppo`.

    Args:
        clip_low, clip_high: distances of the bounds from 1.
        dual_clip: bound of the ratio where the advantage is negative; None: no bound.
    """
    return _clip("grpo", clip_low, clip_high, dual_clip, per_sequence, options)


def dr_grpo(
    max_tokens: float,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """Dr. GRPO (arXiv:2503.20783, section 3.2): GRPO's term, summed, over N rows times a constant.

    Args:
        max_tokens: the constant: the longest completion that may be sampled, in tokens.
    """
    return _clip("dr_grpo", clip_low, clip_high, None, constant(max_tokens), options)


def dapo(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    **options: Unpack[PolicyOptions],
) -> PolicyLoss:
    """DAPO (arXiv:2503.14476, eq. 8): asymmetric clip, the mean over all tokens of the batch."""
    return _clip("dapo", clip_low, clip_high, dual_clip, per_token, options)


def gspo(
    *, clip_low: float = 3e-4, clip_high: float = 4e-4, **options: Unpack[PolicyOptions]
) -> PolicyLoss:
    """GSPO (arXiv:2507.18071, eq. 5 to 7): one ratio a row, s = exp(mean(l - old)).

    The loss is the mean over rows; s's mean is over the tokens that count. The clips are the
    paper's, far tighter than PPO's.
    """

    def ratio(tokens: Tokens) -> Tensor:
        means_S = tokens.rows.means(tokens.logprobs_T.detach() - tokens.old_T)
        return policy.sequence_log_ratio(means_S, tokens.rows.sequence_T, tokens.logprobs_T)

    return _clip("gspo", clip_low, clip_high, None, per_sequence, options, ratio)


def cispo(
    *, min_weight: float = 0.0, max_weight: float = 5.0, **options: Unpack[PolicyOptions]
) -> PolicyLoss:
    """CISPO (arXiv:2506.13585, eq. 4): -sg(clamp(r, min_weight, max_weight)) A l.

    The mean over tokens. No token loses its gradient. The bounds are those of the weight itself;
    5.0 is that of arXiv:2510.13786, and no lower bound the papers'.
    """
    number("min_weight", min_weight, 0.0)
    number("max_weight", max_weight, min_weight)
    if max_weight < 1.0:
        raise InvalidArgument(
            f"max_weight={max_weight:g} would cut the weight of every token that the current "
            "policy sampled: it bounds the ratio itself, so 1 + epsilon rather than epsilon"
        )

    def term(tokens: Tokens) -> Term:
        log_ratio_T = tokens.logprobs_T - tokens.old_T
        loss_T = policy.cispo(
            tokens.logprobs_T, log_ratio_T, tokens.advantages_T, min_weight, max_weight
        )
        found_T = log_ratio_T.detach()
        return Term(
            loss_T,
            low_T=found_T < policy.log(min_weight),
            high_T=found_T > policy.log(max_weight),
        )

    settings = {"clip_low_threshold": min_weight, "clip_high_threshold": max_weight}
    return _loss("cispo", term, per_token, options, twin=("cispo", settings))


def dppo(
    *, delta_low: float = 0.2, delta_high: float = 0.2, **options: Unpack[PolicyOptions]
) -> PolicyLoss:
    """DPPO (arXiv:2602.04879): -r A, without tokens whose *probability* moved too far along A.

    The mean over tokens. r is unbounded for a token that stays within the deltas.

    Args:
        delta_low, delta_high: how far a probability may fall under a negative advantage, and rise
            under a positive one.
    """
    number("delta_low", delta_low, 0.0, 1.0)
    number("delta_high", delta_high, 0.0, 1.0)

    def term(tokens: Tokens) -> Term:
        loss_T = policy.dppo(
            tokens.logprobs_T, tokens.old_T, tokens.advantages_T, delta_low, delta_high
        )
        moved_T = tokens.logprobs_T.detach().exp() - tokens.old_T.exp()
        return Term(
            loss_T,
            low_T=(tokens.advantages_T < 0) & (-moved_T > delta_low),
            high_T=(tokens.advantages_T > 0) & (moved_T > delta_high),
        )

    settings = {"delta_low": delta_low, "delta_high": delta_high}
    return _loss("dppo", term, per_token, options, twin=("dppo", settings))


def sapo(
    *, tau_positive: float = 1.0, tau_negative: float = 1.05, **options: Unpack[PolicyOptions]
) -> PolicyLoss:
    """SAPO (arXiv:2511.20347, eq. 6): -(4 / tau) sigmoid(tau (r - 1)) A.

    The mean over each row's tokens, then over rows.

    Args:
        tau_positive, tau_negative: temperature of the gate, by the sign of the advantage; above 0.
    """
    for name, value in (("tau_positive", tau_positive), ("tau_negative", tau_negative)):
        if number(name, value, 0.0) == 0.0:
            raise InvalidArgument(f"{name} must be above 0")

    def term(tokens: Tokens) -> Term:
        log_ratio_T = tokens.logprobs_T - tokens.old_T
        return Term(policy.sapo(log_ratio_T, tokens.advantages_T, tau_positive, tau_negative))

    return _loss("sapo", term, per_sequence, options)


def dro(*, beta: float = 0.05, **options: Unpack[PolicyOptions]) -> PolicyLoss:
    """DRO (arXiv:2405.19107, by token): -(A l - beta / 2 (l - old)^2), summed.

    A correction weighs the gain and not the square. With no option set it is the trainer's `dro`.

    Args:
        beta: weight of the square, which holds every counted token near the old policy.
    """
    number("beta", beta, 0.0)

    def term(tokens: Tokens) -> Term:
        return Term(policy.dro(tokens.logprobs_T, tokens.old_T, tokens.advantages_T, beta))

    return _loss("dro", term, plain_sum, options, twin=("dro", {"beta": beta}))


def reinforce(*, importance: bool = False, **options: Unpack[PolicyOptions]) -> PolicyLoss:
    """REINFORCE (Williams 1992): -A l, summed.

    With `importance` it is -r A, for rows of an older policy. With no option set it is the
    trainer's `reinforce`, with `importance` its `importance_sampling`.
    """

    def term(tokens: Tokens) -> Term:
        if importance:
            log_ratio_T = tokens.logprobs_T - tokens.old_T
            return Term(policy.importance(log_ratio_T, tokens.advantages_T))
        return Term(policy.reinforce(tokens.logprobs_T, tokens.advantages_T))

    twin: Twin = ("importance_sampling" if importance else "reinforce", {})
    return _loss("reinforce", term, plain_sum, options, twin=twin, compares=importance)


def distill(*, coef: float = 1.0, **options: Unpack[PolicyOptions]) -> PolicyLoss:
    """On-policy distillation: -r A with A = coef (teacher - q), the reverse KL a token, summed.

    Source: Thinking Machines, "On-Policy Distillation" (2025). `teacher_logprobs` of the rows are
    the teacher's logprobs of the sampled tokens; rows need no `advantages`.
    """
    number("coef", coef, 0.0)

    def term(tokens: Tokens) -> Term:
        log_ratio_T = tokens.logprobs_T - tokens.old_T
        return Term(policy.importance(log_ratio_T, tokens.advantages_T))

    return _loss("distill", term, plain_sum, options, teacher=coef)
