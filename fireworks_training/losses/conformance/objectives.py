"""What a loss claims to compute: the published objectives, as exact arithmetic on rows.

An objective has the value and the derivative of every logprob. The defaults are the papers'; `kl`,
`kl_coef`, `correction` and `reduction` are taken as in `fireworks_training.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from fireworks_training._checks import one_of
from fireworks_training.errors import InvalidArgument
from fireworks_training.losses.conformance import arithmetic
from fireworks_training.losses.conformance.arithmetic import Counted, PairTerm, Term, Terms
from fireworks_training.losses.conformance.cases import Row
from fireworks_training.losses.corrections import Correction, CorrectionName, correction_of
from fireworks_training.losses.reductions import Reduction, Totals, reduction_of

Exact = tuple[float, list[list[float]]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A published objective, exactly.

    Attributes:
        name: what it is called in the table.
        reduction: how terms are added.
        arrays: names of the datum arrays that its rows carry, beside `target_tokens`, `weights`.
        row: the terms of a row; None for an objective of pairs.
        pair: the term of a pair; None for one of rows.
        referred: whether a reference has a say.
    """

    name: str
    reduction: Reduction
    arrays: tuple[str, ...]
    row: Callable[[Counted], Terms] | None = None
    pair: Callable[[Counted, Counted], PairTerm] | None = None
    referred: bool = False

    @property
    def unit(self) -> int:
        """Rows that belong together: 2 for pairs."""
        return 1 if self.pair is None else 2

    def prepared(self, rows: Sequence[Row]) -> list[Row]:
        """The rows as this objective reads them: without logprobs of the trainer's own, the ratio's
        denominator is the sampler's."""
        if "old_logprobs" in self.arrays:
            return list(rows)
        return [replace(row, old=row.sampled) for row in rows]

    def exact(self, rows: Sequence[Row], totals: Totals | None = None) -> Exact:
        """The value, and for each row the derivative by each logprob, 0 where nothing counts."""
        size = totals or totals_of(rows)
        if self.pair is not None:
            return self._exact_pairs(rows, size)
        assert self.row is not None
        value, slopes = 0.0, list[list[float]]()
        for row in rows:
            counted = row.counted()
            if not counted.logprobs:
                slopes.append([0.0] * len(row.mask))
                continue
            share = _share(self.reduction, len(counted.logprobs), size)
            terms, gradients = self.row(counted)
            value += share * sum(terms)
            slopes.append(_spread(row, [share * each for each in gradients]))
        return value, slopes

    def _exact_pairs(self, rows: Sequence[Row], size: Totals) -> Exact:
        assert self.pair is not None
        share = 1.0 if self.reduction.name == "sum" else 2.0 / size.sequences
        value, slopes = 0.0, list[list[float]]()
        for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
            term, up, down = self.pair(chosen.counted(), rejected.counted())
            value += share * term
            slopes.append(_spread(chosen, [share * each for each in up]))
            slopes.append(_spread(rejected, [share * each for each in down]))
        return value, slopes


def totals_of(rows: Sequence[Row]) -> Totals:
    """Count the rows and the tokens of a batch."""
    counts = [sum(row.mask) for row in rows]
    return Totals(sum(count > 0 for count in counts), float(sum(counts)))


def _share(how: Reduction, length: int, size: Totals) -> float:
    """What a term of a row counts for in the loss."""
    if how.name == "per_token":
        return 1.0 / size.tokens
    if how.name == "per_sequence":
        return 1.0 / (length * size.sequences)
    return 1.0 if how.length is None else 1.0 / (size.sequences * how.length)


def _spread(row: Row, values: Sequence[float]) -> list[float]:
    """Values of the counted tokens in their places, 0 elsewhere."""
    left = iter(values)
    return [next(left) if keep else 0.0 for keep in row.mask]


