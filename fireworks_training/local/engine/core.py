"""The engine without its socket: takes controls, gives frames, one step a tick.

Knows the queue of waiting requests, the running batch and the pending hot load, and decides in
which order they get the thread. Knows no file descriptors; its only clock is the one it is given.

The rules:
1. A request waits until the running batch has a slot, the cache has room for it at its longest,
   and the prompts before it leave some of the next step's tokens to it: time in the queue is time
   in which nothing is done for the request.
2. A hot load is swapped in between two steps, as `loads` says.
3. A request that is cancelled holds no slot at the next tick.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fireworks_training.local.engine.batch import Rows, RunningBatch, Stepped
from fireworks_training.local.engine.decoder import Decoder
from fireworks_training.local.engine.loads import Run, SnapshotLoads, Transition, at_once
from fireworks_training.local.engine.requests import RequestRefused, StreamRequest, parse_add
from fireworks_training.local.engine.weights import ServedWeights
from fireworks_training.local.engine_frames import (
    Begun,
    Step,
    encode_begun,
    encode_control,
    encode_prompt_logprobs,
    encode_step,
)

TRANSITIONS: tuple[Transition, ...] = ("ASYNC", "SYNC")


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine holds at most.

    Attributes:
        max_slots: streams that decode together.
        max_waiting: requests that wait beyond those.
        max_context: tokens of prompt and completion together.
        cache_tokens: rows times columns of the key/value cache; one stream is always allowed.
        prompt_tokens: tokens of the prefix cache; 0 turns it off, and the sharing of prompts.
        step_tokens: prompt tokens that one step reads at most. A step takes longer with more of
            them, and all running streams wait for it.
    """

    max_slots: int = 256
    max_waiting: int = 4096
    max_context: int = 2048
    cache_tokens: int = 1 << 20
    prompt_tokens: int = 1 << 17
    step_tokens: int = 512


