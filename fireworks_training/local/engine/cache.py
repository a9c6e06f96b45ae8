"""The key/value cache of the running batch: a row for each stream, all rows ending in one column.

Knows tensors and rows; no requests, no model. Legend: L layers, B rows allocated, H key/value
heads, C columns allocated, D head size, n rows in use.

Row r holds its tokens in the columns `[end - length[r], end)`. Since every row ends in the same
column, a decode step writes one column for all of them, a row joins by being copied so that it
ends there too, and leaves by having the last row copied over it. What lies left of a row's tokens
is finite garbage that the mask hides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_SLACK = 64
"""Columns beyond those reserved: so many steps at least pass before the rows are moved again."""


class SlotCache:
    """Keys and values of up to `max_rows` streams.

    Attributes:
        rows: rows in use, n.
        lengths: int64 `[max_rows]`, tokens of each row; the first n count.
    """

    def __init__(self, max_rows: int) -> None:
        self.rows = 0
        self.lengths: npt.NDArray[np.int64] = np.zeros(max_rows, np.int64)
        self._max_rows = max_rows
        self._end = 0
        self._keys_LBHCD: torch.Tensor | None = None
        self._values_LBHCD: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths[: self.rows].max(initial=0))

    def join(
        self,
        keys_LbHPD: torch.Tensor,
        values_LbHPD: torch.Tensor,
        lengths: npt.NDArray[np.int64],
        sources: npt.NDArray[np.int64],
        room: int,
    ) -> None:
        """Adds a row for each entry of `sources`.

        Args:
            keys_LbHPD: keys of b right-padded prompts.
            values_LbHPD: their values.
            lengths: tokens of each of the b prompts.
            sources: which prompt each new row starts from.
            room: tokens that the longest of all rows, old and new, will come to.
        """
        added = len(sources)
        first = self.rows
        self.lengths[first : first + added] = lengths[sources]
        self._reserve(first + added, room, keys_LbHPD, values_LbHPD)
        self.rows += added
        assert self._keys_LBHCD is not None
        assert self._values_LBHCD is not None
        for source in np.unique(sources):
            length = int(lengths[source])
            at = torch.from_numpy(first + np.flatnonzero(sources == source))
            columns = slice(self._end - length, self._end)
            self._keys_LBHCD[:, at, :, columns] = keys_LbHPD[:, source, None, :, :length]
            self._values_LBHCD[:, at, :, columns] = values_LbHPD[:, source, None, :, :length]

    def leave(self, row: int) -> None:
        """Frees a row; the last row takes its place."""
        self.rows -= 1
        last = self.rows
        if row != last and self._keys_LBHCD is not None and self._values_LBHCD is not None:
            columns = slice(self._end - int(self.lengths[last]), self._end)
            self._keys_LBHCD[:, row, :, columns] = self._keys_LBHCD[:, last, :, columns]
            self._values_LBHCD[:, row, :, columns] = self._values_LBHCD[:, last, :, columns]
        self.lengths[row] = self.lengths[last]

    def clear(self) -> None:
        """Forgets everything, the memory too: new weights must not meet old keys."""
        self.rows = 0
        self._end = 0
        self._keys_LBHCD = None
        self._values_LBHCD = None

    def open_column(self, room: int) -> tuple[Cache, torch.Tensor]:
        """Makes place for one token in every row.

        Args:
            room: as in `join`.

        Returns:
            The cache to hand to the model, which writes the new column, and the additive mask
            `[n, 1, 1, T]` over the columns that it returns.
        """
        assert self._keys_LBHCD is not None
        assert self._values_LBHCD is not None
        if self._end == self._keys_LBHCD.shape[3]:
            self._reserve(self.rows, room, self._keys_LBHCD, self._values_LBHCD)
        self._end += 1
        self.lengths[: self.rows] += 1
        start = self._end - self.longest
        lengths_n = torch.from_numpy(self.lengths[: self.rows])
        width = self._end - start
        hidden_nT = torch.arange(width) < width - lengths_n[:, None]
        mask_nT = torch.zeros(hidden_nT.shape).masked_fill_(hidden_nT, -torch.inf)
        layers: list[Any] = [
            _ColumnLayer(
                self._keys_LBHCD[layer, : self.rows, :, start : self._end],
                self._values_LBHCD[layer, : self.rows, :, start : self._end],
            )
            for layer in range(self._keys_LBHCD.shape[0])
        ]
        return Cache(layers=layers), mask_nT[:, None, None, :]

    def _reserve(
        self, rows: int, room: int, like_keys: torch.Tensor, like_values: torch.Tensor
    ) -> None:
        """Sees to `rows` rows, and to columns for the longest to double in, up to `room`."""
        longest = int(self.lengths[:rows].max())
        old_keys, old_values = self._keys_LBHCD, self._values_LBHCD
        if old_keys is None or old_values is None:
            allocated_rows, columns = 0, 0
        else:
            allocated_rows, columns = old_keys.shape[1], old_keys.shape[3]
        fits = rows <= allocated_rows and longest <= self._end < columns
        if fits:
            return
        if rows > allocated_rows:
            allocated_rows = min(self._max_rows, max(rows, 2 * allocated_rows))
        columns = max(longest + 1, min(room, 2 * longest)) + _SLACK
        keys = _allocate(like_keys, allocated_rows, columns)
        values = _allocate(like_values, allocated_rows, columns)
        kept = int(self.lengths[: self.rows].max(initial=0))
        if kept and old_keys is not None and old_values is not None:
            source, target = slice(self._end - kept, self._end), slice(longest - kept, longest)
            keys[:, : self.rows, :, target] = old_keys[:, : self.rows, :, source]
            values[:, : self.rows, :, target] = old_values[:, : self.rows, :, source]
        self._keys_LBHCD, self._values_LBHCD, self._end = keys, values, longest


class _ColumnLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer for one decode step: the model's new key and value go into the last column."""

    is_sliding = False

    def __init__(self, keys_nHTD: torch.Tensor, values_nHTD: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = keys_nHTD
        self.values = values_nHTD
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the columns exist."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[2]) - 1

    def get_max_length(self) -> int:
        return -1


def _allocate(like_LbHPD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    # Zeros, not empty memory: a masked column is multiplied by probability 0, and 0 * NaN is NaN.
    layers, _, heads, _, size = like_LbHPD.shape
    return torch.zeros((layers, rows, heads, columns, size), dtype=like_LbHPD.dtype)