class Options(TypedDict, total=False):
    """Keywords of the policy objectives.

    Attributes:
        reduction: another than the paper's.
        kl, kl_coef, kl_cap: a KL to the reference.
        correction: a correction for a sampler that differs from the trainer.
        truncated: the sampler used top-p or top-k; `logprobs` are those of what it kept, and the
            rows carry the probability of that, `kept_mass`.
    """

    reduction: Reduction | str
    kl: str | None
    kl_coef: float
    kl_cap: float
    correction: Correction | CorrectionName | None
    truncated: bool


def _policy(
    name: str,
    term: Term,
    reduction: str | Reduction,
    options: Options,
    *,
    teacher: float | None = None,
) -> Objective:
    if unknown := options.keys() - Options.__annotations__.keys():
        raise InvalidArgument(f"unknown keywords of an objective: {sorted(unknown)}")
    kl, coef = options.get("kl"), options.get("kl_coef", 0.0)
    one_of("kl", kl, (None, "k1_in_reward", "k2", "k3", "k3+"))
    how = correction_of(options.get("correction"))

    def row(counted: Counted) -> Terms:
        if options.get("truncated"):
            counted = _of_the_whole_vocabulary(counted, same=how is None)
        given = counted.advantages
        if teacher is not None:
            pairs = zip(counted.teacher, counted.sampled, strict=True)
            given = [teacher * (taught - sampled) for taught, sampled in pairs]
        if how is not None:
            weights = arithmetic.correction(how.kind, how.low, how.high, counted)
        else:
            weights = [1.0] * len(given)
        if kl == "k1_in_reward":
            rows = zip(given, counted.logprobs, counted.reference, strict=True)
            given = [a - coef * (l - reference) for a, l, reference in rows]
        values, slopes = term(counted, [w * a for w, a in zip(weights, given, strict=True)])
        if kl in (None, "k1_in_reward"):
            return values, slopes
        assert kl is not None
        extra, more = arithmetic.kl_terms(kl, counted, options.get("kl_cap", 10.0))
        return (
            [x + coef * y for x, y in zip(values, extra, strict=True)],
            [x + coef * y for x, y in zip(slopes, more, strict=True)],
        )

    arrays = ["logprobs", "advantages"]
    arrays += ["old_logprobs"] if how is not None else []
    arrays += ["kept_mass"] if options.get("truncated") else []
    arrays += ["ref_logprobs"] if kl is not None else []
    if teacher is not None:
        arrays += ["teacher_logprobs"]
    label = "".join(f", {each}" for each in (kl, how and how.kind) if each)
    return Objective(
        name=name + label,
        reduction=reduction_of(options.get("reduction", reduction)),
        arrays=tuple(arrays),
        row=row,
        referred=kl is not None,
    )


def _of_the_whole_vocabulary(row: Counted, *, same: bool) -> Counted:
    """The row with the sampler's logprobs before it cut its distribution: q + log(kept).

    Args:
        same: whether the ratio's denominator is the sampler's logprob.
    """
    pairs = zip(row.sampled, row.kept, strict=True)
    sampled = [q + math.log(kept) for q, kept in pairs]
    return replace(row, sampled=sampled, old=sampled if same else row.old)


def grpo(*, clip_low: float = 0.2, clip_high: float = 0.2, **options: Unpack[Options]) -> Objective:
    """GRPO, arXiv:2402.03300."""
    term = arithmetic.token_clip(1 - clip_low, 1 + clip_high)
    return _policy("grpo", term, "per_sequence", options)


def dr_grpo(
    max_tokens: float,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    **options: Unpack[Options],
) -> Objective:
    """Dr. GRPO, arXiv:2503.20783."""
    term = arithmetic.token_clip(1 - clip_low, 1 + clip_high)
    return _policy("dr_grpo", term, Reduction("constant", max_tokens), options)


