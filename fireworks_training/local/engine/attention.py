"""The tokens of one forward pass, and their attention: rows of lanes, then pieces of prompts.

Knows lanes and prompts. Does not know requests or the model. All tokens of a pass are packed into
one sequence without padding: first one token for each running row, lane after lane, then the pieces
of prompts. Linear layers see `[N, ...]`; only attention knows which tokens belong together. Pieces
that begin their prompts attend together, as far as they are about equally long.

Legend: N tokens of the pass, m and c those of some pieces and of one, b pieces, w tokens of the
widest, H key/value heads, R query heads a key/value head, Q = H * R, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from fireworks_training.local.engine.lanes import Lane
from fireworks_training.local.engine.prompts import Prompt
from fireworks_training.local.model.devices import on

_MOST_PADDING = 1.5
"""Length of the longest over the shortest of the pieces that attend together, at most."""


class PromptPiece:
    """Names the tokens `[start, end)` of a prompt, computed in one pass, and attends for them.

    Args:
        prompt: its first `start` tokens are computed already.
        end: index behind the last token of the piece.
        wanted: how many hidden states of its end are of use; None = all.
    """

    def __init__(self, prompt: Prompt, end: int, wanted: int | None = None) -> None:
        self.prompt = prompt
        self.start = prompt.done
        self.end = end
        self.wanted = len(self) if wanted is None else wanted
        self._mask: torch.Tensor | None = None
        if self.start:
            device = prompt.keys_LHPD.device
            queries = torch.arange(self.start, end, device=device)[:, None]
            self._mask = torch.arange(end, device=device) <= queries

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token ids of the piece."""
        return self.prompt.tokens[self.start : self.end]

    def attend(
        self,
        layer: int,
        queries_cQD: torch.Tensor,
        keys_cHD: torch.Tensor,
        values_cHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attends to the prompt up to each token, `[c, Q, D]`; keeps keys and values.

        Only for a piece that does not begin its prompt.
        """
        keys_HPD = self.prompt.keys_LHPD[layer]
        values_HPD = self.prompt.values_LHPD[layer]
        keys_HPD[:, self.start : self.end] = keys_cHD.transpose(0, 1)
        values_HPD[:, self.start : self.end] = values_cHD.transpose(0, 1)
        out_1QcD = scaled_dot_product_attention(
            queries_cQD.transpose(0, 1)[None],
            keys_HPD[None, :, : self.end],
            values_HPD[None, :, : self.end],
            attn_mask=self._mask,
            scale=scale,
            enable_gqa=queries_cQD.shape[1] != keys_cHD.shape[1],
        )
        return out_1QcD[0].transpose(0, 1)

    def finish(self) -> None:
        """Does nothing: `attend` has stored all."""


class _Beginnings:
    """Attends for pieces that begin their prompts, padded at their ends to one length.

    Args:
        pieces: in the order of their tokens in the pass.
    """

    def __init__(self, pieces: Sequence[PromptPiece]) -> None:
        self._pieces = pieces
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        lengths = np.array([len(piece) for piece in pieces])
        self._width = int(lengths.max())
        # What is padded repeats a token; the causal mask hides it from those before it.
        self._padded: torch.Tensor | None = None
        self._back: torch.Tensor | None = None
        if len(set(lengths.tolist())) > 1:
            columns = np.arange(self._width)
            starts = np.cumsum(lengths) - lengths
            padded_bw = starts[:, None] + np.minimum(columns, lengths[:, None] - 1)
            device = pieces[0].prompt.keys_LHPD.device
            self._padded = on(device, padded_bw.ravel())
            self._back = on(device, np.flatnonzero((columns < lengths[:, None]).ravel()))

    def __len__(self) -> int:
        return sum(map(len, self._pieces))

    def attend(
        self,
        layer: int,  # noqa: ARG002 - layers come in their order
        queries_mQD: torch.Tensor,
        keys_mHD: torch.Tensor,
        values_mHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attends from each piece to itself, `[m, Q, D]`."""
        self._keys.append(keys_mHD)
        self._values.append(values_mHD)
        out_bQwD = scaled_dot_product_attention(
            self._spread(queries_mQD),
            self._spread(keys_mHD),
            self._spread(values_mHD),
            is_causal=True,
            scale=scale,
            enable_gqa=queries_mQD.shape[1] != keys_mHD.shape[1],
        )
        out_QD = out_bQwD.transpose(1, 2).flatten(0, 1)
        return out_QD if self._back is None else out_QD[self._back]

    def finish(self) -> None:
        """Stores keys and values of all layers in the prompts."""
        keys_LmHD, values_LmHD = torch.stack(self._keys), torch.stack(self._values)
        first = 0
        for piece in self._pieces:
            at = slice(first, first + len(piece))
            piece.prompt.keys_LHPD[:, :, : piece.end] = keys_LmHD[:, at].transpose(1, 2)
            piece.prompt.values_LHPD[:, :, : piece.end] = values_LmHD[:, at].transpose(1, 2)
            first = at.stop

    def _spread(self, rows_mXD: torch.Tensor) -> torch.Tensor:
        """Pads the rows to `[b, X, w, D]`."""
        if self._padded is not None:
            rows_mXD = rows_mXD[self._padded]
        return rows_mXD.view(-1, self._width, *rows_mXD.shape[1:]).transpose(1, 2)


class ForwardPass:
    """Attends for the tokens of one forward pass.

    Args:
        lanes: their rows come first; empty ones are left out.
        pieces: their tokens come after the rows. Beginnings of like length should be neighbours.
    """

    def __init__(self, lanes: Sequence[Lane], pieces: Sequence[PromptPiece]) -> None:
        lanes = [lane for lane in lanes if len(lane)]
        self._reading = _together(pieces)
        self._members: list[Lane | PromptPiece | _Beginnings] = [*lanes, *self._reading]
        self._sizes = [len(member) for member in self._members]
        self._pieces = pieces
        for lane in lanes:
            lane.open_column()

    def wanted(self, rows: int) -> torch.Tensor | None:
        """Lists the tokens whose hidden states are of use, the `rows` rows first; None = all."""
        if all(piece.wanted == len(piece) for piece in self._pieces):
            return None
        ends = rows + np.cumsum([len(piece) for piece in self._pieces])
        parts = [np.arange(rows)]
        parts += [
            np.arange(end - piece.wanted, end)
            for piece, end in zip(self._pieces, ends.tolist(), strict=True)
        ]
        return on(self._pieces[0].prompt.keys_LHPD.device, np.concatenate(parts))

    def attend(
        self,
        layer: int,
        queries_NQD: torch.Tensor,
        keys_NHD: torch.Tensor,
        values_NHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attends for all tokens, `[N, Q, D]`; keeps their keys and values for later passes."""
        if len(self._members) == 1:
            return self._members[0].attend(layer, queries_NQD, keys_NHD, values_NHD, scale)
        parts = zip(
            self._members,
            torch.split_with_sizes(queries_NQD, self._sizes),
            torch.split_with_sizes(keys_NHD, self._sizes),
            torch.split_with_sizes(values_NHD, self._sizes),
            strict=True,
        )
        return torch.cat(
            [
                part.attend(layer, queries, keys, values, scale)
                for part, queries, keys, values in parts
            ]
        )

    def finish(self) -> None:
        """Stores the computed keys and values in the prompts; to be called after the last layer."""
        for reading in self._reading:
            reading.finish()


def _together(pieces: Sequence[PromptPiece]) -> list[PromptPiece | _Beginnings]:
    """Joins neighbouring pieces that can attend together."""
    found: list[PromptPiece | _Beginnings] = []
    alike: list[PromptPiece] = []
    for piece in pieces:
        lengths = [len(other) for other in (*alike, piece)]
        if alike and (piece.start or max(lengths) > _MOST_PADDING * min(lengths)):
            found.append(_Beginnings(alike))
            alike = []
        if piece.start:
            found.append(piece)
        else:
            alike.append(piece)
    return [*found, _Beginnings(alike)] if alike else found
