"""The gateway's end of an engine's socket: opens streams, hands out tokens, asks for hot loads.

Knows frames and asyncio. Does not know HTTP, text or processes. The streams are bounded by what the
engine takes.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from fireworks_training.local.engine_frames import (
    NO_TOKEN,
    Begun,
    Control,
    Frame,
    FrameDecoder,
    FrameError,
    PromptLogprobs,
    Step,
    encode_control,
)
from fireworks_training.local.gateway.inference.engine_stream import (
    EngineFull,
    EngineGone,
    EngineRefused,
    EngineStream,
    Generation,
    TopLogprobs,
)
from fireworks_training.local.gateway.inference.states import Transition

FLUSH_TOKENS = 8
FLUSH_SECONDS = 0.05
"""Seconds that a token waits for others at most."""

_FLUSH_SLICES = 4
"""Parts of the streams that are flushed in turn: all at once would hold up the loop."""

_RETRY_SECONDS = 0.02
_VERSIONS_KEPT = 64

LoadOutcome = Literal["loaded", "superseded", "failed"]


class LoadFailed(Exception):
    """Raised when a hot load ended without its snapshot; says why."""


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """Describes how a hot load ended; `reason` says why it did not load."""

    outcome: LoadOutcome
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """Holds what an engine last reported; the first four fields are as in `engine.weights.Held`."""

    identity: str | None = None
    kind: str | None = None
    tensors_sha256: str | None = None
    version: int = 0
    stage: str = "loading"
    target: str | None = None
    error: str | None = None
    timings: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class EngineHello:
    """Holds what an engine takes, from its hello."""

    vocab_size: int
    max_context: int
    max_slots: int
    max_waiting: int


class EngineClient(asyncio.Protocol):
    """Holds the connection to one engine.

    Args:
        socket: the engine's Unix socket.
        name: for messages, e.g. `<deployment>/0`.

    Attributes:
        state: state that the engine last reported.
        active, waiting: streams with a slot and requests without, as of its last step.
    """

    def __init__(self, socket: Path, name: str) -> None:
        self.name = name
        self.state = EngineState()
        self.active = 0
        self.waiting = 0
        self._socket = socket
        self._limits: EngineHello | None = None
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder()
        self._streams: dict[int, EngineStream] = {}
        self._numbers = itertools.count(1)
        self._loads: dict[int, asyncio.Future[LoadEnded]] = {}
        self._identities: dict[int, str | None] = {}
        self._greeted = asyncio.Event()
        self._closed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._slice = 0

    # -- life ----------------------------------------------------------------------------------

    async def connect(self, timeout_s: float = 120.0) -> None:
        """Connect, and wait until the engine has its model.

        Raises:
            TimeoutError: the socket did not appear, or the engine sent nothing, in time.
            EngineGone: the engine ended before it was ready.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._open()
                await self._greeted.wait()
        except BaseException:
            if self._transport is not None:
                self._transport.abort()
            raise
        if self._limits is None:
            raise EngineGone(f"engine {self.name} ended before it was ready")

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.create_unix_connection(lambda: self, str(self._socket))
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return

    @property
    def closed(self) -> Awaitable[object]:
        """Awaitable that is done when the connection has ended, for whatever reason."""
        return self._closed.wait()

    @property
    def is_closed(self) -> bool:
        """True once the connection has ended."""
        return self._closed.is_set()

    async def close(self, *, stop: bool = False) -> None:
        """End the connection; with `stop`, the engine's process too."""
        if self._transport is not None and not self.is_closed:
            if stop:
                self._send({"op": "stop"})
            self._transport.close()
            await self._closed.wait()

    # -- what it is ----------------------------------------------------------------------------

    @property
    def limits(self) -> EngineHello:
        """Capacity of the engine; only after `connect`."""
        if self._limits is None:
            raise EngineGone(f"engine {self.name} is not connected")
        return self._limits

    @property
    def open_streams(self) -> int:
        """Streams that this gateway has in the engine."""
        return len(self._streams)

    @property
    def has_room(self) -> bool:
        """True while the engine would take one more request."""
        limits = self._limits
        return limits is None or len(self._streams) < limits.max_slots + limits.max_waiting

    def identity_of(self, version: int) -> str | None:
        """Return the snapshot behind a weights version; None = the model's own weights."""
        return self._identities.get(version)

    def status(self) -> dict[str, object]:
        """Return the engine's row in the hot load route's `replicas`; `load` is as of its last
        step."""
        state = self.state
        loading: dict[str, object] = {
            "stage": state.stage,
            "target_snapshot_identity": state.target,
        }
        if state.error is not None:
            loading["error"] = state.error
        if state.timings is not None:
            loading["timings"] = state.timings
        adapters: list[dict[str, object]] = []
        if state.kind == "lora":
            adapters.append({"identity": state.identity, "status": "loaded"})
        slots = 0 if self._limits is None else self._limits.max_slots
        return {
            "current_snapshot_identity": state.identity,
            "readiness": self._limits is not None and not self.is_closed,
            "load": {"slots": slots, "active": self.active, "waiting": self.waiting},
            "loading_state": loading,
            "tensors_sha256": state.tensors_sha256,
            "loaded_adapters": adapters,
        }

    # -- what it does --------------------------------------------------------------------------

    def generate(
        self,
        generation: Generation,
        *,
        flush_tokens: int = FLUSH_TOKENS,
    ) -> EngineStream:
        """Send a request; its tokens come through the stream that is returned.

        Args:
            generation: what to sample.
            flush_tokens: tokens after which the reader is woken, the first one apart.

        Raises:
            EngineFull: as many requests wait as the engine takes.
            EngineGone: the connection has ended.
        """
        if self.is_closed or self._limits is None:
            raise EngineGone(f"engine {self.name} is gone")
        if not self.has_room:
            raise EngineFull(f"{len(self._streams)} requests are running or waiting already")
        number = next(self._numbers) & 0xFFFFFFFF
        stream = EngineStream(self, number, flush_tokens)
        self._streams[number] = stream
        fields = {name: getattr(generation, name) for name in Generation.__dataclass_fields__}
        self._send({"op": "add", "stream": number, "sent": time.monotonic(), **fields})
        self._start_timer()
        return stream

    def request_load(
        self,
        identity: str,
        *,
        reset_prompt_cache: bool = True,
        transition: Transition = "SYNC",
        restore: bool = False,
    ) -> asyncio.Future[LoadEnded]:
        """Ask for a hot load; the future gets its outcome. Cancelling it changes nothing.

        Args:
            transition: whether completions in flight finish on the old weights (SYNC) or go on with
                the new ones (ASYNC).
            restore: build a delta up from its whole chain if its predecessor is not held.
        """
        if self.is_closed or self._transport is None:
            raise EngineGone(f"engine {self.name} is gone")
        number = next(self._numbers)
        ended: asyncio.Future[LoadEnded] = asyncio.get_running_loop().create_future()
        self._loads[number] = ended
        if reset_prompt_cache:
            self._send({"op": "reset_prompt_cache"})
        self._send(
            {
                "op": "load",
                "number": number,
                "identity": identity,
                "transition": transition,
                "restore": restore,
            }
        )
        return ended

    async def load(self, identity: str) -> LoadEnded:
        """Bring an engine to a snapshot, whatever it holds; wait for it or for a newer one.

        Raises:
            LoadFailed: the engine refused it, or is gone.
        """
        ended = await self.request_load(identity, restore=True)
        if ended.outcome == "failed":
            raise LoadFailed(ended.reason)
        return ended

    def cancel(self, number: int) -> None:
        """Free the slot of a stream; nothing happens when it has ended."""
        if self._streams.pop(number, None) is not None and not self.is_closed:
            self._send({"op": "cancel", "streams": [number]})

    def _send(self, message: Mapping[str, object]) -> None:
        if self._transport is not None:
            self._transport.write(encode_control(message))

    # -- the timer for tokens that wait too long -------------------------------------------------

    def _start_timer(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(FLUSH_SECONDS / _FLUSH_SLICES, self._flush_slice)

    def _flush_slice(self) -> None:
        self._timer = None
        self._slice = (self._slice + 1) % _FLUSH_SLICES
        for number, stream in self._streams.items():
            if number % _FLUSH_SLICES == self._slice:
                stream.flush()
        if self._streams:
            self._start_timer()

    # -- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            frames = self._decoder.feed(data)
        except FrameError:
            # Nothing that follows can be trusted; the owner sees `closed` and replaces the engine.
            assert self._transport is not None
            self._transport.abort()
            return
        for frame in frames:
            self._take(frame)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        gone = EngineGone(f"engine {self.name} is gone")
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(gone)
        for ended in self._loads.values():
            if not ended.done():
                ended.set_result(LoadEnded("failed", str(gone)))
        self._loads.clear()
        self.active = self.waiting = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._closed.set()
        self._greeted.set()

    # -- frames --------------------------------------------------------------------------------

    def _take(self, frame: Frame) -> None:
        match frame:
            case Step():
                self._take_step(frame)
            case Begun():
                self._take_begun(frame)
            case PromptLogprobs():
                self._take_prompt(frame)
            case Control():
                self._take_control(frame.message)

    def _take_step(self, step: Step) -> None:
        self.active, self.waiting = step.active, step.waiting
        streams = self._streams
        # The newest streams come last, and their readers are woken first: a first token would
        # otherwise wait until all others of the step are written.
        row: int
        rows = zip(
            range(len(step.streams) - 1, -1, -1),
            step.streams[::-1].tolist(),
            step.tokens[::-1].tolist(),
            step.logprobs[::-1].tolist(),
            step.sampling_logprobs[::-1].tolist(),
            step.finished[::-1].tolist(),
            strict=True,
        )
        tops = _top_rows(step) if step.top_ids.shape[1] else None
        for row, number, token, logprob, sampling, finish in rows:
            # Tokens of a stream that was cancelled a moment ago are nobody's.
            if number not in streams:
                continue
            delta = streams[number].push(step.version, token, logprob, sampling, finish)
            if token != NO_TOKEN:
                delta.top.append([] if tops is None else tops[row])
            if finish:
                del streams[number]

    def _take_begun(self, begun: Begun) -> None:
        rows = zip(
            begun.streams.tolist(),
            begun.queued.tolist(),
            begun.prefill.tolist(),
            begun.cached.tolist(),
            begun.active.tolist(),
            strict=True,
        )
        for number, queued, prefill, cached, active in rows:
            if number in self._streams:
                self._streams[number].begin(begun.version, queued, prefill, cached, active)

    def _take_prompt(self, prompt: PromptLogprobs) -> None:
        if prompt.stream in self._streams:
            stream = self._streams[prompt.stream]
            stream.prompt_logprobs = prompt.logprobs.tolist()
            stream.prompt_top = _top_rows(prompt)
            stream.probed_ids = prompt.probed_ids
            stream.probed_logprobs = prompt.probed_logprobs

    def _take_control(self, message: dict[str, object]) -> None:
        match message:
            case {"op": "hello"}:
                self._limits = EngineHello(
                    *(
                        cast(int, message[name])
                        for name in ("vocab_size", "max_context", "max_slots", "max_waiting")
                    )
                )
                self._take_state(message)
                self._greeted.set()
            case {"op": "status"}:
                self._take_state(message)
            case {"op": "load_ended", "number": int(number)}:
                ended = self._loads.pop(number, None)
                if ended is not None and not ended.done():
                    outcome = cast(LoadOutcome, message["outcome"])
                    ended.set_result(LoadEnded(outcome, cast("str | None", message["reason"])))
            case {"op": "refused", "stream": int(number)}:
                if number in self._streams:
                    stream = self._streams.pop(number)
                    text = str(message["message"])
                    stream.fail(EngineFull(text) if message["full"] else EngineRefused(text))
            case _:
                assert self._transport is not None
                self._transport.abort()

    def _take_state(self, message: Mapping[str, object]) -> None:
        names = EngineState.__dataclass_fields__
        self.state = EngineState(**{name: message[name] for name in names if name in message})  # type: ignore[arg-type]
        self._identities[self.state.version] = self.state.identity
        # Streams only run on recent versions.
        while len(self._identities) > _VERSIONS_KEPT:
            del self._identities[next(iter(self._identities))]


def _top_rows(frame: Step | PromptLogprobs) -> list[TopLogprobs]:
    return [
        [(i, value) for i, value in zip(ids, values, strict=True) if i != NO_TOKEN]
        for ids, values in zip(frame.top_ids.tolist(), frame.top_logprobs.tolist(), strict=True)
    ]
