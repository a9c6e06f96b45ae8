"""Keys and values of running rows, in lanes: rows that attend in one call.

Knows tensors and rows. Does not know requests or the model. Legend: L layers, G prompts held, M
rows that one prompt has at most, n rows, H key/value heads, R query heads a key/value head, P
prompt columns, T columns of own tokens, C tokens of one row, D head size.

A lane holds rows whose prompts have about the same length, so that little of a call is padding.
In a shared lane a prompt is held once for all its rows, which attend to it and to their own tokens:
the samples of one prompt cost its memory traffic once a step. In any other lane a row's own tokens
begin with its prompt.

All rows end in the same column, so a step writes one column for all rows. A product reads all
columns that are laid out, the few not yet written too, which a mask hides: memory is then read
without gaps. With gaps of more than 300 bytes between rows a layer took twice as long as soon as
all of them together left the processor's cache (461 against 190 us for 64 rows of 96 tokens). When
the columns are full, they are laid out wider in place: layer by layer, each into the memory of the
one before, for which there is one layer more than the model has.

A row leaves by having the last row moved over it, and so does a prompt that no row needs. What the
mask hides are zeros, not what others left there: a probability of 0 does not hide a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fireworks_training.local.engine.buffers import zeros
from fireworks_training.local.engine.prompts import Geometry, Prompt
from fireworks_training.local.model.devices import on

SHARED_ROWS = 16
"""Rows of a group at most: a prompt with more is held several times, so that groups stay alike."""

_FEWEST_COLUMNS = 64
_AHEAD = 16
"""Columns laid out ahead: so many steps pass before own tokens are copied. (Products over fewer
than 13 take a slow path of the library: 68 us instead of 16.)"""

_SPARE = 64
"""Columns for which memory may be taken ahead, however few are held."""

I64 = npt.NDArray[np.int64]
Past = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one row, `[L, H, C, D]`."""


