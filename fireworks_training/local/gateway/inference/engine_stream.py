"""One request in an engine, on the gateway's side: a stream of tokens in batches, then an end.

Knows how tokens are collected and when their reader is woken: at the first token, then every few
tokens or when the owner flushes, not all streams at once, and at the end. With hundreds of streams,
waking for each token would cost more than sampling it. What is collected is bounded by the
request's `max_tokens`. Knows no socket and no HTTP; `EngineClient` feeds it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from fireworks_training.local.engine_frames import F32, I32, NO_TOKEN, Finish

TopLogprobs = list[tuple[int, float]]

# `list[int]` as a factory takes six times as long as `list`, and every few tokens need a Delta.
_no_ids = cast("Callable[[], list[int]]", list)
_no_values = cast("Callable[[], list[float]]", list)
_no_rows = cast("Callable[[], list[TopLogprobs]]", list)


class EngineGone(ConnectionError):
    """Raised when the engine's connection ended: its streams are lost, a new request may
    succeed."""


class EngineFull(Exception):
    """Raised when the engine's admission queue is full."""


class EngineRefused(Exception):
    """Raised when the engine refused a request; says why."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Describes what to sample; fields as in `engine.requests.SamplingRequest`, `stop_ids` without
    EOS."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_ids: list[int] = field(default_factory=list[int])
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int = 0
    echo: int = 0
    targets: list[list[int]] = field(default_factory=list[list[int]])
    draws: int = 0


@dataclass(slots=True)
class Delta:
    """Collects the tokens of one stream since its reader last looked; parallel lists.

    Attributes:
        tokens: ids.
        logprobs: raw logprobs.
        sampling_logprobs: logprobs in the distribution sampled from.
        top: most likely tokens with raw logprobs, best first; [] where none were asked for.
        finish: how the stream ended, with this delta; RUNNING before.
    """

    tokens: list[int] = field(default_factory=_no_ids)
    logprobs: list[float] = field(default_factory=_no_values)
    sampling_logprobs: list[float] = field(default_factory=_no_values)
    top: list[TopLogprobs] = field(default_factory=_no_rows)
    finish: Finish = Finish.RUNNING


class StreamOwner(Protocol):
    """Frees a stream and names snapshots; the client that made the stream."""

    def cancel(self, number: int) -> None:
        """Free the slot of a stream; nothing happens when it has ended."""
        ...

    def identity_of(self, version: int) -> str | None:
        """Return the snapshot behind a weights version; None = the model's own weights."""
        ...


class EngineStream:
    """Collects the tokens of one request in an engine for its reader.

    Attributes:
        began_at: time of its first token, on the monotonic clock; then the figures below are
            set. None before.
        queued: seconds it waited in the engine.
        prefill: seconds of the prefill.
        cached_tokens: prompt tokens that were not computed for it alone.
        concurrent: requests in the engine when it began, itself included.
        prompt_logprobs: raw, of the last prompt tokens, when `echo` was asked for.
        prompt_top: the same for the most likely tokens.
        probed_ids, probed_logprobs: the same for `targets` and `draws`, a column each.
        identity_first, identity: snapshot of the first and of the last token; None = the model's
            own weights.
        switch_index: completion token from which on `identity` sampled, when it changed.
    """

    def __init__(self, engine: StreamOwner, number: int, flush_tokens: int) -> None:
        self.began_at: float | None = None
        self.queued = 0.0
        self.prefill = 0.0
        self.cached_tokens = 0
        self.concurrent = 0
        self.prompt_logprobs: list[float] = []
        self.prompt_top: list[TopLogprobs] = []
        self.probed_ids: I32 = np.empty((0, 0), np.int32)
        self.probed_logprobs: F32 = np.empty((0, 0), np.float32)
        self.identity_first: str | None = None
        self.identity: str | None = None
        self.switch_index: int | None = None
        self._engine = engine
        self._number = number
        self._flush_tokens = flush_tokens
        self._wake_at = 1
        self._pending = Delta()
        self._taken = 0
        self._version: int | None = None
        self._error: Exception | None = None
        self._ready = False
        self._reader: asyncio.Future[None] | None = None

    async def next(self) -> Delta:
        """Return the next tokens, at least one of them or the end; not to be called after the end.

        Raises:
            EngineGone: the engine died or was closed; tokens not yet read are lost with it.
            EngineRefused: the engine did not take the request.
        """
        if not self._ready:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._error is not None:
            raise self._error
        delta = self._pending
        self._pending = Delta()
        self._taken += len(delta.tokens)
        # Streams that began together are woken at different steps: each wakes at token counts that
        # its number gives, so that a step's wakings hold up the loop for a fraction of all streams.
        self._wake_at = self._taken + self._flush_tokens
        self._wake_at -= (self._taken + self._number) % self._flush_tokens
        self._ready = False
        return delta

    def cancel(self) -> None:
        """Free the stream's slot; nothing happens when it has ended."""
        self._engine.cancel(self._number)

    def push(self, version: int, token: int, logprob: float, sampling: float, finish: int) -> Delta:
        pending = self._pending
        if token != NO_TOKEN:
            if version != self._version:
                self._note_version(version)
            pending.tokens.append(token)
            pending.logprobs.append(logprob)
            pending.sampling_logprobs.append(sampling)
        if finish:
            pending.finish = Finish(finish)
        if finish or self._taken + len(pending.tokens) >= self._wake_at:
            self._wake()
        return pending

    def _note_version(self, version: int) -> None:
        identity = self._engine.identity_of(version)
        if self._version is None:
            self.identity_first = identity
        else:
            self.switch_index = self._taken + len(self._pending.tokens)
        self.identity = identity
        self._version = version

    def begin(self, version: int, queued: float, prefill: float, cached: int, active: int) -> None:
        self.began_at = time.monotonic()
        self.queued, self.prefill = queued, prefill
        self.cached_tokens, self.concurrent = cached, active
        self.identity_first = self.identity = self._engine.identity_of(version)
        self._version = version

    def fail(self, error: Exception) -> None:
        self._error = error
        self._wake()

    def flush(self) -> None:
        if self._pending.tokens:
            self._wake()

    def _wake(self) -> None:
        self._ready = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
