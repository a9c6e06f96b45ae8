"""Keys and values of running rows, in lanes: rows that attend in one call.

Knows tensors and rows; no requests, no model. Legend: L layers, G prompts held, M rows that one
prompt has at most, n rows, H key/value heads, R query heads a key/value head, P prompt columns, S
settled columns, T columns of the tail, C tokens of one row, D head size.

A lane holds rows whose prompts have about the same length, so that little of a call is padding.
In a shared lane a prompt is held once for all its rows, which attend to it and to their own tokens:
the samples of one prompt cost its memory traffic once a step. In any other lane a row's own tokens
begin with its prompt.

A row's own tokens lie in settled columns and, the newest, in a short tail. All rows end in the same
column of the tail, so a step writes one column for all rows; when the tail is full, it settles. The
settled columns are allocated without a gap: with one between its rows, a product over them took
twice as long by itself (573 against 1169 us for 64 rows of 80 tokens with room for 96), and 1.29
instead of 1.12 ms of a whole step.

A row leaves by having the last row moved over it, and so does a prompt that no row needs. What lies
before a row's tokens is finite garbage that the mask hides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fireworks_training.local.devices import on
from fireworks_training.local.engine.buffers import zeros
from fireworks_training.local.engine.prompts import Geometry, Prompt

SHARED_ROWS = 16
"""Rows of a group: a prompt with more is held several times, so that groups stay alike."""

_FEWEST_COLUMNS = 64
_TAIL = 16
"""Columns of the tail: so many steps pass before own tokens are copied."""

I64 = npt.NDArray[np.int64]
Past = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one row, `[L, H, C, D]`."""


@dataclass(frozen=True, slots=True)
class LaneKind:
    """What the rows of a lane have in common.

    Attributes:
        columns: prompt columns, a power of two.
        own: tokens that a row may come to sample, a power of two: beside a long completion, short
            ones would be mostly padding.
        shared: whether several rows may belong to one prompt.
    """

    columns: int
    own: int
    shared: bool

    @classmethod
    def of(cls, prompt: Prompt, max_tokens: int, *, shared: bool) -> LaneKind:
        """The lane for a row of a prompt."""
        return cls(_power_of_two(len(prompt.tokens)), _power_of_two(max_tokens), shared)