class Engine:
    """One replica's engine; not thread-safe.

    Args:
        weights: what it serves.
        limits: its bounds.
        clock: seconds; has to be the one that the gateway stamps `sent` with.
        run: runs the preparation of a hot load, at once or in a thread.

    Attributes:
        loads: the pending hot load.
    """

    def __init__(
        self,
        weights: ServedWeights,
        limits: EngineLimits,
        clock: Callable[[], float] = time.monotonic,
        run: Run = at_once,
    ) -> None:
        self._weights = weights
        self._limits = limits
        self._clock = clock
        self._eos_ids = _eos_ids(weights)
        self._decoder = Decoder(weights.model, limits.max_context)
        self._batch = RunningBatch(
            self._decoder,
            limits.max_slots,
            limits.prompt_tokens * self._decoder.geometry.bytes_per_token,
            share=limits.prompt_tokens > 0,
        )
        # When the requests whose first token is still to come left the queue.
        self._started: dict[int, float] = {}
        self._queued: dict[int, float] = {}
        self._waiting: dict[int, StreamRequest] = {}
        self._live: set[int] = set()
        self._outbox: list[bytes] = []
        self.loads = SnapshotLoads(weights, self._outbox_append, self._weights_changed, run=run)
        self._counts_changed = False

    @property
    def busy(self) -> bool:
        """Whether a tick would do or send anything."""
        return bool(
            len(self._batch)
            or self._outbox
            or self._counts_changed
            or self.loads.busy
            or (self._waiting and not self.loads.closes_admission)
        )

    def hello(self) -> bytes:
        """The frame that opens a connection: what this engine is and what it holds."""
        return encode_control(
            {
                **self.loads.status(),
                "op": "hello",
                "vocab_size": self._decoder.vocab_size,
                "max_context": self._limits.max_context,
                "max_slots": self._limits.max_slots,
                "max_waiting": self._limits.max_waiting,
            }
        )

    def control(self, message: Mapping[str, object]) -> None:
        """Takes one control: `add`, `cancel`, `load` or `reset_prompt_cache`.

        Raises:
            ValueError: it is none of these, or has fields of wrong types.
        """
        match message:
            case {"op": "add", "stream": int(stream)}:
                self._add(stream, message)
            case {"op": "cancel", "streams": list(streams)}:
                self.cancel(set(streams))
            case {"op": "load", "number": int(number), "identity": str(identity)}:
                transition = message.get("transition", "SYNC")
                restore = message.get("restore", False)
                if transition not in TRANSITIONS or not isinstance(restore, bool):
                    raise ValueError("a load has a transition, ASYNC or SYNC, and a flag restore")
                self.loads.request(number, identity, transition, restore=restore)
            case {"op": "reset_prompt_cache"}:
                self._batch.forget_prompts()
            case _:
                raise ValueError(f"control {str(message.get('op'))[:40]!r} is not understood")

    def cancel(self, streams: set[object]) -> None:
        """Drops streams, waiting or running; unknown ids are ignored."""
        gone = {stream for stream in streams if isinstance(stream, int)} & self._live
        if not gone:
            return
        for stream in gone:
            self._waiting.pop(stream, None)
            self._started.pop(stream, None)
            self._queued.pop(stream, None)
        self._batch.drop(gone)
        self._live -= gone
        self._counts_changed = True

    def reset(self) -> None:
        """The gateway is gone: nobody waits for any stream. A pending load goes on."""
        self.cancel(set(self._live))
        self._outbox.clear()
        self._counts_changed = False

    def tick(self) -> list[bytes]:
        """Does the next piece of work; returns the frames to send, in order."""
        stepped = False
        self.loads.advance(running=bool(len(self._batch)))
        if not self.loads.closes_admission:
            self._admit()
        if len(self._batch):
            step = self._batch.step(self._limits.step_tokens, self._waiting.values())
            self._send(step)
            stepped = step.rows is not None
        if self._counts_changed and not stepped:
            self._send_counts()
        self._counts_changed = False
        frames, self._outbox = self._outbox, []
        return frames

    # -- requests ------------------------------------------------------------------------------

    def _add(self, stream: int, message: Mapping[str, object]) -> None:
        full = len(self._waiting) >= self._limits.max_waiting + self._limits.max_slots
        try:
            if full:
                raise RequestRefused(f"{len(self._waiting)} requests are waiting already")
            if stream in self._live:
                raise RequestRefused(f"stream {stream} is taken")
            request = parse_add(
                message,
                vocab_size=self._decoder.vocab_size,
                max_context=self._limits.max_context,
                eos_ids=self._eos_ids,
                fresh_key=secrets.randbits(64),
                now=self._clock(),
            )
        except RequestRefused as refusal:
            self._outbox.append(
                encode_control(
                    {"op": "refused", "stream": stream, "full": full, "message": str(refusal)}
                )
            )
            return
        self._waiting[stream] = request
        self._live.add(stream)

    def _admit(self) -> None:
        """Gives slots to the waiting requests that the next step can do something for."""
        if not self._waiting:
            return
        now = self._clock()
        longest = self._batch.room
        for request in list(self._waiting.values()):
            rows = len(self._batch) + 1
            longest = max(longest, request.total)
            if rows > self._limits.max_slots or self._batch.unread >= self._limits.step_tokens:
                return
            if rows > 1 and rows * longest > self._limits.cache_tokens:
                return
            del self._waiting[request.stream]
            self._started[request.stream] = now
            self._queued[request.stream] = now - request.arrived
            self._batch.add(request)

    def _send(self, stepped: Stepped) -> None:
        """The frames of one step; what is said of beginnings goes before their first tokens."""
        if stepped.begun:
            now = self._clock()
            streams = [stream for stream, _ in stepped.begun]
            self._outbox.append(
                encode_begun(
                    Begun(
                        version=self._weights.held.version,
                        streams=np.array(streams, np.uint32),
                        queued=np.array([self._queued.pop(s) for s in streams], np.float32),
                        prefill=np.array([now - self._started.pop(s) for s in streams], np.float32),
                        cached=np.array([cached for _, cached in stepped.begun], np.uint32),
                        active=np.full(len(streams), len(self._live), np.uint32),
                    )
                )
            )
        self._outbox += [encode_prompt_logprobs(echo) for echo in stepped.echoes]
        if stepped.rows is not None:
            self._send_rows(stepped.rows)

    def _send_rows(self, rows: Rows) -> None:
        self._live.difference_update(rows.streams[rows.finished != 0].tolist())
        self._outbox.append(
            encode_step(
                Step(
                    version=self._weights.held.version,
                    active=len(self._batch),
                    waiting=len(self._waiting),
                    streams=rows.streams,
                    tokens=rows.tokens,
                    logprobs=rows.logprobs,
                    sampling_logprobs=rows.sampling_logprobs,
                    finished=rows.finished,
                    top_ids=rows.top_ids,
                    top_logprobs=rows.top_logprobs,
                )
            )
        )

    def _send_counts(self) -> None:
        none = np.empty(0)
        table = np.empty((0, 0))
        self._outbox.append(
            encode_step(
                Step(
                    version=self._weights.held.version,
                    active=len(self._batch),
                    waiting=len(self._waiting),
                    streams=none.astype(np.uint32),
                    tokens=none.astype(np.int32),
                    logprobs=none.astype(np.float32),
                    sampling_logprobs=none.astype(np.float32),
                    finished=none.astype(np.uint8),
                    top_ids=table.astype(np.int32),
                    top_logprobs=table.astype(np.float32),
                )
            )
        )

    # -- hot load ------------------------------------------------------------------------------

    def _outbox_append(self, frame: bytes) -> None:
        self._outbox.append(frame)

    def _weights_changed(self) -> None:
        """What was computed with the old weights stays with the completions that run, only."""
        self._batch.weights_changed()


def _eos_ids(weights: ServedWeights) -> frozenset[int]:
    """The end tokens of the model's generation settings, or of its configuration."""
    for settings in (weights.model.generation_config, weights.model.config):
        found = getattr(settings, "eos_token_id", None)
        if isinstance(found, int):
            return frozenset({found})
        if found:
            return frozenset(found)
    return frozenset()
