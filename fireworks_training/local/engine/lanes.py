"""Keys and values of running rows, in lanes: rows that attend in one call.

Knows tensors and rows; no requests, no model. Legend: L layers, G prompts held, M rows that one
prompt has at most, n rows, H key/value heads, R query heads a key/value head, P prompt columns, T
own columns, D head size.

A row attends to a prompt and to its own tokens. The prompt is held once for all rows of its group:
the samples of one prompt cost its memory traffic once a step, which is what a step on a CPU is
bound by. A lane holds prompts of about the same length, so that little of a call is padding; and
either each row has a prompt of its own, or prompts are shared.

Own tokens of row r lie in the columns `[end - own[r], end)`. Since every row ends in the same
column, a step writes one column for all rows. A row leaves by having the last row moved over it,
and so does a prompt that no row needs. What lies outside of a row's tokens is finite garbage that
the mask hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fireworks_training.local.engine.prompts import Geometry, Prompt

SHARED_ROWS = 16
"""Rows of a group: a prompt with more is held several times, so that groups stay alike."""

_FEWEST_COLUMNS = 64
_SLACK = 64
"""Own columns beyond those in use: so many steps at least pass before the rows are moved again."""

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LaneKind:
    """What the rows of a lane have in common.

    Attributes:
        columns: prompt columns, a power of two.
        shared: whether several rows may belong to one prompt.
    """

    columns: int
    shared: bool

    @classmethod
    def of(cls, prompt: Prompt, *, shared: bool) -> LaneKind:
        """The lane for rows of a prompt."""
        columns = _FEWEST_COLUMNS
        while columns < len(prompt.tokens):
            columns *= 2
        return cls(columns, shared)


class Lane:
    """The rows of one kind.

    Attributes:
        kind: what they have in common.
        slots: int64 `[n]`, the slot of each row; who owns it is the caller's knowledge.
    """

    def __init__(self, kind: LaneKind, geometry: Geometry) -> None:
        self.kind = kind
        self._geometry = geometry
        self._slots: I64 = np.zeros(0, np.int64)
        self._own: I64 = np.zeros(0, np.int64)
        self._group: I64 = np.zeros(0, np.int64)
        self._prompts: list[Prompt] = []
        self._rows = 0
        self._end = 0
        self._start = 0
        # Keys of prompts are held transposed: a row's scores are then sums of whole columns.
        self._prompt_keys_LGHDP = torch.empty(0)
        self._prompt_values_LGHPD = torch.empty(0)
        self._keys_LnHTD = torch.empty(0)
        self._values_LnHTD = torch.empty(0)
        self._prompt_columns = 0
        self._mask_n11C = torch.empty(0)
        # Of a shared lane: rows in the order of their groups with padding, and the way back.
        self._spread_GM: torch.Tensor | None = None
        self._back_n: torch.Tensor | None = None

    def __len__(self) -> int:
        return self._rows

    @property
    def slots(self) -> I64:
        return self._slots[: self._rows]

    def holds(self, prompt: Prompt) -> bool:
        """Whether rows of this prompt are here."""
        return any(held is prompt for held in self._prompts)

    # -- rows come and go ------------------------------------------------------------------------

    def join(self, prompt: Prompt, slots: list[int]) -> None:
        """Adds a row without tokens of its own for each slot."""
        first, added = self._rows, len(slots)
        self._grow_rows(first + added)
        self._slots[first : first + added] = slots
        self._own[first : first + added] = 0
        self._rows += added
        for row in range(first, first + added):
            self._group[row] = self._group_for(prompt, row)
        self._spread_GM = None

    def leave(self, slots: set[int]) -> None:
        """Frees the rows of some slots; unknown ones are ignored."""
        for row in range(self._rows - 1, -1, -1):
            if int(self._slots[row]) in slots:
                self._leave(row)

    def _leave(self, row: int) -> None:
        group = int(self._group[row])
        last = self._rows - 1
        if row != last:
            columns = slice(self._end - int(self._own[last]), self._end)
            for tensor in (self._keys_LnHTD, self._values_LnHTD):
                tensor[:, row, :, columns] = tensor[:, last, :, columns]
            for array in (self._slots, self._own, self._group):
                array[row] = array[last]
        self._rows -= 1
        self._spread_GM = None
        if not self._rows:
            # An empty lane starts over, so its columns don't wander off.
            self._end = 0
        if not np.any(self._group[: self._rows] == group):
            self._drop_group(group)

    def _drop_group(self, group: int) -> None:
        last = len(self._prompts) - 1
        if group != last:
            length = len(self._prompts[last].tokens)
            keys, values = self._prompt_keys_LGHDP, self._prompt_values_LGHPD
            keys[:, group, :, :, :length] = keys[:, last, :, :, :length]
            values[:, group, :, :length] = values[:, last, :, :length]
            self._prompts[group] = self._prompts[last]
            self._group[: self._rows][self._group[: self._rows] == last] = group
        self._prompts.pop()

    def _group_for(self, prompt: Prompt, row: int) -> int:
        if self.kind.shared:
            sizes = np.bincount(self._group[:row], minlength=len(self._prompts))
            for group, held in enumerate(self._prompts):
                if held is prompt and sizes[group] < SHARED_ROWS:
                    return group
        group = len(self._prompts)
        self._grow_groups(group + 1)
        length = len(prompt.tokens)
        self._prompt_keys_LGHDP[:, group, :, :, :length] = prompt.keys_LHPD.transpose(-1, -2)
        self._prompt_values_LGHPD[:, group, :, :length] = prompt.values_LHPD
        self._prompts.append(prompt)
        return group

    def _grow_groups(self, groups: int) -> None:
        shape = self._prompt_keys_LGHDP.shape
        held = shape[1] if len(shape) == 5 else 0
        if groups <= held:
            return
        new, geometry, columns = max(groups, 2 * held), self._geometry, self.kind.columns
        keys = torch.zeros(geometry.layers, new, geometry.heads, geometry.key_size, columns)
        values = torch.zeros(geometry.layers, new, geometry.heads, columns, geometry.value_size)
        if held:
            keys[:, :held] = self._prompt_keys_LGHDP
            values[:, :held] = self._prompt_values_LGHPD
        self._prompt_keys_LGHDP, self._prompt_values_LGHPD = keys, values

    def _grow_rows(self, rows: int) -> None:
        held = len(self._slots)
        if rows <= held:
            return
        new = max(rows, 2 * held, 8)
        more = np.zeros(new - held, np.int64)
        self._slots = np.concatenate((self._slots, more))
        self._own = np.concatenate((self._own, more))
        self._group = np.concatenate((self._group, more))
        self._move(new, self._columns)

    @property
    def _columns(self) -> int:
        return self._keys_LnHTD.shape[3] if self._keys_LnHTD.dim() == 5 else 0

    def _move(self, rows: int, columns: int) -> None:
        """Moves own tokens to new tensors, so that the longest row begins in the first column."""
        geometry, longest = self._geometry, int(self._own[: self._rows].max(initial=0))
        columns = max(columns, longest + _SLACK)
        shape = (geometry.layers, rows, geometry.heads, columns)
        # Zeros: a masked column is multiplied by probability 0, and 0 * NaN is NaN.
        keys = torch.zeros(*shape, geometry.key_size)
        values = torch.zeros(*shape, geometry.value_size)
        if longest:
            source = slice(self._end - longest, self._end)
            keys[:, : self._rows, :, :longest] = self._keys_LnHTD[:, : self._rows, :, source]
            values[:, : self._rows, :, :longest] = self._values_LnHTD[:, : self._rows, :, source]
        self._keys_LnHTD, self._values_LnHTD, self._end = keys, values, longest

    # -- one step --------------------------------------------------------------------------------

    def open_column(self) -> None:
        """Makes place for one more token in every row; before the layers attend."""
        if self._end == self._columns:
            longest = int(self._own[: self._rows].max(initial=0))
            crowded = 2 * (longest + _SLACK) > self._columns
            self._move(len(self._slots), self._columns * 2 if crowded else self._columns)
        n = self._rows
        self._end += 1
        self._own[:n] += 1
        width = int(self._own[:n].max())
        self._start = self._end - width
        lengths = np.array([len(prompt.tokens) for prompt in self._prompts], np.int64)
        self._prompt_columns = int(lengths.max())
        hidden_nC = np.concatenate(
            [
                np.arange(self._prompt_columns) >= lengths[self._group[:n]][:, None],
                np.arange(width) < width - self._own[:n][:, None],
            ],
            axis=1,
        )
        mask_nC = np.where(hidden_nC, np.float32(-np.inf), np.float32(0))
        self._mask_n11C = torch.from_numpy(mask_nC)[:, None, None, :]
        if self.kind.shared and self._spread_GM is None:
            self._arrange()

    def _arrange(self) -> None:
        """Where each row stands among the rows of its group."""
        group_n = self._group[: self._rows]
        order = np.argsort(group_n, kind="stable")
        sizes = np.bincount(group_n, minlength=len(self._prompts))
        widest = int(sizes.max())
        starts = np.cumsum(sizes) - sizes
        place_n = np.empty(self._rows, np.int64)
        place_n[order] = np.arange(self._rows) - starts[group_n[order]]
        back_n = group_n * widest + place_n
        spread_GM = np.zeros(len(self._prompts) * widest, np.int64)
        spread_GM[back_n] = np.arange(self._rows)
        self._spread_GM = torch.from_numpy(spread_GM).view(len(self._prompts), widest)
        self._back_n = torch.from_numpy(back_n)

    def attend(
        self,
        layer: int,
        queries_nQD: torch.Tensor,
        keys_nHD: torch.Tensor,
        values_nHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of every row's new token to its prompt, its own tokens and itself.

        Args:
            layer: from 0.
            queries_nQD: queries, Q = H * R heads.
            keys_nHD, values_nHD: of the new tokens; kept.
            scale: of the scores.

        Returns:
            `[n, Q, D]`.
        """
        n, end, columns = self._rows, self._end, self._prompt_columns
        heads = keys_nHD.shape[1]
        queries_nHRD = (queries_nQD * scale).view(n, heads, queries_nQD.shape[1] // heads, -1)
        own_keys_nHTD = self._keys_LnHTD[layer, :n, :, self._start : end]
        own_values_nHTD = self._values_LnHTD[layer, :n, :, self._start : end]
        own_keys_nHTD[:, :, -1] = keys_nHD
        own_values_nHTD[:, :, -1] = values_nHD
        groups = len(self._prompts)
        keys_GHDP = self._prompt_keys_LGHDP[layer, :groups, :, :, :columns]
        values_GHPD = self._prompt_values_LGHPD[layer, :groups, :, :columns]
        own_nHRT = torch.matmul(queries_nHRD, own_keys_nHTD.transpose(-1, -2))
        prompt_nHRP = self._gathered(torch.matmul(self._spread(queries_nHRD), keys_GHDP))
        scores_nHRC = torch.cat((prompt_nHRP, own_nHRT), -1).add_(self._mask_n11C)
        weights_nHRC = torch.softmax(scores_nHRC, -1)
        out_nHRD = torch.matmul(weights_nHRC[..., columns:], own_values_nHTD)
        spread = self._spread(weights_nHRC[..., :columns])
        out_nHRD += self._gathered(torch.matmul(spread, values_GHPD))
        return out_nHRD.flatten(1, 2)

    def _spread(self, rows_nHRX: torch.Tensor) -> torch.Tensor:
        """`[G, H, M * R, X]`: the rows of each prompt side by side."""
        if self._spread_GM is None:
            return rows_nHRX
        groups, widest = self._spread_GM.shape
        _, heads, repeats, size = rows_nHRX.shape
        spread_GMHRX = rows_nHRX[self._spread_GM.view(-1)].view(
            groups, widest, heads, repeats, size
        )
        return spread_GMHRX.transpose(1, 2).reshape(groups, heads, widest * repeats, size)

    def _gathered(self, spread_GHmX: torch.Tensor) -> torch.Tensor:
        """The inverse of `_spread`."""
        if self._spread_GM is None or self._back_n is None:
            return spread_GHmX
        groups, widest = self._spread_GM.shape
        _, heads, together, size = spread_GHmX.shape
        repeats = together // widest
        rows = spread_GHmX.view(groups, heads, widest, repeats, size).transpose(1, 2)
        return rows.reshape(groups * widest, heads, repeats, size)[self._back_n]
