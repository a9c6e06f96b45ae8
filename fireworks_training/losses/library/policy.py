"""The frame of all policy losses: which logprobs are compared, corrections, KL, metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from fireworks_training._checks import integer, number, one_of
from fireworks_training.errors import InvalidArgument, InvalidDatum, UnknownOption
from fireworks_training.losses.corrections import Correction, CorrectionName, correction_of
from fireworks_training.losses.library.base import BatchLoss, floats
from fireworks_training.losses.reductions import Reduction, Totals
from fireworks_training.losses.tensors import kl as estimators
from fireworks_training.losses.tensors.corrections import correction_weights
from fireworks_training.losses.tensors.rows import Rows, read_rows, reduce

if TYPE_CHECKING:
    import tinker

KLName = Literal["k1_in_reward", "k2", "k3", "k3+"]


class PolicyOptions(TypedDict, total=False):
    """Keywords that all policy losses take.

    Attributes:
        reduction: see `fireworks_training.losses.reductions`; a loss's default is its paper's.
        totals: the size of the optimizer batch, for a call that is a part of it.
        kl: the estimator of the KL to a reference, whose logprobs are the rows' `ref_logprobs`:
            "k2", "k3" or "k3+" as a loss, "k1_in_reward" inside the advantage. None: no KL.
        kl_coef: its weight.
        kl_cap: bound of the KL's importance weight, for rows of an older policy.
        correction: for a sampler that computes other logprobs than the trainer; a
            `Correction` or its name.
        old: the ratio's denominator. "given": the rows' `old_logprobs`, else their `logprobs`.
            "current": the logprobs of this call, without a gradient (one update a batch).
        top_p, top_k: how the rows were sampled. Anything but 1.0 and 0 needs the rows' `kept_mass`.
    """

    reduction: Reduction | str
    totals: Totals | None
    kl: KLName | None
    kl_coef: float
    kl_cap: float
    correction: Correction | CorrectionName | None
    old: Literal["given", "current"]
    top_p: float
    top_k: int


class Tokens(NamedTuple):
    """What a policy term is computed from; T entries each.

    Attributes:
        logprobs_T: l, with its gradient.
        old_T: the denominator of the ratio, without one; zeros for a loss without a ratio.
        advantages_T: A, times the correction's weight.
        rows: the rows that they are of.
    """

    logprobs_T: Tensor
    old_T: Tensor
    advantages_T: Tensor
    rows: Rows


class Term(NamedTuple):
    """The loss of each token; and which tokens a lower and an upper bound hold."""

    loss_T: Tensor
    low_T: Tensor | None = None
    high_T: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyLoss(BatchLoss):
    """A policy term with a reduction, a KL and a correction.

    Attributes:
        term: the loss of each token.
        compares: whether the term has a ratio or another comparison with the old logprobs.
        teacher: the coefficient of a teacher whose log-ratio is the advantage; None: the rows have
            `advantages`.
        kl, kl_coef, kl_cap, correction, old, truncated: as in `PolicyOptions`; `truncated` says
            that top-p or top-k was used.
    """

    term: Callable[[Tokens], Term]
    compares: bool = True
    teacher: float | None = None
    kl: KLName | None = None
    kl_coef: float = 0.0
    kl_cap: float = 10.0
    correction: Correction | None = None
    old: Literal["given", "current"] = "given"
    truncated: bool = False

    def __call__(
        self, data: Sequence[tinker.Datum], logprobs_list: list[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a call, and its metrics.

        Metrics, absent where they can't be known: `ratio/mean`, `ratio/max_log`, `clip_ratio/low`
        and `clip_ratio/high` (shares of tokens that a bound holds), `kl/k1` and `kl/k3` (to the
        reference), `mismatch/k1` and `mismatch/k3` (old to sampled), `correction/weight_mean`,
        `correction/dropped`, `correction/capped`, `tokens`, `sequences`.

        Raises:
            InvalidDatum: the rows lack an array that the loss needs, or have it in another length.
            InvalidArgument: the call holds more than its totals.
        """
        rows = read_rows(data, logprobs_list, self._arrays())
        sampled_T = self._sampled(rows)
        old_T = self._old(rows, sampled_T)
        advantages_T = self._advantages(rows, sampled_T)
        weights_T: Tensor | None = None
        if self.correction is not None:
            weights_T = self._weights(self.correction, rows, old_T, sampled_T)
            advantages_T = advantages_T * weights_T
        term = self.term(Tokens(rows.logprobs_T, old_T, advantages_T, rows))
        terms_T = term.loss_T
        if self.kl is not None and self.kl != estimators.IN_REWARD and self.kl_coef:
            reference_T = rows.need("ref_logprobs", f"for kl={self.kl!r}")
            penalty_T = estimators.as_loss(
                self.kl, rows.logprobs_T, reference_T, sampled_T, self.kl_cap
            )
            terms_T = terms_T + self.kl_coef * penalty_T
        loss = reduce(terms_T, rows, self.reduction, self.totals)
        with torch.no_grad():
            return loss, self._metrics(rows, term, old_T, sampled_T, weights_T)

    def _arrays(self) -> tuple[str, ...]:
        """The arrays to read, where the rows have them."""
        compared = self.compares or self.kl is not None or self.correction is not None
        return (
            *(("logprobs", "old_logprobs", "kept_mass") if compared else ()),
            "ref_logprobs",
            "advantages" if self.teacher is None else "teacher_logprobs",
        )

    def no_twin(self) -> str | None:
        """Why no built-in loss is the same; None where one is."""
        if self.kl is not None:
            return "built-ins have no KL term"
        if self.correction is not None or self.truncated or self.old != "given":
            return "built-ins compare with the sampler's logprobs, as they are"
        return super().no_twin()

    def _sampled(self, rows: Rows) -> Tensor | None:
        """q, brought back to the whole vocabulary where the sampler kept a part of it."""
        sampled_T = rows.inputs.get("logprobs")
        kept_T = rows.inputs.get("kept_mass")
        if kept_T is None and self.truncated and (self.compares or self.kl is not None):
            raise InvalidDatum(
                "the rows were sampled with top_p or top_k, whose logprobs are those of a "
                "renormalised distribution: ratios against them are biased. Sample with "
                "top_p=1.0 and top_k=0, or add 'kept_mass' to the rows, the probability that was "
                "kept at each token"
            )
        if sampled_T is None or kept_T is None:
            return sampled_T
        if bool(((kept_T <= 0) | (kept_T > 1 + 1e-6)).any()):
            raise InvalidDatum("'kept_mass' is a probability: above 0 and at most 1")
        return sampled_T + torch.log(kept_T)

    def _old(self, rows: Rows, sampled_T: Tensor | None) -> Tensor:
        if self.old == "current":
            return rows.logprobs_T.detach()
        if "old_logprobs" in rows.inputs:
            return rows.inputs["old_logprobs"]
        if sampled_T is not None:
            return sampled_T
        if self.compares:
            rows.need("logprobs", f"as {self.name} compares with the policy that sampled")
        return torch.zeros_like(rows.logprobs_T, requires_grad=False)

    def _advantages(self, rows: Rows, sampled_T: Tensor | None) -> Tensor:
        if self.teacher is not None:
            taught_T = rows.need("teacher_logprobs", f"for {self.name}'s teacher")
            if sampled_T is None:
                sampled_T = rows.need("logprobs", f"for {self.name}'s advantage")
            advantages_T = self.teacher * (taught_T - sampled_T)
        else:
            advantages_T = rows.need("advantages", f"for {self.name}")
        if self.kl == estimators.IN_REWARD:
            reference_T = rows.need("ref_logprobs", f"for kl={self.kl!r}")
            gap_T = estimators.k1(rows.logprobs_T.detach(), reference_T)
            advantages_T = advantages_T - self.kl_coef * gap_T
        return advantages_T

    def _weights(
        self, how: Correction, rows: Rows, old_T: Tensor, sampled_T: Tensor | None
    ) -> Tensor:
        if sampled_T is None:
            sampled_T = rows.need("logprobs", f"for the correction {how.kind!r}")
        if self.old == "given":
            rows.need(
                "old_logprobs",
                f"for the correction {how.kind!r}, as the trainer computed them before the step "
                "(or pass old='current')",
            )
        return correction_weights(how, old_T - sampled_T, rows)

    def _metrics(
        self,
        rows: Rows,
        term: Term,
        old_T: Tensor,
        sampled_T: Tensor | None,
        weights_T: Tensor | None,
    ) -> dict[str, float]:
        here = rows.here

        def mean(values_T: Tensor) -> Tensor:
            return torch.dot(rows.mask_T, values_T.to(rows.mask_T.dtype)) / here.tokens

        found: dict[str, Tensor | float] = {}
        if self.compares:
            log_ratio_T = rows.logprobs_T - old_T
            found |= {"ratio/mean": mean(log_ratio_T.exp()), "ratio/max_log": log_ratio_T.max()}
        if term.low_T is not None:
            found["clip_ratio/low"] = mean(term.low_T)
        if term.high_T is not None:
            found["clip_ratio/high"] = mean(term.high_T)
        pairs = {"kl": (rows.logprobs_T, rows.inputs.get("ref_logprobs"))}
        if sampled_T is not None and old_T is not sampled_T:
            pairs["mismatch"] = (sampled_T, old_T)
        for name, (first_T, second_T) in pairs.items():
            if second_T is not None:
                found[f"{name}/k1"] = mean(estimators.k1(first_T, second_T))
                found[f"{name}/k3"] = mean(estimators.k3(first_T, second_T))
        if weights_T is not None and self.correction is not None:
            found["correction/weight_mean"] = mean(weights_T)
            if self.correction.kind == "tis":
                found["correction/capped"] = mean(weights_T >= self.correction.high)
            elif self.correction.kind != "decoupled":
                found["correction/dropped"] = mean(weights_T == 0)
        found |= {"tokens": here.tokens, "sequences": float(here.sequences)}
        return (
            floats(found)
            if any(isinstance(v, Tensor) for v in found.values())
            else {"tokens": here.tokens, "sequences": float(here.sequences)}
        )


