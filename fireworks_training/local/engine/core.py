"""The engine without its socket: takes controls, returns frames, does one decode step a tick.

Knows the queue of waiting requests, the running batch and the pending hot load, and decides in
which order they get the thread. Does not know file descriptors; its clock is given to it.

The rules:
1. A request waits until the running batch has a slot, the cache has room for it at its longest,
   and the prompts before it leave it some of the next step's prompt tokens: time in the queue is
   time in which nothing is done for the request.
2. A hot load is swapped in between two steps, by the rules of `loads`.
3. A request that is cancelled holds no slot at the next tick.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fireworks_training.local.engine.batch import NO_ROWS, RunningBatch, StepResult, TokenRows
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
class EngineCapacity:
    """Limits the streams, requests and tokens that one engine holds.

    Attributes:
        max_slots: streams that decode together.
        max_waiting: requests that wait beyond those.
        max_context: tokens of prompt and completion together.
        cache_tokens: rows times columns of the key/value cache; one stream is always allowed.
        prompt_tokens: tokens of the prefix cache; 0 turns it and the sharing of prompts off.
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
    """Serves one replica: admits requests, steps the batch, swaps weights. Not thread-safe.

    Args:
        weights: the model that it serves.
        limits: its capacity.
        clock: seconds; has to be the one that the gateway stamps `sent` with.
        run: runs the preparation of a hot load, at once or in a thread.

    Attributes:
        loads: the pending hot load.
    """

    def __init__(
        self,
        weights: ServedWeights,
        limits: EngineCapacity,
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
        # Of the streams whose first token is still to come: when they left the queue, and the
        # seconds that they had spent in it.
        self._admitted: dict[int, tuple[float, float]] = {}
        self._waiting: dict[int, StreamRequest] = {}
        self._live: set[int] = set()
        self._outbox: list[bytes] = []
        self.loads = SnapshotLoads(weights, self._queue_frame, self._batch.weights_changed, run=run)
        self._counts_changed = False

    @property
    def busy(self) -> bool:
        """Tells whether a tick would do or send anything."""
        return bool(
            len(self._batch)
            or self._outbox
            or self._counts_changed
            or self.loads.busy
            or (self._waiting and not self.loads.closes_admission)
        )

    def hello(self) -> bytes:
        """Encodes the frame that opens a connection: the engine's capacity and its snapshot."""
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
        """Carries out one control: `add`, `cancel`, `load` or `reset_prompt_cache`.

        Raises:
            ValueError: it is another one, or has fields of wrong types.
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
            self._admitted.pop(stream, None)
        self._batch.drop(gone)
        self._live -= gone
        self._counts_changed = True

    def reset(self) -> None:
        """Drops all streams, since their gateway is gone. A pending load goes on."""
        self.cancel(set(self._live))
        self._outbox.clear()
        self._counts_changed = False

    def tick(self) -> list[bytes]:
        """Advances the hot load, admits requests, does one step; returns the frames to send."""
        has_tokens = False
        self.loads.advance(running=bool(len(self._batch)))
        if not self.loads.closes_admission:
            self._admit()
        if len(self._batch):
            step = self._batch.step(self._limits.step_tokens, self._waiting.values())
            self._queue_frames(step)
            has_tokens = step.rows is not None
        if self._counts_changed and not has_tokens:
            self._queue_step(NO_ROWS)
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
            answer = {"op": "refused", "stream": stream, "full": full, "message": str(refusal)}
            self._queue_frame(encode_control(answer))
            return
        self._waiting[stream] = request
        self._live.add(stream)

    def _admit(self) -> None:
        """Gives slots to the waiting requests that the next step has room for, oldest first."""
        if not self._waiting:
            return
        now = self._clock()
        longest = self._batch.longest
        for request in list(self._waiting.values()):
            rows = len(self._batch) + 1
            longest = max(longest, request.total)
            if rows > self._limits.max_slots or self._batch.unread >= self._limits.step_tokens:
                return
            if rows > 1 and rows * longest > self._limits.cache_tokens:
                return
            del self._waiting[request.stream]
            self._admitted[request.stream] = now, now - request.arrived
            self._batch.add(request)

    def _queue_frames(self, step: StepResult) -> None:
        """Queues the frames of one step: a stream's beginning goes before its first token."""
        if step.begun:
            now = self._clock()
            streams = [stream for stream, _ in step.begun]
            admitted = [self._admitted.pop(stream) for stream in streams]
            self._queue_frame(
                encode_begun(
                    Begun(
                        version=self._weights.held.version,
                        streams=np.array(streams, np.uint32),
                        queued=np.array([queued for _, queued in admitted], np.float32),
                        prefill=np.array([now - at for at, _ in admitted], np.float32),
                        cached=np.array([cached for _, cached in step.begun], np.uint32),
                        active=np.full(len(streams), len(self._live), np.uint32),
                    )
                )
            )
        self._outbox += [encode_prompt_logprobs(echo) for echo in step.echoes]
        if step.rows is not None:
            self._live.difference_update(step.rows.streams[step.rows.finished != 0].tolist())
            self._queue_step(step.rows)

    def _queue_step(self, rows: TokenRows) -> None:
        """Queues a step frame; without rows it only reports the counts."""
        self._queue_frame(
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

    def _queue_frame(self, frame: bytes) -> None:
        self._outbox.append(frame)


def _eos_ids(weights: ServedWeights) -> frozenset[int]:
    """Reads the end tokens from the model's generation settings, or from its configuration."""
    for settings in (weights.model.generation_config, weights.model.config):
        found = getattr(settings, "eos_token_id", None)
        if isinstance(found, int):
            return frozenset({found})
        if found:
            return frozenset(found)
    return frozenset()
