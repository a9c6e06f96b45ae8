"""Logprobs of tokens that a sampling request names, or has drawn, at its prompt's places.

Knows `target_prompt_logprobs`, a tensor of token ids dense or sparse, and `prompt_alt_tokens_k`,
tokens to draw; both as rows for the prompt tokens after the first. Does not know engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, StrictInt

from fireworks_training._wire.training import schema
from fireworks_training._wire.training.framing import FLOAT32, INT64
from fireworks_training.local.gateway.web.problems import HttpProblem

MAX_A_PLACE = 20
"""Tokens that may be named, and drawn, at one place of a prompt."""


class Targets(BaseModel):
    """Parses an int64 tensor `[len(prompt) - 1, K]`; -1, or what a sparse one leaves out, is no
    token."""

    model_config = ConfigDict(extra="forbid")

    data: list[StrictInt]
    dtype: Literal["int64"]
    shape: list[StrictInt] | None = None
    sparse_crow_indices: list[StrictInt] | None = None
    sparse_col_indices: list[StrictInt] | None = None


@dataclass(frozen=True, slots=True)
class PromptProbes:
    """Holds what is asked of a prompt's places, and writes the answer.

    Attributes:
        rows: named tokens for each prompt token after the first; empty lists where none are.
        layout: the tensor that named them; None when there was none.
        draws: tokens to draw at each place.
        columns: named tokens at a place, at most.
    """

    rows: Sequence[Sequence[int]] = ()
    layout: Targets | None = None
    draws: int = 0
    columns: int = 0

    @property
    def echo(self) -> int:
        """Prompt tokens, from the end, whose places are asked about; 0 = none."""
        if self.draws:
            return len(self.rows)
        first = next((i for i, row in enumerate(self.rows) if _named(row)), len(self.rows))
        return len(self.rows) - first

    def targets(self, echo: int) -> list[list[int]]:
        """Return the named tokens of the last `echo` places, as many at each, filled up with -1."""
        if not self.columns:
            return []
        rows = self.rows[max(len(self.rows) - echo, 0) :]
        return [[*row, *[-1] * (self.columns - len(row))] for row in rows]

    def fill(
        self,
        message: schema.SampleResponse,
        ids_nm: npt.NDArray[np.int32],
        logprobs_nm: npt.NDArray[np.float32],
    ) -> None:
        """Put an engine's logprobs of the last n places into an answer."""
        columns = self.columns
        if self.layout is not None:
            values = np.zeros((len(self.rows), columns), np.float32)
            values[len(self.rows) - len(ids_nm) :] = logprobs_nm[:, :columns]
            message.target_prompt_logprobs.CopyFrom(self._laid_out(self.layout, values))
        if self.draws:
            message.prompt_alt_tokens.tokens.CopyFrom(_dense(ids_nm[:, columns:]))
            message.prompt_alt_tokens.logprobs.CopyFrom(_dense(logprobs_nm[:, columns:]))

    def _laid_out(self, layout: Targets, values: npt.NDArray[np.float32]) -> schema.Tensor:
        if layout.sparse_crow_indices is None:
            return _dense(values)
        lengths = np.array([len(row) for row in self.rows])
        listed = values[np.arange(values.shape[1]) < lengths[:, None]]
        tensor = schema.Tensor(dtype=cast("Any", FLOAT32), shape=layout.shape or ())
        tensor.sparse_csr.values = listed.astype("<f4").tobytes()
        tensor.sparse_csr.crow_indices = np.array(layout.sparse_crow_indices, "<i8").tobytes()
        tensor.sparse_csr.col_indices = np.array(layout.sparse_col_indices, "<i8").tobytes()
        return tensor


def read_probes(
    targets: Targets | None, draws: int, prompt_tokens: int, vocab_size: int
) -> PromptProbes:
    """Check what is asked of a prompt's places, and return it.

    Raises:
        HttpProblem: 400 when the tensor does not fit the prompt or the vocabulary.
    """
    places = prompt_tokens - 1
    if draws and not places:
        raise HttpProblem(400, "prompt_alt_tokens_k: a prompt of one token has no place to draw at")
    if targets is None:
        return PromptProbes(rows=[()] * places, draws=draws)
    rows = _rows(targets, places)
    columns = max(map(len, rows), default=0)
    if not any(map(_named, rows)):
        raise HttpProblem(400, "target_prompt_logprobs: it names no token")
    if columns > MAX_A_PLACE:
        raise HttpProblem(400, f"target_prompt_logprobs: at most {MAX_A_PLACE} tokens at a place")
    for row in rows:
        if row and not -1 <= min(row) <= max(row) < vocab_size:
            text = f"target_prompt_logprobs: token ids must be from 0 to {vocab_size - 1}, or -1"
            raise HttpProblem(400, text)
    return PromptProbes(rows, targets, draws, columns)


def _rows(targets: Targets, places: int) -> list[list[int]]:
    shape, data = targets.shape or [], targets.data
    crow, cols = targets.sparse_crow_indices, targets.sparse_col_indices
    if len(shape) != 2 or shape[0] != places or shape[1] < 1:
        raise HttpProblem(
            400, f"target_prompt_logprobs: the shape must be [{places}, K], K at least 1"
        )
    if crow is None and cols is None:
        if len(data) != shape[0] * shape[1]:
            raise HttpProblem(400, "target_prompt_logprobs: as many values as its shape says")
        return [data[i : i + shape[1]] for i in range(0, len(data), shape[1])]
    bounds = list(pairwise(crow or ()))
    fits = (
        len(bounds) == places
        and crow is not None
        and cols is not None
        and crow[0] == 0
        and crow[-1] == len(data) == len(cols)
        and all(low <= high for low, high in bounds)
        and all(0 <= column < shape[1] for column in cols)
    )
    if not fits:
        raise HttpProblem(400, "target_prompt_logprobs: its sparse indices do not fit its shape")
    return [data[low:high] for low, high in bounds]


def _dense(values: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> schema.Tensor:
    wanted, dtype = ("<i8", INT64) if values.dtype.kind == "i" else ("<f4", FLOAT32)
    return schema.Tensor(
        dense=values.astype(wanted).tobytes(), dtype=cast("Any", dtype), shape=values.shape
    )


def _named(row: Sequence[int]) -> bool:
    return any(token != -1 for token in row)
