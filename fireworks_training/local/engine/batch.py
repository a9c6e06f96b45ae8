"""The running batch: prompts being read and streams being decoded, one packed pass a step for both.

Knows requests, the prefix cache and the lanes. Does not know the queue, weights or the socket.

A request that is added takes a slot. If its prompt is in the cache, it gets its first token in the
next step without any computation of its own; if the same prompt is just being read, it waits with
the others for it; else its prompt is read, in pieces that leave room for the rows that decode. A
row leaves when its stream ends; new rows join between two steps. Rows with the same prompt share a
lane: a row that decoded its prompt alone moves there when a second stream comes with it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch

from fireworks_training.local.engine.attention import ForwardPass, PromptPiece
from fireworks_training.local.engine.decoder import Decoder
from fireworks_training.local.engine.lanes import Lane, LaneKind
from fireworks_training.local.engine.probes import probe, width
from fireworks_training.local.engine.prompts import Prompt, PromptStore
from fireworks_training.local.engine.requests import StreamRequest
from fireworks_training.local.engine.sampling import Sampled, sample, top
from fireworks_training.local.engine.slots import I64, SlotTable
from fireworks_training.local.engine_frames import PromptLogprobs
from fireworks_training.local.model.devices import array_of, on


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Holds the tokens of one step, one entry a stream, in the fields of `engine_frames.Step`."""

    streams: npt.NDArray[np.uint32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    sampling_logprobs: npt.NDArray[np.float32]
    finished: npt.NDArray[np.uint8]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


NO_ROWS = TokenRows(
    streams=np.empty(0, np.uint32),
    tokens=np.empty(0, np.int32),
    logprobs=np.empty(0, np.float32),
    sampling_logprobs=np.empty(0, np.float32),
    finished=np.empty(0, np.uint8),
    top_ids=np.empty((0, 0), np.int32),
    top_logprobs=np.empty((0, 0), np.float32),
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Holds the results of one step.

    Attributes:
        rows: a token for each stream that decodes, the ones that just began included; None when
            the step only read prompts.
        begun: streams that got their first token, with the prompt tokens that each took from
            the cache or from a computation shared with others.
        echoes: prompt logprobs of the streams that began, where their requests want them.
    """

    rows: TokenRows | None
    begun: list[tuple[int, int]]
    echoes: list[PromptLogprobs]


@dataclass(slots=True)
class _Echo:
    """Collects logprobs of a prompt's tokens from `first` on, piece by piece."""

    first: int
    logprobs: list[npt.NDArray[np.float32]] = field(default_factory=list)
    top_ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    top_logprobs: list[npt.NDArray[np.float32]] = field(default_factory=list)
    probed_ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    probed_logprobs: list[npt.NDArray[np.float32]] = field(default_factory=list)


@dataclass(slots=True)
class _WaitingSlot:
    """Holds a slot that waits for its prompt; it computes all but `cached` tokens of it alone."""

    slot: int
    cached: int
    echo: _Echo | None


@dataclass(slots=True)
class _PendingPrompt:
    """Holds a prompt and the slots that wait until it is read."""

    prompt: Prompt
    waiters: list[_WaitingSlot]

    @property
    def echoed(self) -> bool:
        """Tells whether a waiting stream wants logprobs of the prompt's own tokens."""
        return any(waiter.echo is not None for waiter in self.waiters)


class RunningBatch:
    """Reads prompts and decodes for the streams that hold a slot.

    Args:
        decoder: the model.
        max_slots: streams at most.
        prompt_cache_bytes: bytes of the prefix cache at most; 0 turns it off.
        share: whether requests with the same prompt share its computation and its memory.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_slots: int,
        prompt_cache_bytes: int = 1 << 28,
        *,
        share: bool = True,
    ) -> None:
        self._decoder = decoder
        self._slots = SlotTable(max_slots, decoder.vocab_size)
        self._store = PromptStore(decoder.geometry, prompt_cache_bytes if share else 0)
        self._share = share
        self._lanes: dict[LaneKind, Lane] = {}
        self._pending: list[_PendingPrompt] = []
        # Slots that decode a prompt alone, until a second stream comes with it.
        self._unshared: WeakKeyDictionary[Prompt, int] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self._slots.free

    @property
    def longest(self) -> int:
        """Tokens that the longest stream will have at its end."""
        return max((request.total for request in self._slots.requests.values()), default=0)

    @property
    def unread(self) -> int:
        """Number of prompt tokens still to compute."""
        return sum(entry.prompt.unread for entry in self._pending)

    def forget_prompts(self) -> None:
        """Empties the prefix cache."""
        self._store.clear()

    @torch.inference_mode()
    def weights_changed(self) -> None:
        """Empties the prefix cache and reads pending prompts again, since the weights are new.

        Streams that decode go on with the keys and values they have.
        """
        self._decoder.refresh()
        self._store.clear()
        pending, self._pending = self._pending, []
        for entry in pending:
            for waiter in entry.waiters:
                self._read(waiter.slot, self._slots.requests[waiter.slot])

    @torch.inference_mode()
    def drop(self, streams: Iterable[int]) -> None:
        """Frees the slots of cancelled streams; unknown ids are ignored."""
        gone = set(streams)
        slots = {slot for slot, request in self._slots.requests.items() if request.stream in gone}
        for entry in self._pending:
            entry.waiters = [waiter for waiter in entry.waiters if waiter.slot not in slots]
        self._pending = [entry for entry in self._pending if entry.waiters]
        self._leave(slots)

    @torch.inference_mode()
    def add(self, request: StreamRequest) -> None:
        """Gives a request a slot, which has to be free, and queues its prompt."""
        self._read(self._slots.take(request), request)

    @torch.inference_mode()
    def step(self, max_tokens: int = 1 << 30, waiting: Iterable[StreamRequest] = ()) -> StepResult:
        """Computes one more token for every row, and reads pieces of pending prompts.

        Args:
            max_tokens: prompt tokens to read at most; at least one is read.
            waiting: requests that will soon be added: lanes may take memory for them at once.
        """
        lanes = list(self._lanes.values())
        pieces = self._next_pieces(max_tokens)
        running: I64 = np.concatenate([np.zeros(0, np.int64), *(lane.slots for lane in lanes)])
        hidden_NE = self._forward(running, lanes, pieces)
        if hidden_NE is not None:
            self._finish_pieces(pieces, hidden_NE[len(running) :])
        ready = [entry for entry in self._pending if not entry.prompt.unread]
        self._pending = [entry for entry in self._pending if entry.prompt.unread]
        waiters = [waiter for entry in ready for waiter in entry.waiters]
        slots: I64 = np.concatenate(
            (running, np.array([waiter.slot for waiter in waiters], np.int64))
        )
        if not len(slots):
            return StepResult(None, [], [])
        rows = self._sample(slots, self._last_hidden(hidden_NE, len(running), ready))
        begun = [(self._slots.requests[waiter.slot].stream, waiter.cached) for waiter in waiters]
        echoes = [self._echoed(waiter) for waiter in waiters if waiter.echo is not None]
        ended = set(slots[rows.finished != 0].tolist())
        coming = self._coming([*ready, *self._pending], waiting) if ready else Counter()
        for entry in ready:
            joining = [waiter.slot for waiter in entry.waiters if waiter.slot not in ended]
            self._join(entry.prompt, joining, coming)
        self._leave(ended)
        return StepResult(rows, begun, echoes)

    # -- prompts ---------------------------------------------------------------------------------

    def _read(self, slot: int, request: StreamRequest) -> None:
        """Waits for the request's prompt: in the cache, being read for others, or begun here."""
        tokens = request.prompt
        first = request.first_echo
        # The logprob of a prompt token needs the hidden state before it, which no cache holds.
        echo = _Echo(first) if request.echo else None
        usable = len(tokens) - 1 if echo is None else min(first, len(tokens)) - 1
        if self._share:
            for entry in self._pending:
                whole = echo is None and not entry.prompt.unread
                if entry.prompt.tokens == tokens and (entry.prompt.done <= usable or whole):
                    entry.waiters.append(_WaitingSlot(slot, len(tokens), echo))
                    return
            if echo is None and (known := self._store.find(tokens)) is not None:
                self._pending.append(_PendingPrompt(known, [_WaitingSlot(slot, len(tokens), None)]))
                return
        prompt = self._store.start(tokens, usable)
        self._pending.append(_PendingPrompt(prompt, [_WaitingSlot(slot, prompt.reused, echo)]))

    def _next_pieces(self, max_tokens: int) -> list[PromptPiece]:
        """Chooses the pieces of prompts that this step reads, the oldest prompts first."""
        pieces: list[PromptPiece] = []
        left = max(1, max_tokens)
        for entry in self._pending:
            prompt = entry.prompt
            if prompt.unread and left > 0:
                end = prompt.done + min(left, prompt.unread)
                wanted = None if entry.echoed else int(end == len(prompt.tokens))
                pieces.append(PromptPiece(prompt, end, wanted))
                left -= len(pieces[-1])
        # Beginnings of like length are computed together.
        return sorted(pieces, key=lambda piece: (piece.start > 0, len(piece)))

    def _forward(
        self, running: I64, lanes: Sequence[Lane], pieces: Sequence[PromptPiece]
    ) -> torch.Tensor | None:
        """Computes hidden states of the rows, then of the pieces; None without tokens."""
        ids = [self._slots.last[running]]
        positions = [self._slots.positions(running)]
        for piece in pieces:
            ids.append(np.array(piece.tokens, np.int64))
            positions.append(np.arange(piece.start, piece.end))
        ids_N = on(self._decoder.device, np.concatenate(ids))
        if not len(ids_N):
            return None
        positions_N = on(self._decoder.device, np.concatenate(positions))
        packed = ForwardPass(lanes, pieces)
        return self._decoder.hidden(ids_N, positions_N, packed, packed.wanted(len(running)))

    def _finish_pieces(self, pieces: Sequence[PromptPiece], hidden_nE: torch.Tensor) -> None:
        """Takes echoes and last hidden states, and caches the prompts that are now complete."""
        pending = {id(entry.prompt): entry for entry in self._pending}
        parts = torch.split_with_sizes(hidden_nE, [piece.wanted for piece in pieces])
        for piece, hidden_cE in zip(pieces, parts, strict=True):
            for waiter in pending[id(piece.prompt)].waiters:
                if waiter.echo is not None:
                    request = self._slots.requests[waiter.slot]
                    self._echo(waiter.echo, request, piece, hidden_cE)
            piece.prompt.done = piece.end
            if not piece.prompt.unread:
                piece.prompt.last_E = hidden_cE[-1].clone()
                self._store.put(piece.prompt)

    def _last_hidden(
        self, hidden_NE: torch.Tensor | None, running: int, ready: Sequence[_PendingPrompt]
    ) -> torch.Tensor:
        """Gathers the hidden states to sample from: the rows', then those of slots that begin."""
        parts: list[torch.Tensor] = []
        if hidden_NE is not None and running:
            parts.append(hidden_NE[:running])
        for entry in ready:
            assert entry.prompt.last_E is not None
            parts.append(entry.prompt.last_E.expand(len(entry.waiters), -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    # -- rows ------------------------------------------------------------------------------------

    def _sample(self, slots: I64, hidden_nE: torch.Tensor) -> TokenRows:
        logits_nV = self._decoder.logits(hidden_nE)
        sampled: Sampled = sample(logits_nV, self._slots.sampling_rows(slots))
        tokens, finished = self._slots.advance(slots, sampled)
        return TokenRows(
            self._slots.streams(slots),
            tokens,
            sampled.logprobs,
            sampled.sampling_logprobs,
            finished,
            sampled.top_ids,
            sampled.top_logprobs,
        )

    def _join(self, prompt: Prompt, slots: list[int], coming: Counter[LaneKind]) -> None:
        """Gives rows to the slots of a prompt that was read; `coming` rows are likely to follow."""
        alike: dict[LaneKind, list[int]] = {}
        for slot in slots:
            alike.setdefault(_kind(self._slots.requests[slot]), []).append(slot)
        for shared, rows in alike.items():
            # Streams whose prompt others decode already join them.
            first = self._unshared_slot(prompt, shared)
            lane = self._lanes.get(shared)
            followed = first is not None or (lane is not None and lane.holds(prompt))
            left = self._slots.left(rows)
            coming[shared] -= len(rows)
            if self._share and (len(rows) > 1 or followed):
                if first is not None:
                    self._move_to_shared(first, prompt, shared)
                self._lane(shared).join(prompt, rows, left, coming=coming[shared])
            else:
                alone = replace(shared, shared=False)
                self._lane(alone).join(prompt, rows, left, coming=coming[shared])
                if self._share:
                    self._unshared[prompt] = rows[0]

    def _coming(
        self, pending: Sequence[_PendingPrompt], waiting: Iterable[StreamRequest]
    ) -> Counter[LaneKind]:
        """Counts the requests that have no row yet, by the lanes that they will join."""
        requests = [
            self._slots.requests[waiter.slot] for entry in pending for waiter in entry.waiters
        ]
        requests += itertools.islice(waiting, self._slots.free)
        return Counter(_kind(request) for request in requests)

    def _unshared_slot(self, prompt: Prompt, shared: LaneKind) -> int | None:
        """Finds the slot that decodes a prompt alone and could do so in this lane."""
        slot = self._unshared.get(prompt)
        if slot is None:
            return None
        return slot if _kind(self._slots.requests[slot]) == shared else None

    def _move_to_shared(self, slot: int, prompt: Prompt, shared: LaneKind) -> None:
        """Moves the row of a slot that decoded alone to the lane where its prompt is shared."""
        kind = replace(shared, shared=False)
        past = self._lanes[kind].take(slot, prompt)
        if not len(self._lanes[kind]):
            del self._lanes[kind]
        self._lane(shared).join(prompt, [slot], self._slots.left([slot]), past)
        del self._unshared[prompt]

    def _lane(self, kind: LaneKind) -> Lane:
        if kind not in self._lanes:
            self._lanes[kind] = Lane(kind, self._decoder.geometry)
        return self._lanes[kind]

    def _leave(self, slots: set[int]) -> None:
        if not slots:
            return
        for kind, lane in list(self._lanes.items()):
            lane.leave(slots)
            # Lanes that nobody needs give their memory back.
            if not len(lane):
                del self._lanes[kind]
        for prompt in [prompt for prompt, slot in self._unshared.items() if slot in slots]:
            del self._unshared[prompt]
        for slot in slots:
            self._slots.release(slot)

    # -- echoes ----------------------------------------------------------------------------------

    def _echo(
        self, echo: _Echo, request: StreamRequest, piece: PromptPiece, hidden_cE: torch.Tensor
    ) -> None:
        """Adds raw logprobs of the prompt tokens whose predecessors were just computed."""
        tokens = piece.prompt.tokens
        # The logits at a position are about the token after it.
        low, high = max(echo.first, piece.start + 1), min(len(tokens), piece.end + 1)
        if low >= high:
            return
        targets_n = torch.tensor(tokens[low:high], device=self._decoder.device)
        at = slice(low - 1 - piece.start, high - 1 - piece.start)
        logits_nV = self._decoder.logits(hidden_cE[at])
        lse_n = torch.logsumexp(logits_nV, dim=-1)
        logprobs_n = logits_nV.gather(1, targets_n[:, None])[:, 0] - lse_n
        ids, values = top(logits_nV, array_of(lse_n), np.full(len(targets_n), request.top_logprobs))
        echo.logprobs.append(array_of(logprobs_n))
        echo.top_ids.append(ids)
        echo.top_logprobs.append(values)
        ids, values = probe(request, low, logits_nV, lse_n)
        echo.probed_ids.append(ids)
        echo.probed_logprobs.append(values)

    def _echoed(self, waiter: _WaitingSlot) -> PromptLogprobs:
        request, echo = self._slots.requests[waiter.slot], waiter.echo
        assert echo is not None
        k, m = request.top_logprobs, width(request)
        return PromptLogprobs(
            request.stream,
            np.concatenate([*echo.logprobs, np.empty(0, np.float32)]),
            np.concatenate([*echo.top_ids, np.empty((0, k), np.int32)]),
            np.concatenate([*echo.top_logprobs, np.empty((0, k), np.float32)]),
            np.concatenate([*echo.probed_ids, np.empty((0, m), np.int32)]),
            np.concatenate([*echo.probed_logprobs, np.empty((0, m), np.float32)]),
        )


def _kind(request: StreamRequest) -> LaneKind:
    """Returns the kind of the shared lane for a request."""
    return LaneKind.of(len(request.prompt), request.max_tokens, shared=True)
