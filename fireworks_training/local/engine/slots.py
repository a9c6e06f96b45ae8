"""What each running stream still has to do, in arrays: a step reads them for all rows at once.

Knows requests and numpy; no tensors of the model. With hundreds of rows a loop over requests in
each step would cost more than the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fireworks_training.local.engine.requests import SamplingRequest, uniforms
from fireworks_training.local.engine.sampling import Sampled, SamplingRows
from fireworks_training.local.frames import NO_TOKEN, Finish

I64 = npt.NDArray[np.int64]
_FIELDS = {
    "stream": np.int64,
    "key": np.uint64,
    "temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int64,
    "min_tokens": np.int64,
    "max_tokens": np.int64,
    "top_logprobs": np.int64,
}


@dataclass(slots=True)
class _StopSet:
    """Tokens that end streams, as a row of the table; several streams share one."""

    row: int
    users: int = 0


class SlotTable:
    """Requests by slot.

    Attributes:
        requests: what holds each slot.
        last: int64, the token that each stream feeds next.
        produced: int64, tokens that it has.

    Args:
        slots: how many there are.
        vocab_size: tokens a stop set can name.
    """

    def __init__(self, slots: int, vocab_size: int) -> None:
        self.requests: dict[int, SamplingRequest] = {}
        self.last: I64 = np.zeros(slots, np.int64)
        self.produced: I64 = np.zeros(slots, np.int64)
        self._free = list(range(slots - 1, -1, -1))
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(slots, kind) for name, kind in _FIELDS.items()
        }
        self._prompt_length: I64 = np.zeros(slots, np.int64)
        self._stop_row: I64 = np.zeros(slots, np.int64)
        self._stop_sets: dict[frozenset[int], _StopSet] = {}
        self._stops: npt.NDArray[np.bool_] = np.zeros((1, vocab_size), np.bool_)
        self._free_stop_rows = [0]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def take(self, request: SamplingRequest) -> int:
        """The slot for a request; there has to be a free one."""
        slot = self._free.pop()
        self.requests[slot] = request
        for name, column in self._columns.items():
            column[slot] = getattr(request, name)
        self.produced[slot] = 0
        self._prompt_length[slot] = len(request.prompt)
        stops = self._stop_sets.get(request.stop_ids)
        if stops is None:
            stops = self._stop_sets[request.stop_ids] = _StopSet(self._new_stop_row())
            self._stops[stops.row] = False
            self._stops[stops.row, list(request.stop_ids)] = True
        stops.users += 1
        self._stop_row[slot] = stops.row
        return slot

    def release(self, slot: int) -> None:
        """Frees a slot."""
        request = self.requests.pop(slot)
        self._free.append(slot)
        stops = self._stop_sets[request.stop_ids]
        stops.users -= 1
        if not stops.users:
            del self._stop_sets[request.stop_ids]
            self._free_stop_rows.append(stops.row)

    def positions(self, slots: I64) -> I64:
        """Where the last token of each stream stands in its sequence."""
        positions: I64 = self._prompt_length[slots] + self.produced[slots] - 1
        return positions

    def left(self, slots: list[int]) -> list[int]:
        """Tokens that each stream may still sample."""
        return [self.requests[slot].max_tokens - int(self.produced[slot]) for slot in slots]

    def streams(self, slots: I64) -> npt.NDArray[np.uint32]:
        """The stream of each slot."""
        return self._columns["stream"][slots].astype(np.uint32)

    def sampling_rows(self, slots: I64) -> SamplingRows:
        """How the next token of each slot is sampled."""
        columns, produced = self._columns, self.produced[slots]
        barred = np.flatnonzero(produced < columns["min_tokens"][slots])
        return SamplingRows(
            temperature=columns["temperature"][slots],
            top_p=columns["top_p"][slots],
            top_k=columns["top_k"][slots],
            uniform=uniforms(columns["key"][slots], produced.astype(np.uint64)),
            top_logprobs=columns["top_logprobs"][slots],
            banned={
                int(row): stop_ids
                for row in barred
                if (stop_ids := self.requests[int(slots[row])].stop_ids)
            },
        )

    def advance(
        self, slots: I64, sampled: Sampled
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Notes a sampled token for each slot.

        Returns:
            The tokens, NO_TOKEN where a stream ends without one, and their `Finish` values.
        """
        tokens = sampled.tokens.copy()
        self.last[slots] = tokens
        self.produced[slots] += 1
        most = self._columns["max_tokens"][slots]
        finished = np.zeros(len(slots), np.uint8)
        finished[self.produced[slots] >= most] = Finish.LENGTH
        finished[self._stops[self._stop_row[slots], tokens]] = Finish.STOP
        finished[most == 0] = Finish.LENGTH
        finished[~sampled.finite] = Finish.NOT_FINITE
        tokens[(most == 0) | ~sampled.finite] = NO_TOKEN
        return tokens, finished

    def _new_stop_row(self) -> int:
        if not self._free_stop_rows:
            held = len(self._stops)
            self._stops = np.concatenate((self._stops, np.zeros_like(self._stops)))
            self._free_stop_rows = list(range(2 * held - 1, held - 1, -1))
        return self._free_stop_rows.pop()