@dataclass(frozen=True, slots=True)
class LaneKind:
    """Describes what the rows of a lane have in common.

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
    def of(cls, prompt_tokens: int, max_tokens: int, *, shared: bool) -> LaneKind:
        """Returns the kind of lane for a row with such a prompt."""
        return cls(_power_of_two(prompt_tokens), _power_of_two(max_tokens), shared)


def _power_of_two(columns: int) -> int:
    return max(_FEWEST_COLUMNS, 1 << (columns - 1).bit_length())


class _Columns:
    """Holds the memory of own keys or values, laid out for so many rows and columns.

    Args:
        geometry: shape of the model's keys and values.
        size: numbers of one head.

    Attributes:
        all_LnHTD: the layout.
    """

    def __init__(self, geometry: Geometry, size: int) -> None:
        self._geometry = geometry
        self._size = size
        self._first = 0
        self._reserve(0)
        self.all_LnHTD = self._laid_out(0, 0)

    def lay_out(self, rows: int, columns: int, most: int, kept: tuple[slice, slice, slice]) -> None:
        """Lays the memory out anew.

        Args:
            rows, columns: size of the new layout.
            most: columns that later layouts may have, which new memory has room for.
            kept: rows to keep, their columns, and the columns to copy these to. All others of
                these rows are zeros.
        """
        old, (n, source, at) = self.all_LnHTD, kept
        number = rows * self._geometry.heads * self._size
        if number * columns > self._memory_LX.shape[1]:
            self._reserve(number * max(columns, most))
            self.all_LnHTD = self._laid_out(rows, columns)
            self.all_LnHTD[:, n, :, at] = old[:, n, :, source]
            return
        # Each layer goes to memory that belongs to none, or to one that has gone on already.
        self._first = 1 - self._first
        self.all_LnHTD = self._laid_out(rows, columns)
        layers = range(self._geometry.layers)
        for layer in layers if self._first == 0 else reversed(layers):
            self._fill(self.all_LnHTD[layer, n], at, old[layer, n, :, source])

    def put(self, rows: slice, at: slice, rows_LHCD: torch.Tensor | None) -> None:
        """Fills columns `at` of rows with the same values (None: zeros), the others with zeros."""
        if rows_LHCD is None:
            self.all_LnHTD[:, rows] = 0
        else:
            self._fill(self.all_LnHTD[:, rows], at, rows_LHCD[:, None])

    def _fill(self, rows_XHTD: torch.Tensor, at: slice, source_XHCD: torch.Tensor) -> None:
        rows_XHTD[..., : at.start, :] = 0
        rows_XHTD[..., at, :] = source_XHCD
        rows_XHTD[..., at.stop :, :] = 0

    def _reserve(self, numbers: int) -> None:
        geometry = self._geometry
        self._memory_LX = zeros(geometry.layers + 1, numbers, device=geometry.device)
        self._first = 0

    def _laid_out(self, rows: int, columns: int) -> torch.Tensor:
        geometry = self._geometry
        layers_LX = self._memory_LX[self._first : self._first + geometry.layers]
        used = rows * geometry.heads * columns * self._size
        return layers_LX[:, :used].view(geometry.layers, rows, geometry.heads, columns, self._size)


class _StepViews:
    """Holds the parts of a lane's columns that one step uses, by layer; m = n * H.

    Attributes:
        keys: `[m, D, T]`, transposed.
        values: `[m, T, D]`.
        new_keys, new_values: `[n, H, D]`, the newest column.
    """

    def __init__(
        self, keys_LnHTD: torch.Tensor, values_LnHTD: torch.Tensor, n: int, newest: int
    ) -> None:
        self.keys = keys_LnHTD[:, :n].flatten(1, 2).transpose(-1, -2).unbind(0)
        self.values = values_LnHTD[:, :n].flatten(1, 2).unbind(0)
        self.new_keys = keys_LnHTD[:, :n, :, newest].unbind(0)
        self.new_values = values_LnHTD[:, :n, :, newest].unbind(0)


class Lane:
    """Keeps the rows of one kind, and attends for them.

    Attributes:
        kind: what the rows have in common.
        slots: int64 `[n]`, the slot of each row; the caller knows which request holds it.
    """

    def __init__(self, kind: LaneKind, geometry: Geometry) -> None:
        self.kind = kind
        self._geometry = geometry
        self._slots: I64 = np.zeros(0, np.int64)
        self._own: I64 = np.zeros(0, np.int64)
        self._left: I64 = np.zeros(0, np.int64)
        self._group: I64 = np.zeros(0, np.int64)
        self._prompts: list[Prompt] = []
        self._rows = 0
        # Own tokens of every row end before this column.
        self._end = 0
        # Keys of prompts are held transposed: a row's scores are then sums of whole columns.
        self._prompt_keys_LGHDP = self._zeros(0, geometry.key_size, 0)
        self._prompt_values_LGHPD = self._zeros(0, 0, geometry.value_size)
        self._keys = _Columns(geometry, geometry.key_size)
        self._values = _Columns(geometry, geometry.value_size)
        self._arranged = False
        # Masks of own columns, and of prompt columns (None: nothing is hidden).
        self._mask_n11T = self._zeros(0, 0)
        self._prompt_mask_n11P: torch.Tensor | None = None
        # Indices of a shared lane: rows in the order of their groups with padding, and back.
        self._spread_GM: torch.Tensor | None = None
        self._back_n: torch.Tensor | None = None
        self._views: _StepViews | None = None

    def __len__(self) -> int:
        return self._rows

    @property
    def slots(self) -> I64:
        return self._slots[: self._rows]

    def holds(self, prompt: Prompt) -> bool:
        """Tells whether rows of this prompt are in the lane."""
        return any(held is prompt for held in self._prompts)

    # -- rows come and go ------------------------------------------------------------------------

    def join(
        self,
        prompt: Prompt,
        slots: list[int],
        left: list[int],
        past: Past | None = None,
        coming: int = 0,
    ) -> None:
        """Adds a row for each slot.

        Args:
            prompt: wholly computed.
            slots: the slots of the rows.
            left: columns that each row may still come to fill.
            past: keys and values behind the prompt, of a row that moves to a shared lane.
            coming: rows that are likely to join soon, so that their memory is allocated now.
        """
        first, added = self._rows, len(slots)
        if not self.kind.shared:
            past = prompt.keys_LHPD, prompt.values_LHPD
        own = 0 if past is None else past[0].shape[2]
        self._reserve(first + added, coming, own, max(left))
        rows = slice(first, first + added)
        self._slots[rows] = slots
        self._own[rows] = own
        self._left[rows] = left
        self._rows += added
        self._arranged = False
        if self.kind.shared:
            for row in range(first, first + added):
                self._group[row] = self._group_for(prompt, row)
        # Like everybody's, their tokens end where the next column will be.
        at = slice(self._end - own, self._end)
        self._keys.put(rows, at, None if past is None else past[0])
        self._values.put(rows, at, None if past is None else past[1])

    def take(self, slot: int, prompt: Prompt) -> Past:
        """Removes a row of this lane, which is not shared, to go on in a shared one.

        Args:
            slot: the row's.
            prompt: the row's.

        Returns:
            Keys and values of the tokens behind its prompt.
        """
        row = int(np.flatnonzero(self.slots == slot)[0])
        at = slice(self._end - int(self._own[row]) + len(prompt.tokens), self._end)
        keys_LHCD = self._keys.all_LnHTD[:, row, :, at].clone()
        values_LHCD = self._values.all_LnHTD[:, row, :, at].clone()
        self._leave(row)
        return keys_LHCD, values_LHCD

    def leave(self, slots: set[int]) -> None:
        """Frees the rows of some slots; unknown ones are ignored."""
        for row in range(self._rows - 1, -1, -1):
            if int(self._slots[row]) in slots:
                self._leave(row)

    def _leave(self, row: int) -> None:
        group, last = int(self._group[row]), self._rows - 1
        if row != last:
            for tensor in (self._keys.all_LnHTD, self._values.all_LnHTD):
                tensor[:, row, :, : self._end] = tensor[:, last, :, : self._end]
            for array in (self._slots, self._own, self._left, self._group):
                array[row] = array[last]
        self._rows -= 1
        self._arranged = False
        if self.kind.shared and not np.any(self._group[: self._rows] == group):
            self._drop_group(group)

    def _drop_group(self, group: int) -> None:
        last = len(self._prompts) - 1
        if group != last:
            for tensor in (self._prompt_keys_LGHDP, self._prompt_values_LGHPD):
                tensor[:, group] = tensor[:, last]
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
        self._prompt_keys_LGHDP[:, group, :, :, length:] = 0
        self._prompt_values_LGHPD[:, group, :, length:] = 0
        self._prompts.append(prompt)
        return group

    def _zeros(self, rows: int, *shape: int) -> torch.Tensor:
        """Makes zeros of shape `[L, rows, H, ...]`."""
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

    def _reserve(self, rows: int, coming: int, own: int, left: int) -> None:
        """Makes room for `rows` rows, one with `own` columns that may fill `left` more."""
        held = len(self._slots)
        if rows > held:
            held = max(rows + coming, held + held // 2)
            more = np.zeros(held - len(self._slots), np.int64)
            self._slots = np.concatenate((self._slots, more))
            self._own = np.concatenate((self._own, more))
            self._left = np.concatenate((self._left, more))
            self._group = np.concatenate((self._group, more))
            self._lay_out(held, own, left)
        elif own > self._end:
            self._lay_out(held, own, left)

    def _lay_out(self, rows: int, own: int = 0, left: int = 0) -> None:
        """Lays out columns for `rows` rows, one with `own` tokens, and for some steps to come."""
        n = self._rows
        held = int(self._own[:n].max(initial=0))
        longest = max(held, own)
        columns = longest + _AHEAD
        left = max(left, int(self._left[:n].max(initial=0)))
        most = columns + min(left, max(_SPARE, longest // 2))
        # Rows are aligned at their ends; what is before the longest one's tokens is dropped.
        kept = slice(n), slice(self._end - held, self._end), slice(longest - held, longest)
        self._views = None  # they would keep memory that is given up
        self._keys.lay_out(rows, columns, most, kept)
        self._values.lay_out(rows, columns, most, kept)
        self._end = longest
        self._arranged = False

    # -- one step --------------------------------------------------------------------------------

    def open_column(self) -> None:
        """Makes room for one more token in every row; before the layers attend."""
        n = self._rows
        if self._end == self._keys.all_LnHTD.shape[3]:
            self._lay_out(len(self._slots))
        if not self._arranged:
            self._arrange()
        self._mask_n11T[..., self._end] = 0
        self._views = _StepViews(self._keys.all_LnHTD, self._values.all_LnHTD, n, self._end)
        self._end += 1
        self._own[:n] += 1
        self._left[:n] -= 1

    def _arrange(self) -> None:
        """Builds the masks and group indices of all rows, valid until rows come or go."""
        n = self._rows
        columns_T = np.arange(self._keys.all_LnHTD.shape[3])
        # Where a row's tokens begin stays; columns to come are uncovered one by one.
        before_nT = columns_T < self._end - self._own[:n][:, None]
        self._mask_n11T = self._mask(before_nT | (columns_T >= self._end))
        if self.kind.shared:
            lengths = np.array([len(prompt.tokens) for prompt in self._prompts], np.int64)
            columns_P = np.arange(int(lengths.max()))
            hidden_nP = columns_P >= lengths[self._group[:n]][:, None]
            self._prompt_mask_n11P = self._mask(hidden_nP) if hidden_nP.any() else None
            self._order_groups()
        self._arranged = True

    def _mask(self, hidden_nC: npt.NDArray[np.bool_]) -> torch.Tensor:
        mask_nC = np.where(hidden_nC, np.float32(-np.inf), np.float32(0))
        return on(self._geometry.device, mask_nC)[:, None, None, :]

    def _order_groups(self) -> None:
        """Computes the place of each row among the rows of its group."""
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
        """Attends from every row's new token to its prompt, its own tokens and itself.

        Args:
            layer: from 0.
            queries_nQD: queries, Q = H * R heads.
            keys_nHD, values_nHD: keys and values of the new tokens; kept.
            scale: factor of the scores.

        Returns:
            `[n, Q, D]`.
        """
        views = self._views
        assert views is not None
        n, heads, size = keys_nHD.shape
        repeats = queries_nQD.shape[1] // heads
        if scale != 1:
            queries_nQD = queries_nQD * scale
        queries_mRD = queries_nQD.reshape(n * heads, repeats, size)
        views.new_keys[layer].copy_(keys_nHD)
        views.new_values[layer].copy_(values_nHD)
        scores_nHRT = torch.bmm(queries_mRD, views.keys[layer]).view(n, heads, repeats, -1)
        scores_nHRT += self._mask_n11T
        if not self.kind.shared:
            weights_nHRT = torch.softmax(scores_nHRT, -1)
            return self._weighted(layer, weights_nHRT)
        groups, columns = len(self._prompts), max(len(p.tokens) for p in self._prompts)
        keys_GHDP = self._prompt_keys_LGHDP[layer, :groups, :, :, :columns]
        values_GHPD = self._prompt_values_LGHPD[layer, :groups, :, :columns]
        queries_nHRD = queries_mRD.view(n, heads, repeats, size)
        scores_nHRP = self._gathered(torch.matmul(self._spread(queries_nHRD), keys_GHDP))
        if self._prompt_mask_n11P is not None:
            scores_nHRP += self._prompt_mask_n11P
        weights_nHRC = torch.softmax(torch.cat((scores_nHRP, scores_nHRT), -1), -1)
        out_nQD = self._weighted(layer, weights_nHRC[..., columns:])
        shared_nHRD = self._gathered(
            torch.matmul(self._spread(weights_nHRC[..., :columns]), values_GHPD)
        )
        return out_nQD.add_(shared_nHRD.flatten(1, 2))

    def _weighted(self, layer: int, weights_nHRT: torch.Tensor) -> torch.Tensor:
        """Sums own values by their weights, `[n, Q, D]`."""
        assert self._views is not None
        n, heads, repeats, columns = weights_nHRT.shape
        weights_mRT = weights_nHRT.reshape(n * heads, repeats, columns)
        out_mRD = torch.bmm(weights_mRT, self._views.values[layer])
        return out_mRD.view(n, heads * repeats, -1)

    def _spread(self, rows_nHRX: torch.Tensor) -> torch.Tensor:
        """Puts the rows of each prompt side by side, `[G, H, M * R, X]`."""
        assert self._spread_GM is not None
        groups, widest = self._spread_GM.shape
        _, heads, repeats, size = rows_nHRX.shape
        spread_GMHRX = rows_nHRX[self._spread_GM.view(-1)].view(
            groups, widest, heads, repeats, size
        )
        return spread_GMHRX.transpose(1, 2).reshape(groups, heads, widest * repeats, size)

    def _gathered(self, spread_GHmX: torch.Tensor) -> torch.Tensor:
        """Inverts `_spread`."""
        assert self._spread_GM is not None
        assert self._back_n is not None
        groups, widest = self._spread_GM.shape
        _, heads, together, size = spread_GHmX.shape
        repeats = together // widest
        rows = spread_GHmX.view(groups, heads, widest, repeats, size).transpose(1, 2)
        return rows.reshape(groups * widest, heads, repeats, size)[self._back_n]