def dapo(
    *, clip_low: float = 0.2, clip_high: float = 0.28, **options: Unpack[Options]
) -> Objective:
    """DAPO, arXiv:2503.14476."""
    term = arithmetic.token_clip(1 - clip_low, 1 + clip_high)
    return _policy("dapo", term, "per_token", options)


def gspo(
    *, clip_low: float = 3e-4, clip_high: float = 4e-4, **options: Unpack[Options]
) -> Objective:
    """GSPO, arXiv:2507.18071."""
    term = arithmetic.sequence_clip(1 - clip_low, 1 + clip_high)
    return _policy("gspo", term, "per_sequence", options)


def cispo(
    *, min_weight: float = 0.0, max_weight: float = 5.0, **options: Unpack[Options]
) -> Objective:
    """CISPO, arXiv:2506.13585; the bounds are those of the weight itself."""
    return _policy("cispo", arithmetic.cispo(min_weight, max_weight), "per_token", options)


def dppo(
    *, delta_low: float = 0.2, delta_high: float = 0.2, **options: Unpack[Options]
) -> Objective:
    """DPPO with the total-variation mask, arXiv:2602.04879."""
    return _policy("dppo", arithmetic.dppo(delta_low, delta_high), "per_token", options)


def sapo(
    *, tau_positive: float = 1.0, tau_negative: float = 1.05, **options: Unpack[Options]
) -> Objective:
    """SAPO, arXiv:2511.20347."""
    term = arithmetic.sapo(tau_positive, tau_negative)
    return _policy("sapo", term, "per_sequence", options)


def dro(*, beta: float = 0.05, **options: Unpack[Options]) -> Objective:
    """DRO by token, arXiv:2405.19107."""
    return _policy("dro", arithmetic.dro(beta), "sum", options)


def reinforce(*, importance: bool = False, **options: Unpack[Options]) -> Objective:
    """REINFORCE, or importance sampling."""
    term = arithmetic.importance() if importance else arithmetic.reinforce()
    return _policy("importance" if importance else "reinforce", term, "sum", options)


def distill(*, coef: float = 1.0, **options: Unpack[Options]) -> Objective:
    """On-policy distillation: importance sampling with teacher - q as the advantage."""
    return _policy("distill", arithmetic.importance(), "sum", options, teacher=coef)


def sft(*, reduction: Reduction | str = "per_token") -> Objective:
    """The negative log-likelihood of the tokens that count."""
    term = arithmetic.supervised()
    return Objective(
        name="sft",
        reduction=reduction_of(reduction),
        arrays=(),
        row=lambda counted: term(counted, counted.advantages),
    )


def _pairs(
    name: str,
    pair: Callable[[Counted, Counted], PairTerm],
    reduction: str,
    *,
    referred: bool,
) -> Objective:
    one_of("reduction", reduction, ("per_pair", "sum"))
    return Objective(
        name=name,
        reduction=reduction_of("sum" if reduction == "sum" else "per_sequence"),
        arrays=("ref_logprobs",) if referred else (),
        pair=pair,
        referred=referred,
    )


def dpo(
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    reduction: str = "per_pair",
) -> Objective:
    """DPO, arXiv:2305.18290."""

    def pair(chosen: Counted, rejected: Counted) -> PairTerm:
        return arithmetic.dpo(
            chosen, rejected, beta=beta, smoothing=label_smoothing, means=length_normalized
        )

    return _pairs("dpo", pair, reduction, referred=True)


def ipo(*, tau: float = 0.1, reduction: str = "per_pair") -> Objective:
    """IPO of means, arXiv:2310.12036."""
    return _pairs("ipo", lambda c, r: arithmetic.ipo(c, r, tau=tau), reduction, referred=True)


def orpo(*, lam: float = 0.1, reduction: str = "per_pair") -> Objective:
    """ORPO, arXiv:2403.07691."""
    return _pairs("orpo", lambda c, r: arithmetic.orpo(c, r, lam=lam), reduction, referred=False)