class CheckedOptions(TypedDict, total=False):
    """The fields of `PolicyLoss` that options become."""

    totals: Totals | None
    kl: KLName | None
    kl_coef: float
    kl_cap: float
    correction: Correction | None
    old: Literal["given", "current"]
    truncated: bool


def checked(options: PolicyOptions) -> CheckedOptions:
    """Check the options of a policy loss.

    Raises:
        InvalidArgument: a value is out of range; k1 as a loss; a KL without a weight or a weight
            without a KL.
    """
    if unknown := options.keys() - PolicyOptions.__annotations__.keys():
        raise UnknownOption(
            f"unknown keywords {sorted(unknown)}; policy losses take "
            f"{', '.join(PolicyOptions.__annotations__)}"
        )
    kl: str | None = options.get("kl")
    if kl == "k1":
        raise InvalidArgument(f"kl='k1': {estimators.WHY_NOT_K1}")
    one_of("kl", kl, (None, estimators.IN_REWARD, *estimators.AS_LOSS))
    coefficient = number("kl_coef", options.get("kl_coef", 0.0), 0.0)
    if kl is None and coefficient:
        raise InvalidArgument("kl_coef without kl has no effect: kl='k2' is a penalty as a loss")
    if kl is not None and not coefficient:
        raise InvalidArgument(f"{kl=} needs its weight, kl_coef above 0")
    top_p = number("top_p", options.get("top_p", 1.0), 0.0, 1.0)
    top_k = integer("top_k", options.get("top_k", 0), -1)
    old = options.get("old", "given")
    one_of("old", old, ("given", "current"))
    return {
        "totals": options.get("totals"),
        "kl": options.get("kl"),
        "kl_coef": coefficient,
        "kl_cap": number("kl_cap", options.get("kl_cap", 10.0), 1.0),
        "correction": correction_of(options.get("correction")),
        "old": old,
        "truncated": top_p < 1.0 or top_k > 0,
    }
