"""What one forward pass computes, and how its tokens attend: rows of lanes, then pieces of prompts.

Knows lanes and prompts; no requests, no model. All tokens of a pass are packed into one sequence
without padding: first one token for each running row, lane after lane, then the pieces of prompts.
Linear layers see `[N, ...]`; only attention knows who belongs to whom. Legend: N tokens of the
pass, H key/value heads, R query heads a key/value head, Q = H * R, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from fireworks_training.local.engine.lanes import Lane
from fireworks_training.local.engine.prompts import Prompt


class Piece:
    """Tokens `[start, end)` of a prompt, to be computed in one pass."""

    def __init__(self, prompt: Prompt, end: int) -> None:
        self.prompt = prompt
        self.start = prompt.done
        self.end = end
        # The usual causal mask holds for a prompt's beginning; later pieces see all before them.
        self._mask: torch.Tensor | None = None
        if self.start:
            device = prompt.keys_LHPD.device
            queries = torch.arange(self.start, end, device=device)[:, None]
            self._mask = torch.arange(end, device=device) <= queries

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def tokens(self) -> tuple[int, ...]:
        """Its ids."""
        return self.prompt.tokens[self.start : self.end]

    def attend(
        self,
        layer: int,
        queries_cQD: torch.Tensor,
        keys_cHD: torch.Tensor,
        values_cHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of the piece to its prompt up to there, `[c, Q, D]`; keeps keys and values."""
        keys_HPD = self.prompt.keys_LHPD[layer]
        values_HPD = self.prompt.values_LHPD[layer]
        keys_HPD[:, self.start : self.end] = keys_cHD.transpose(0, 1)
        values_HPD[:, self.start : self.end] = values_cHD.transpose(0, 1)
        out_1QcD = scaled_dot_product_attention(
            queries_cQD.transpose(0, 1)[None],
            keys_HPD[None, :, : self.end],
            values_HPD[None, :, : self.end],
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=scale,
            enable_gqa=queries_cQD.shape[1] != keys_cHD.shape[1],
        )
        return out_1QcD[0].transpose(0, 1)


class Pass:
    """The tokens of one forward pass, and their attention."""

    def __init__(self, lanes: Sequence[Lane], pieces: Sequence[Piece]) -> None:
        self._lanes = [lane for lane in lanes if len(lane)]
        self._pieces = pieces
        self._sizes = [len(lane) for lane in self._lanes] + [len(piece) for piece in pieces]
        for lane in self._lanes:
            lane.open_column()

    def attend(
        self,
        layer: int,
        queries_NQD: torch.Tensor,
        keys_NHD: torch.Tensor,
        values_NHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of all tokens, `[N, Q, D]`; their keys and values are kept for later passes."""
        members: list[Lane | Piece] = [*self._lanes, *self._pieces]
        parts = zip(
            members,
            torch.split_with_sizes(queries_NQD, self._sizes),
            torch.split_with_sizes(keys_NHD, self._sizes),
            torch.split_with_sizes(values_NHD, self._sizes),
            strict=True,
        )
        out = [
            part.attend(layer, queries, keys, values, scale)
            for part, queries, keys, values in parts
        ]
        return out[0] if len(out) == 1 else torch.cat(out)
