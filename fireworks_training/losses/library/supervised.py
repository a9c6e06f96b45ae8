"""Supervised and preference losses: `sft`, `dpo`, `ipo`, `orpo`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fireworks_training._checks import number
from fireworks_training.errors import InvalidArgument, InvalidDatum
from fireworks_training.losses.library.base import BatchLoss, floats
from fireworks_training.losses.reductions import Reduction, Totals, reduction_of
from fireworks_training.losses.tensors import preference
from fireworks_training.losses.tensors.rows import Rows, checked_totals, read_rows, reduce

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True, kw_only=True)
class SupervisedLoss(BatchLoss):
    """-l of each counted token."""

    def __call__(
        self, data: Sequence[tinker.Datum], logprobs_list: list[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a call, and its metrics: `nll` (a token), `tokens`, `sequences`."""
        rows = read_rows(data, logprobs_list, ())
        loss = reduce(-rows.logprobs_T, rows, self.reduction, self.totals)
        here = rows.here
        nll = -torch.dot(rows.mask_T, rows.logprobs_T.detach()) / here.tokens
        return loss, floats({"nll": nll, "tokens": here.tokens, "sequences": float(here.sequences)})


Pair = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(BatchLoss):
    """A loss of pairs of rows: rows 2i and 2i + 1 are the chosen and the rejected response.

    Attributes:
        pair: (chosen_B, rejected_B) -> loss_B, of the responses' sums or means.
        means: whether a response counts by its mean a token, not its sum.
        referred: whether logprobs of a reference are subtracted: `ref_logprobs` of the rows.
        scale: beta of the implicit rewards in the metrics.
    """

    pair: Pair
    means: bool
    referred: bool
    scale: float

    def __call__(
        self, data: Sequence[tinker.Datum], logprobs_list: list[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the mean of the pairs' losses (or their sum), and the metrics.

        Metrics: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`,
        `logps/chosen`, `logps/rejected`, `pairs`, `tokens`.

        Raises:
            InvalidDatum: an odd number of rows, a response without a counted token, or rows
                without `ref_logprobs` where they are needed.
        """
        rows = read_rows(data, logprobs_list, ("ref_logprobs",) if self.referred else ())
        self._check_pairs(rows)
        values_T = rows.logprobs_T
        if self.referred:
            values_T = values_T - rows.need("ref_logprobs", f"for {self.name}'s reference")
        values_S = rows.means(values_T) if self.means else rows.sums(values_T)
        chosen_B, rejected_B = values_S[0::2], values_S[1::2]
        loss = self.pair(chosen_B, rejected_B).sum()
        if self.reduction.name != "sum":
            loss = loss / (checked_totals(rows, self.totals).sequences / 2)
        won, lost = chosen_B.detach(), rejected_B.detach()
        logps_S = rows.sums(rows.logprobs_T.detach())
        return loss, floats(
            {
                "rewards/chosen": self.scale * won.mean(),
                "rewards/rejected": self.scale * lost.mean(),
                "rewards/margins": self.scale * (won - lost).mean(),
                "rewards/accuracies": (won > lost).double().mean(),
                "logps/chosen": logps_S[0::2].mean(),
                "logps/rejected": logps_S[1::2].mean(),
                "pairs": len(data) / 2,
                "tokens": rows.here.tokens,
            }
        )

    def _check_pairs(self, rows: Rows) -> None:
        if len(rows.sizes_S) % 2:
            raise InvalidDatum(
                f"{len(rows.sizes_S)} rows are no pairs: rows 2i and 2i + 1 are the chosen and the "
                "rejected response"
            )
        empty = (rows.sizes_S == 0).nonzero()
        if len(empty):
            index = int(empty[0])
            raise InvalidDatum(f"datum {index}: no token of the response counts", index=index)


def sft(
    *, reduction: Reduction | str = "per_token", totals: Totals | None = None
) -> SupervisedLoss:
    """Supervised fine-tuning: -sum(m l) / sum(m), over the optimizer batch.

    With reduction "sum" it is the trainer's `cross_entropy`.
    """
    return SupervisedLoss(
        name="sft",
        reduction=reduction_of(reduction),
        totals=totals,
        twin=("cross_entropy", {}),
    )


def _pairs(reduction: str) -> Reduction:
    """The reduction of a preference loss: a pair is what counts there."""
    if reduction not in ("per_pair", "sum"):
        raise InvalidArgument(f"reduction={reduction!r}: allowed are per_pair, sum")
    return Reduction("sum" if reduction == "sum" else "per_sequence")


def dpo(
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    reduction: str = "per_pair",
    totals: Totals | None = None,
) -> PreferenceLoss:
    """Direct preference optimisation (arXiv:2305.18290, eq. 7): -log sigmoid(beta h).

    h = (l_c - ref_c) - (l_r - ref_r), of the sums over each response's counted tokens.

    Args:
        beta: above 0.
        label_smoothing: the share of pairs whose labels are taken to be wrong, from 0 to 0.5.
        length_normalized: h of means, as Tulu 3 (arXiv:2411.15124); beta is then about 5.
        reduction: "per_pair": the mean over pairs; or "sum".
    """
    scale = _positive("beta", beta)
    number("label_smoothing", label_smoothing, 0.0, 0.5)
    return PreferenceLoss(
        name="dpo",
        reduction=_pairs(reduction),
        totals=totals,
        pair=lambda won_B, lost_B: preference.dpo(won_B - lost_B, scale, label_smoothing),
        means=length_normalized,
        referred=True,
        scale=scale,
    )


def ipo(
    *, tau: float = 0.1, reduction: str = "per_pair", totals: Totals | None = None
) -> PreferenceLoss:
    """Identity preference optimisation (arXiv:2310.12036, eq. 17): (h - 1 / (2 tau))^2, h of means.

    Args:
        tau: strength of the regularisation, above 0.
        reduction: "per_pair": the mean over pairs; or "sum".
    """
    scale = _positive("tau", tau)
    return PreferenceLoss(
        name="ipo",
        reduction=_pairs(reduction),
        totals=totals,
        pair=lambda won_B, lost_B: preference.ipo(won_B - lost_B, scale),
        means=True,
        referred=True,
        scale=scale,
    )


def orpo(
    *, lam: float = 0.1, reduction: str = "per_pair", totals: Totals | None = None
) -> PreferenceLoss:
    """Odds-ratio preference optimisation (arXiv:2403.07691, eq. 6 and 7), without a reference.

    NLL of the chosen response - lam log sigmoid(log odds_c - log odds_r), both of mean logprobs
    over whole responses, opening words that both share included.

    Args:
        lam: weight of the odds-ratio term; the paper's is 0.1.
        reduction: "per_pair": the mean over pairs; or "sum".
    """
    number("lam", lam, 0.0)
    return PreferenceLoss(
        name="orpo",
        reduction=_pairs(reduction),
        totals=totals,
        pair=lambda won_B, lost_B: preference.orpo(won_B, lost_B, lam),
        means=True,
        referred=False,
        scale=lam,
    )


def _positive(name: str, value: float) -> float:
    if number(name, value, 0.0) == 0.0:
        raise InvalidArgument(f"{name} must be above 0")
    return float(value)
