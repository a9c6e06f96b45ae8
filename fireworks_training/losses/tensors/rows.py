"""Reads datums into flat tensors of the tokens that count. Knows masks; knows no loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fireworks_training.errors import InvalidArgument, InvalidDatum
from fireworks_training.losses.reductions import Reduction, Totals, mask_of

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True, slots=True)
class Rows:
    """The counted tokens of a batch, laid end to end.

    Attributes:
        logprobs_T: l, with its gradient.
        mask_T: the mask's entries, all above 0.
        sequence_T: the row of each token, from 0, int64.
        sizes_S: the sum of the mask of each row; 0 for a row in which nothing counts.
        inputs: other arrays of the rows by name, T entries each.
    """

    logprobs_T: Tensor
    mask_T: Tensor
    sequence_T: Tensor
    sizes_S: Tensor
    inputs: dict[str, Tensor]

    def sums(self, values_T: Tensor) -> Tensor:
        """Add the values of each row, weighted by the mask: S entries."""
        zeros_S = torch.zeros_like(self.sizes_S, dtype=values_T.dtype)
        return zeros_S.index_add(0, self.sequence_T, self.mask_T * values_T)

    def means(self, values_T: Tensor) -> Tensor:
        """Compute each row's mean of the values, weighted by the mask; 0 for an empty row."""
        return self.sums(values_T) / torch.where(self.sizes_S == 0, 1.0, self.sizes_S)

    def totals(self) -> Totals:
        """Count what is here."""
        return Totals(int((self.sizes_S > 0).sum()), float(self.sizes_S.double().sum()))

    def need(self, name: str, why: str) -> Tensor:
        """Take an array by its name.

        Raises:
            InvalidDatum: the rows do not have it.
        """
        if name not in self.inputs:
            raise InvalidDatum(
                f"the datums have no {name!r}, which is needed {why}: losses.attach(data, "
                f"{name}=...) adds an array of each datum's length"
            )
        return self.inputs[name]


def read_rows(
    data: Sequence[tinker.Datum], logprobs_list: Sequence[Tensor], names: Sequence[str]
) -> Rows:
    """Read the rows of a call.

    Args:
        names: the arrays to take beside the mask, where the rows have them.

    Raises:
        InvalidArgument: not one logprob tensor for each datum.
        InvalidDatum: an array has another length than the targets, or some rows lack what others
            have; no token counts in the whole batch.
    """
    if len(data) != len(logprobs_list) or not data:
        raise InvalidArgument(f"{len(logprobs_list)} logprob tensors for {len(data)} datums")
    masks: list[Any] = []
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for index, (datum, leaf) in enumerate(zip(data, logprobs_list, strict=True)):
        inputs = datum.loss_fn_inputs
        row = {name: inputs[name].to_numpy() for name in names if name in inputs}
        mask = mask_of(datum, index)
        for name, values in (("weights", mask), *row.items()):
            if leaf.ndim != 1 or values.shape != tuple(leaf.shape):
                raise InvalidDatum(
                    f"datum {index}: {name!r} has the shape {values.shape}, its logprobs have "
                    f"{tuple(leaf.shape)}; both must be [N], one entry for each target",
                    index=index,
                )
            if name in row:
                columns[name].append(values)
        masks.append(mask)
    mask = np.concatenate(masks)
    places = np.flatnonzero(mask)
    if not places.size:
        raise InvalidDatum("no token of the batch counts: the mask of every datum is 0 everywhere")
    all_count = places.size == mask.size
    flat = torch.cat([*logprobs_list])

    def tensor(values: Any) -> Tensor:
        kept = values if all_count else values[places]
        return torch.from_numpy(kept).to(dtype=flat.dtype, device=flat.device)

    index_T = np.repeat(np.arange(len(masks)), [len(each) for each in masks])
    sequence_T = torch.from_numpy(index_T if all_count else index_T[places]).to(flat.device)
    mask_T = tensor(mask)
    return Rows(
        flat if all_count else flat[torch.from_numpy(places).to(flat.device)],
        mask_T,
        sequence_T,
        flat.new_zeros(len(masks)).index_add(0, sequence_T, mask_T),
        {
            name: tensor(_whole(name, column, len(data)))
            for name, column in columns.items()
            if column
        },
    )


def _whole(name: str, column: list[Any], count: int) -> Any:
    if len(column) != count:
        raise InvalidDatum(f"{len(column)} of {count} datums have {name!r}: give it to all or none")
    return np.concatenate(column)


def reduce(values_T: Tensor, rows: Rows, how: Reduction, given: Totals | None) -> Tensor:
    """Add the terms of the tokens, as the reduction says, over the whole optimizer batch.

    Raises:
        InvalidArgument: the totals handed in are smaller than this part of the batch.
    """
    weighted_T = rows.mask_T * values_T
    if how.name == "sum":
        return weighted_T.sum()
    size = checked_totals(rows, given)
    if how.name == "per_token":
        return weighted_T.sum() / size.tokens
    if how.name == "constant":
        assert how.length is not None
        return weighted_T.sum() / (size.sequences * how.length)
    return rows.means(values_T).sum() / size.sequences


def checked_totals(rows: Rows, given: Totals | None) -> Totals:
    """The totals that were handed in, or those of this call where it is the whole batch."""
    here = rows.totals()
    if given is None:
        return here
    if here.sequences > given.sequences or here.tokens > given.tokens * (1 + 1e-6):
        raise InvalidArgument(
            f"this call has {here.sequences} rows and {here.tokens:g} tokens, more than the totals "
            f"of its optimizer batch ({given.sequences} and {given.tokens:g}): make them of all "
            "rows of the step, losses.totals(all_rows)"
        )
    return given
