"""The slots of the running batch: settings and progress of all streams, as arrays for a step.

Knows requests and numpy. Does not know tensors of the model. With hundreds of rows a loop over
requests in each step would cost more than the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fireworks_training.local.engine.requests import StreamRequest, uniforms
from fireworks_training.local.engine.sampling import Sampled, SamplingRows
from fireworks_training.local.engine_frames import NO_TOKEN, Finish

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


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Holds the columns of some slots; it stays valid while the same requests hold them."""

    slots: I64
    columns: dict[str, npt.NDArray[Any]]
    streams: npt.NDArray[np.uint32]
    prompt_length: I64
    stop_row: I64
    barring: bool


@dataclass(slots=True)
class _StopSet:
    """Names the row of the stop table that holds a set of stop tokens; streams share it."""

    row: int
    users: int = 0


class SlotTable:
    """Keeps the requests that hold slots, and what a step needs to know of them.

    Attributes:
        requests: the request of each slot that is taken.
        last: int64, the token that each stream feeds next.
        produced: int64, tokens that each stream has sampled.

    Args:
        slots: number of slots.
        vocab_size: ids of stop tokens are below this.
    """

    def __init__(self, slots: int, vocab_size: int) -> None:
        self.requests: dict[int, StreamRequest] = {}
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
        # Kept from the last step: most steps have the rows of the one before.
        self._chosen: _Chosen | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self, request: StreamRequest) -> int:
        """Gives a request a slot; one has to be free."""
        slot = self._free.pop()
        self._chosen = None
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
        self._chosen = None
        self._free.append(slot)
        stops = self._stop_sets[request.stop_ids]
        stops.users -= 1
        if not stops.users:
            del self._stop_sets[request.stop_ids]
            self._free_stop_rows.append(stops.row)

    def positions(self, slots: I64) -> I64:
        """Computes the position of each stream's last token in its sequence."""
        positions: I64 = self._choose(slots).prompt_length + self.produced[slots] - 1
        return positions

    def left(self, slots: list[int]) -> list[int]:
        """Counts the tokens that each stream may still sample."""
        return [self.requests[slot].max_tokens - int(self.produced[slot]) for slot in slots]

    def streams(self, slots: I64) -> npt.NDArray[np.uint32]:
        """Returns the stream of each slot."""
        return self._choose(slots).streams

    def sampling_rows(self, slots: I64) -> SamplingRows:
        """Gathers the sampling parameters of each slot's next token."""
        chosen, produced = self._choose(slots), self.produced[slots]
        columns = chosen.columns
        banned: dict[int, frozenset[int]] = {}
        if chosen.barring:
            for row in np.flatnonzero(produced < columns["min_tokens"]).tolist():
                if stop_ids := self.requests[int(slots[row])].stop_ids:
                    banned[row] = stop_ids
        return SamplingRows(
            temperature=columns["temperature"],
            top_p=columns["top_p"],
            top_k=columns["top_k"],
            uniform=uniforms(columns["key"], produced.astype(np.uint64)),
            top_logprobs=columns["top_logprobs"],
            banned=banned,
        )

    def _choose(self, slots: I64) -> _Chosen:
        """Gathers the columns of some slots, or returns those of the step before."""
        known = self._chosen
        if known is not None and np.array_equal(known.slots, slots):
            return known
        columns = {name: column[slots] for name, column in self._columns.items()}
        self._chosen = _Chosen(
            slots=slots.copy(),
            columns=columns,
            streams=columns["stream"].astype(np.uint32),
            prompt_length=self._prompt_length[slots],
            stop_row=self._stop_row[slots],
            barring=bool(columns["min_tokens"].any()),
        )
        return self._chosen

    def advance(
        self, slots: I64, sampled: Sampled
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Notes a sampled token for each slot.

        Returns:
            The tokens, NO_TOKEN where a stream ends without one, and their `Finish` values.
        """
        chosen = self._choose(slots)
        tokens = sampled.tokens.copy()
        self.last[slots] = tokens
        self.produced[slots] += 1
        most = chosen.columns["max_tokens"]
        finished = np.where(self.produced[slots] >= most, np.uint8(Finish.LENGTH), np.uint8(0))
        finished[self._stops[chosen.stop_row, tokens]] = Finish.STOP
        none = (most == 0) | ~sampled.finite
        if none.any():
            finished[most == 0] = Finish.LENGTH
            finished[~sampled.finite] = Finish.NOT_FINITE
            tokens[none] = NO_TOKEN
        return tokens, finished

    def _new_stop_row(self) -> int:
        if not self._free_stop_rows:
            held = len(self._stops)
            self._stops = np.concatenate((self._stops, np.zeros_like(self._stops)))
            self._free_stop_rows = list(range(2 * held - 1, held - 1, -1))
        return self._free_stop_rows.pop()