def _power_of_two(columns: int) -> int:
    return max(_FEWEST_COLUMNS, 1 << (columns - 1).bit_length())


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
        # Columns that the next step attends to.
        self._settled_width = 0
        self._tail_width = 0
        # Keys of prompts are held transposed: a row's scores are then sums of whole columns.
        self._prompt_keys_LGHDP = self._zeros(0, geometry.key_size, 0)
        self._prompt_values_LGHPD = self._zeros(0, 0, geometry.value_size)
        self._keys_LnHSD = self._zeros(0, 0, geometry.key_size)
        self._values_LnHSD = self._zeros(0, 0, geometry.value_size)
        self._tail_keys_LnHTD = self._zeros(0, _TAIL, geometry.key_size)
        self._tail_values_LnHTD = self._zeros(0, _TAIL, geometry.value_size)
        self._prompt_columns = 0
        # Over prompt columns and own columns; None when nothing has to be hidden.
        self._mask_n11C: torch.Tensor | None = None
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

    def join(self, prompt: Prompt, slots: list[int], past: Past | None = None) -> None:
        """Adds a row for each slot.

        Args:
            prompt: wholly computed.
            slots: whose rows they are.
            past: of a shared lane, what a row that moves here has behind its prompt.
        """
        first, added = self._rows, len(slots)
        if not self.kind.shared:
            past = prompt.keys_LHPD, prompt.values_LHPD
        own = 0 if past is None else past[0].shape[2]
        self._reserve(first + added, own)
        rows = slice(first, first + added)
        self._slots[rows] = slots
        self._own[rows] = own
        self._rows += added
        self._spread_GM = None
        if self.kind.shared:
            for row in range(first, first + added):
                self._group[row] = self._group_for(prompt, row)
        if past is not None:
            self._put(rows, *past)

    def _put(self, rows: slice, keys_LHCD: torch.Tensor, values_LHCD: torch.Tensor) -> None:
        """Fills new rows; like everybody's, their tokens end where the tail does."""
        own = keys_LHCD.shape[2]
        settled = max(0, own - self._tail_width)
        at = slice(self._keys_LnHSD.shape[3] - settled, None)
        self._keys_LnHSD[:, rows, :, at] = keys_LHCD[:, None, :, :settled]
        self._values_LnHSD[:, rows, :, at] = values_LHCD[:, None, :, :settled]
        at = slice(self._tail_width - (own - settled), self._tail_width)
        self._tail_keys_LnHTD[:, rows, :, at] = keys_LHCD[:, None, :, settled:]
        self._tail_values_LnHTD[:, rows, :, at] = values_LHCD[:, None, :, settled:]

    def take(self, slot: int, prompt: Prompt) -> Past:
        """Removes a row of this lane, which is not shared, to go on in a shared one.

        Args:
            slot: whose row it is.
            prompt: the row's.

        Returns:
            Keys and values of what it has behind its prompt.
        """
        row = int(np.flatnonzero(self.slots == slot)[0])
        count = int(self._own[row]) - len(prompt.tokens)
        newest = min(self._tail_width, count)
        settled_width = self._keys_LnHSD.shape[3]
        at = slice(settled_width - (count - newest), None)
        tail = slice(self._tail_width - newest, self._tail_width)
        past = (
            torch.cat((self._keys_LnHSD[:, row, :, at], self._tail_keys_LnHTD[:, row, :, tail]), 2),
            torch.cat(
                (self._values_LnHSD[:, row, :, at], self._tail_values_LnHTD[:, row, :, tail]), 2
            ),
        )
        self._leave(row)
        return past

    def leave(self, slots: set[int]) -> None:
        """Frees the rows of some slots; unknown ones are ignored."""
        for row in range(self._rows - 1, -1, -1):
            if int(self._slots[row]) in slots:
                self._leave(row)

    def _leave(self, row: int) -> None:
        group, last = int(self._group[row]), self._rows - 1
        if row != last:
            for tensor in (
                self._keys_LnHSD,
                self._values_LnHSD,
                self._tail_keys_LnHTD,
                self._tail_values_LnHTD,
            ):
                tensor[:, row] = tensor[:, last]
            for array in (self._slots, self._own, self._group):
                array[row] = array[last]
        self._rows -= 1
        self._spread_GM = None
        if self.kind.shared and not np.any(self._group[: self._rows] == group):
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
        sizes = np.bincount(self._group[:row], minlength=len(self._prompts))
        for group, held in enumerate(self._prompts):
            if held is prompt and sizes[group] < SHARED_ROWS:
                return group
        group, length = len(self._prompts), len(prompt.tokens)
        self._reserve_prompts(group + 1, length)
        self._prompt_keys_LGHDP[:, group, :, :, :length] = prompt.keys_LHPD.transpose(-1, -2)
        self._prompt_values_LGHPD[:, group, :, :length] = prompt.values_LHPD
        self._prompts.append(prompt)
        return group

    def _zeros(self, rows: int, *shape: int) -> torch.Tensor:
        """`[L, rows, H, ...]`"""
        geometry = self._geometry
        return zeros(geometry.layers, rows, geometry.heads, *shape, device=geometry.device)

    def _reserve_prompts(self, groups: int, length: int) -> None:
        old_keys, old_values = self._prompt_keys_LGHDP, self._prompt_values_LGHPD
        held, columns = old_keys.shape[1], old_keys.shape[4]
        if groups <= held and length <= columns:
            return
        new = held if groups <= held else max(groups, held + held // 2)
        wide = max(columns, length)
        geometry = self._geometry
        keys = self._zeros(new, geometry.key_size, wide)
        values = self._zeros(new, wide, geometry.value_size)
        keys[:, :held, :, :, :columns] = old_keys
        values[:, :held, :, :columns] = old_values
        self._prompt_keys_LGHDP, self._prompt_values_LGHPD = keys, values

    def _reserve(self, rows: int, own: int) -> None:
        """Sees to `rows` rows, and to columns for one of `own` tokens."""
        held = self._keys_LnHSD.shape[1]
        if rows > held:
            held = max(rows, held + held // 2)
            more = np.zeros(held - len(self._slots), np.int64)
            self._slots = np.concatenate((self._slots, more))
            self._own = np.concatenate((self._own, more))
            self._group = np.concatenate((self._group, more))
            self._settle(held, own)
        elif own > self._keys_LnHSD.shape[3] + self._tail_width:
            self._settle(held, own)

    def _settle(self, rows: int, own: int = 0) -> None:
        """Copies all own tokens to settled columns for `rows` rows, one of them with `own`."""
        geometry, n, tail = self._geometry, self._rows, self._tail_width
        kept = int(self._own[:n].max(initial=0))
        longest = max(kept, own)
        # Zeros: a masked column is multiplied by probability 0, and 0 * NaN is NaN.
        keys = self._zeros(rows, longest, geometry.key_size)
        values = self._zeros(rows, longest, geometry.value_size)
        # Rows are aligned at their ends; what is before the longest one's tokens is dropped.
        settled = max(0, kept - tail)
        at = slice(longest - tail - settled, longest - tail)
        source = slice(self._keys_LnHSD.shape[3] - settled, None)
        if settled:
            keys[:, :n, :, at] = self._keys_LnHSD[:, :n, :, source]
            values[:, :n, :, at] = self._values_LnHSD[:, :n, :, source]
        newest = min(tail, kept)
        if newest:
            source = slice(tail - newest, tail)
            keys[:, :n, :, longest - newest :] = self._tail_keys_LnHTD[:, :n, :, source]
            values[:, :n, :, longest - newest :] = self._tail_values_LnHTD[:, :n, :, source]
        self._keys_LnHSD, self._values_LnHSD = keys, values
        if rows != self._tail_keys_LnHTD.shape[1]:
            self._tail_keys_LnHTD = self._zeros(rows, _TAIL, geometry.key_size)
            self._tail_values_LnHTD = self._zeros(rows, _TAIL, geometry.value_size)
        self._tail_width = 0

    # -- one step --------------------------------------------------------------------------------

    def open_column(self) -> None:
        """Makes place for one more token in every row; before the layers attend."""
        n = self._rows
        if self._tail_width == _TAIL:
            self._settle(self._keys_LnHSD.shape[1])
        self._tail_width += 1
        self._own[:n] += 1
        self._settled_width = max(0, int(self._own[:n].max()) - self._tail_width)
        width = self._settled_width + self._tail_width
        hidden_nC = np.arange(width) < width - self._own[:n][:, None]
        if self.kind.shared:
            lengths = np.array([len(prompt.tokens) for prompt in self._prompts], np.int64)
            self._prompt_columns = int(lengths.max())
            past_nP = np.arange(self._prompt_columns) >= lengths[self._group[:n]][:, None]
            hidden_nC = np.concatenate((past_nP, hidden_nC), axis=1)
            if self._spread_GM is None:
                self._arrange()
        self._mask_n11C = None
        if hidden_nC.any():
            mask_nC = np.where(hidden_nC, np.float32(-np.inf), np.float32(0))
            self._mask_n11C = on(self._geometry.device, mask_nC)[:, None, None, :]

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
        self._spread_GM = on(self._geometry.device, spread_GM.reshape(len(self._prompts), widest))
        self._back_n = on(self._geometry.device, back_n)

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
        n, tail, heads = self._rows, self._tail_width, keys_nHD.shape[1]
        queries_nHRD = (queries_nQD * scale).view(n, heads, queries_nQD.shape[1] // heads, -1)
        self._tail_keys_LnHTD[layer, :n, :, tail - 1] = keys_nHD
        self._tail_values_LnHTD[layer, :n, :, tail - 1] = values_nHD
        tail_keys_nHTD = self._tail_keys_LnHTD[layer, :n, :, :tail]
        scores = [torch.matmul(queries_nHRD, tail_keys_nHTD.transpose(-1, -2))]
        values = [self._tail_values_LnHTD[layer, :n, :, :tail]]
        if self._settled_width:
            at = slice(self._keys_LnHSD.shape[3] - self._settled_width, None)
            keys_nHSD = self._keys_LnHSD[layer, :n, :, at]
            scores.insert(0, torch.matmul(queries_nHRD, keys_nHSD.transpose(-1, -2)))
            values.insert(0, self._values_LnHSD[layer, :n, :, at])
        if self.kind.shared:
            groups, columns = len(self._prompts), self._prompt_columns
            keys_GHDP = self._prompt_keys_LGHDP[layer, :groups, :, :, :columns]
            spread = torch.matmul(self._spread(queries_nHRD), keys_GHDP)
            scores.insert(0, self._gathered(spread))
            values.insert(0, self._prompt_values_LGHPD[layer, :groups, :, :columns])
        scores_nHRC = torch.cat(scores, -1)
        if self._mask_n11C is not None:
            scores_nHRC += self._mask_n11C
        weights_nHRC = torch.softmax(scores_nHRC, -1)
        parts = list(torch.split_with_sizes(weights_nHRC, [x.shape[-1] for x in scores], -1))
        out_nHRD = torch.matmul(parts.pop(), values.pop())
        if self._settled_width:
            out_nHRD += torch.matmul(parts.pop(), values.pop())
        if self.kind.shared:
            out_nHRD += self._gathered(torch.matmul(self._spread(parts.pop()), values.pop()))
        return out_nHRD.flatten(1, 2)

    def _spread(self, rows_nHRX: torch.Tensor) -> torch.Tensor:
        """`[G, H, M * R, X]`: the rows of each prompt side by side."""
        assert self._spread_GM is not None
        groups, widest = self._spread_GM.shape
        _, heads, repeats, size = rows_nHRX.shape
        spread_GMHRX = rows_nHRX[self._spread_GM.view(-1)].view(
            groups, widest, heads, repeats, size
        )
        return spread_GMHRX.transpose(1, 2).reshape(groups, heads, widest * repeats, size)

    def _gathered(self, spread_GHmX: torch.Tensor) -> torch.Tensor:
        """The inverse of `_spread`."""
        assert self._spread_GM is not None
        assert self._back_n is not None
        groups, widest = self._spread_GM.shape
        _, heads, together, size = spread_GHmX.shape
        repeats = together // widest
        rows = spread_GHmX.view(groups, heads, widest, repeats, size).transpose(1, 2)
        return rows.reshape(groups * widest, heads, repeats, size)[self._back_n]
