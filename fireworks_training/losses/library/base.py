"""What all losses have: a name, a reduction, totals, and perhaps a twin on the trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from fireworks_training.errors import InvalidArgument, NotSupported
from fireworks_training.losses.reductions import Reduction, Totals

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """A loss for `forward_backward_custom`; immutable, and safe to share.

    Attributes:
        name: its name in `fireworks_training.losses`.
        reduction: how its terms are added.
        totals: the size of the optimizer batch, where a call sees a part of it; None: each call is
            a whole one.
        twin: the trainer's built-in loss with the same terms, and its settings.
    """

    name: str
    reduction: Reduction
    totals: Totals | None = None
    twin: tuple[str, Mapping[str, float]] | None = None

    def __call__(
        self, data: Sequence[tinker.Datum], logprobs_list: list[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a call, and its metrics.

        Args:
            data: the rows.
            logprobs_list: for each row the logprob of each target, [N].

        Raises:
            InvalidDatum: a row lacks an array that the loss needs, or has one of another length.
            InvalidArgument: the call holds more than its totals.
        """
        raise NotImplementedError

    @property
    def needs_totals(self) -> bool:
        """Whether the loss divides by the size of the batch, and was not told it.

        Such a loss is right for a batch that goes out in one call. Spread over several, each call
        would take its own mean: hand the totals in with `over`. A training client that meets it
        twice in one step says so in its log.
        """
        return self.reduction.needs_totals and self.totals is None

    def over(self, totals: Totals) -> Self:
        """Make the same loss for calls that are parts of one optimizer batch."""
        if not isinstance(totals, Totals):
            raise InvalidArgument("over takes losses.totals(data), of all rows of the step")
        return dataclasses.replace(self, totals=totals)

    @property
    def builtin(self) -> tuple[str, dict[str, float]]:
        """The trainer's own loss of the same value and gradient, for `forward_backward`.

        `client.forward_backward(data, *loss.builtin)` computes it there. Established for this
        package's platform, and for rows whose ratio is to their `logprobs` (no `old_logprobs`, no
        `kept_mass`); other servers may sum in another way.

        Raises:
            NotSupported: there is none; says why.
        """
        if reason := self.no_twin():
            raise NotSupported(
                f"{self.name} as it is set has no built-in twin: {reason}. Use "
                "forward_backward_custom, which runs it here"
            )
        assert self.twin is not None
        return self.twin[0], dict(self.twin[1])

    def no_twin(self) -> str | None:
        """Why no built-in loss is the same; None where one is."""
        if self.twin is None:
            return "no built-in has its terms"
        if self.reduction.name != "sum":
            return f"built-ins are plain sums, and its reduction is {self.reduction.name}"
        return None


def floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Turn metrics into floats with one transfer; those that are not finite are left out."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    read = torch.stack([each.detach().double() for each in tensors.values()]).tolist()
    known = {**dict(zip(tensors, read, strict=True))}
    known |= {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    return {name: known[name] for name in values if math.isfinite(known[name])}
