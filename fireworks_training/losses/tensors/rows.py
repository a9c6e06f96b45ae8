"""Reads datums into flat tensors of the tokens that count. Knows masks; knows no loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fireworks_training.errors import InvalidArgument, InvalidDatum
from fireworks_training.losses.reductions import Reduction, Totals, check_masks, unchecked_mask

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True)
class Rows:
    """The counted tokens of a batch, laid end to end.

    Attributes:
        logprobs_T: l, with its gradient.
        mask_T: the mask's entries, all above 0.
        places: where the tokens stand in all targets laid end to end; None: every target counts.
        lengths: how many targets each row has.
        sizes_S: the sum of the mask of each row; 0 for a row in which nothing counts.
        here: how many rows and tokens these are.
        inputs: other arrays of the rows by name, T entries each.
    """

    logprobs_T: Tensor
    mask_T: Tensor
    places: Any
    lengths: Any
    sizes_S: Tensor
    here: Totals
    inputs: dict[str, Tensor]

    @cached_property
    def sequence_T(self) -> Tensor:
        """The row of each token, from 0, int64."""
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        kept = rows if self.places is None else rows[self.places]
        return torch.from_numpy(kept).to(self.mask_T.device)

    def sums(self, values_T: Tensor) -> Tensor:
        """Add the values of each row, weighted by the mask: S entries."""
        zeros_S = torch.zeros_like(self.sizes_S, dtype=values_T.dtype)
        return zeros_S.index_add(0, self.sequence_T, self.mask_T * values_T)

    def means(self, values_T: Tensor) -> Tensor:
        """Compute each row's mean of the values, weighted by the mask; 0 for an empty row."""
        return self.sums(values_T) / torch.where(self.sizes_S == 0, 1.0, self.sizes_S)

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
        inputs, shape = datum.loss_fn_inputs, tuple(leaf.shape)
        mask = unchecked_mask(datum, index)
        _check_shape("weights", mask, shape, index)
        masks.append(mask)
        for name in names:
            if name in inputs:
                values = inputs[name].to_numpy()
                _check_shape(name, values, shape, index)
                columns[name].append(values)
    mask = np.concatenate(masks)
    check_masks(mask, masks)
    places = np.flatnonzero(mask)
    if not places.size:
        raise InvalidDatum("no token of the batch counts: the mask of every datum is 0 everywhere")
    all_count = places.size == mask.size
    flat = torch.cat([*logprobs_list])
    lengths = np.fromiter(map(len, masks), np.int64, len(masks))
    sizes = _sizes(mask, lengths)
    places_T = torch.from_numpy(places).to(flat.device)

    def tensor(values: Any) -> Tensor:
        kept = values if all_count else values[places]
        return torch.from_numpy(kept).to(dtype=flat.dtype, device=flat.device)

    return Rows(
        logprobs_T=flat if all_count else torch.index_select(flat, 0, places_T),
        mask_T=tensor(mask),
        places=None if all_count else places,
        lengths=lengths,
        sizes_S=torch.from_numpy(sizes).to(dtype=flat.dtype, device=flat.device),
        here=Totals(int((sizes > 0).sum()), float(sizes.sum())),
        inputs={n: tensor(_whole(n, parts, len(data))) for n, parts in columns.items() if parts},
    )


def _check_shape(name: str, values: Any, shape: tuple[int, ...], index: int) -> None:
    if len(shape) != 1 or values.shape != shape:
        raise InvalidDatum(
            f"datum {index}: {name!r} has the shape {values.shape}, its logprobs have {shape}; "
            "both must be [N], one entry for each target",
            index=index,
        )


def _sizes(mask: Any, lengths: Any) -> Any:
    """The sum of each row's mask, in float64."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    filled = lengths > 0  # reduceat gives a row of no length its successor's first entry
    sizes = np.zeros(len(lengths))
    sizes[filled] = np.add.reduceat(mask, starts[filled], dtype=np.float64)
    return sizes


def _whole(name: str, column: list[Any], count: int) -> Any:
    if len(column) != count:
        raise InvalidDatum(f"{len(column)} of {count} datums have {name!r}: give it to all or none")
    return np.concatenate(column)


def reduce(values_T: Tensor, rows: Rows, how: Reduction, given: Totals | None) -> Tensor:
    """Add the terms of the tokens, as the reduction says, over the whole optimizer batch.

    Raises:
        InvalidArgument: the totals handed in are smaller than this part of the batch.
    """
    if how.name == "sum":
        return torch.dot(rows.mask_T, values_T)
    size = checked_totals(rows, given)
    if how.name == "per_token":
        return torch.dot(rows.mask_T, values_T) / size.tokens
    if how.name == "constant":
        assert how.length is not None
        return torch.dot(rows.mask_T, values_T) / (size.sequences * how.length)
    return rows.means(values_T).sum() / size.sequences


def checked_totals(rows: Rows, given: Totals | None) -> Totals:
    """The totals that were handed in, or those of this call where it is the whole batch."""
    here = rows.here
    if given is None:
        return here
    if here.sequences > given.sequences or here.tokens > given.tokens * (1 + 1e-6):
        raise InvalidArgument(
            f"this call has {here.sequences} rows and {here.tokens:g} tokens, more than the totals "
            f"of its optimizer batch ({given.sequences} and {given.tokens:g}): make them of all "
            "rows of the step, losses.totals(all_rows)"
        )
    return given
