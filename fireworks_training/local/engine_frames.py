"""Frames between the gateway and an engine worker: their bytes on the socket.

A frame is `u32 payload length | u8 type | payload`, little-endian throughout. The types:

- `J` control, both ways: a JSON object with an `op`.
- `B` begun: the requests whose prefill just ended, with what they waited for.
- `S` step: one token for each listed stream, all streams of one decode step in one frame.
- `P` prompt: logprobs of the prompt tokens of one stream (echo).

Tokens never travel as JSON: a step of 256 streams is a few kilobytes of arrays that cost the
engine's interpreter one call. This module knows no socket, no torch, and no meaning of an `op`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import orjson

MAX_PAYLOAD = 64 * 1024 * 1024
"""Bytes that one payload may have. The largest real one is a long prompt (JSON) or its logprobs."""

_HEADER = struct.Struct("<IB")
_STEP = struct.Struct("<IIIII")
_BEGUN = struct.Struct("<II")
_PROMPT = struct.Struct("<IIII")

U32: TypeAlias = npt.NDArray[np.uint32]
I32: TypeAlias = npt.NDArray[np.int32]
F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]

NO_TOKEN = -1
"""Token id of a step row that only ends its stream, and of unused top-logprob cells."""


class FrameError(ValueError):
    """Raised for bytes that are no frames of this protocol: the connection can't be used any
    further."""


class Finish(IntEnum):
    """Names the state of a stream after a step."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    NOT_FINITE = 3
    """The logits held NaN or infinity: the stream ends without a token."""


@dataclass(frozen=True, slots=True)
class Control:
    """Holds a JSON control message."""

    message: dict[str, object]


@dataclass(frozen=True, slots=True)
class Step:
    """Holds one decode step. Arrays have n entries, one a stream; the top arrays are `[n, k]`.

    Attributes:
        version: counter of the weights that sampled these tokens.
        active: streams that hold a slot after this step.
        waiting: requests admitted to the queue but not begun.
        streams: stream ids.
        tokens: sampled ids; NO_TOKEN in a row that only ends its stream.
        logprobs: logprobs of the raw model.
        sampling_logprobs: logprobs in the distribution sampled from.
        finished: `Finish` values.
        top_ids: most likely tokens, best first, padded with NO_TOKEN.
        top_logprobs: their raw logprobs.
    """

    version: int
    active: int
    waiting: int
    streams: U32
    tokens: I32
    logprobs: F32
    sampling_logprobs: F32
    finished: U8
    top_ids: I32
    top_logprobs: F32


@dataclass(frozen=True, slots=True)
class Begun:
    """Lists requests that got their slot. Arrays have one entry a request; durations in seconds.

    Attributes:
        version: counter of the weights that read the prompts.
        streams: stream ids.
        queued: from arrival to the start of the prefill.
        prefill: length of the prefill that they were part of.
        cached: prompt tokens that were not computed for this request alone.
        active: slots in use when it began, itself included.
    """

    version: int
    streams: U32
    queued: F32
    prefill: F32
    cached: U32
    active: U32


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Holds raw logprobs of the last n prompt tokens of one stream.

    Attributes:
        logprobs: `[n]`.
        top_ids, top_logprobs: `[n, k]`, the most likely tokens in their places.
        probed_ids, probed_logprobs: `[n, m]`, those that the request named or had drawn.
    """

    stream: int
    logprobs: F32
    top_ids: I32
    top_logprobs: F32
    probed_ids: I32
    probed_logprobs: F32


Frame: TypeAlias = Control | Step | Begun | PromptLogprobs


def encode_control(message: Mapping[str, object]) -> bytes:
    """Encode a `J` frame."""
    return _frame(b"J", orjson.dumps(message))


def encode_step(step: Step) -> bytes:
    """Encode an `S` frame."""
    rows, k = step.top_ids.shape
    head = _STEP.pack(rows, k, step.version, step.active, step.waiting)
    arrays = (
        step.streams.astype("<u4"),
        step.tokens.astype("<i4"),
        step.logprobs.astype("<f4"),
        step.sampling_logprobs.astype("<f4"),
        step.top_ids.astype("<i4"),
        step.top_logprobs.astype("<f4"),
        step.finished.astype("u1"),
    )
    return _frame(b"S", head, *(array.tobytes() for array in arrays))


def encode_begun(begun: Begun) -> bytes:
    """Encode a `B` frame."""
    arrays = (
        begun.streams.astype("<u4"),
        begun.queued.astype("<f4"),
        begun.prefill.astype("<f4"),
        begun.cached.astype("<u4"),
        begun.active.astype("<u4"),
    )
    head = _BEGUN.pack(len(begun.streams), begun.version)
    return _frame(b"B", head, *(array.tobytes() for array in arrays))


def encode_prompt_logprobs(rows: PromptLogprobs) -> bytes:
    """Encode a `P` frame."""
    count, k = rows.top_ids.shape
    arrays = (
        rows.logprobs.astype("<f4"),
        rows.top_ids.astype("<i4"),
        rows.top_logprobs.astype("<f4"),
        rows.probed_ids.astype("<i4"),
        rows.probed_logprobs.astype("<f4"),
    )
    head = _PROMPT.pack(rows.stream, count, k, rows.probed_ids.shape[1])
    return _frame(b"P", head, *(array.tobytes() for array in arrays))


class FrameDecoder:
    """Cuts a byte stream into frames, however it was split on its way.

    After a FrameError the decoder must not be used again: where the next frame starts is unknown.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._buffer = bytearray()
        self._max_payload = max_payload

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Return the frames that `data` completes, in order.

        Raises:
            FrameError: an unknown type, a payload over the limit, or contents that don't fit.
        """
        self._buffer += data
        frames: list[Frame] = []
        position = 0
        while len(self._buffer) - position >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer, position)
            # Checked before the payload is there, so that a wrong length is never waited for.
            if length > self._max_payload:
                raise FrameError(
                    f"a frame of {length} bytes is over the {self._max_payload} allowed"
                )
            if kind not in _DECODERS:
                raise FrameError(f"unknown frame type {kind}")
            end = position + _HEADER.size + length
            if end > len(self._buffer):
                break
            frames.append(_DECODERS[kind](bytes(self._buffer[position + _HEADER.size : end])))
            position = end
        del self._buffer[:position]
        return frames


class _PayloadReader:
    """Takes arrays off a payload, front to back."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._position = 0

    def head(self, layout: struct.Struct) -> tuple[int, ...]:
        if len(self._payload) < layout.size:
            raise FrameError("a frame is shorter than its head")
        self._position = layout.size
        return layout.unpack_from(self._payload)

    def array(self, dtype: str, *shape: int) -> npt.NDArray[np.generic]:
        count = 1
        for side in shape:
            count *= side
        end = self._position + count * np.dtype(dtype).itemsize
        if end > len(self._payload):
            raise FrameError("a frame is shorter than its head says")
        found = np.frombuffer(self._payload, dtype, count, self._position).reshape(shape)
        self._position = end
        return found

    def end(self) -> None:
        if self._position != len(self._payload):
            raise FrameError("a frame is longer than its head says")


def _frame(kind: bytes, *parts: bytes) -> bytes:
    payload = b"".join(parts)
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f"a frame of {len(payload)} bytes is over the {MAX_PAYLOAD} allowed")
    return _HEADER.pack(len(payload), kind[0]) + payload


def _decode_control(payload: bytes) -> Control:
    try:
        found: object = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise FrameError(f"a control frame is not JSON: {error}") from None
    message = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    if not isinstance(message.get("op"), str):
        raise FrameError("a control frame is not an object with an op")
    return Control(message)


def _decode_step(payload: bytes) -> Step:
    reader = _PayloadReader(payload)
    rows, k, version, active, waiting = reader.head(_STEP)
    streams = reader.array("<u4", rows).astype(np.uint32, copy=False)
    tokens = reader.array("<i4", rows).astype(np.int32, copy=False)
    logprobs = reader.array("<f4", rows).astype(np.float32, copy=False)
    sampling = reader.array("<f4", rows).astype(np.float32, copy=False)
    top_ids = reader.array("<i4", rows, k).astype(np.int32, copy=False)
    top_logprobs = reader.array("<f4", rows, k).astype(np.float32, copy=False)
    finished = reader.array("u1", rows).astype(np.uint8, copy=False)
    reader.end()
    if rows and int(finished.max()) > max(Finish):
        raise FrameError("a step frame has an unknown finish value")
    return Step(
        version,
        active,
        waiting,
        streams,
        tokens,
        logprobs,
        sampling,
        finished,
        top_ids,
        top_logprobs,
    )


def _decode_begun(payload: bytes) -> Begun:
    reader = _PayloadReader(payload)
    rows, version = reader.head(_BEGUN)
    streams = reader.array("<u4", rows).astype(np.uint32, copy=False)
    queued = reader.array("<f4", rows).astype(np.float32, copy=False)
    prefill = reader.array("<f4", rows).astype(np.float32, copy=False)
    cached = reader.array("<u4", rows).astype(np.uint32, copy=False)
    active = reader.array("<u4", rows).astype(np.uint32, copy=False)
    reader.end()
    return Begun(version, streams, queued, prefill, cached, active)


def _decode_prompt_logprobs(payload: bytes) -> PromptLogprobs:
    reader = _PayloadReader(payload)
    stream, count, k, m = reader.head(_PROMPT)
    logprobs = reader.array("<f4", count).astype(np.float32, copy=False)
    top_ids = reader.array("<i4", count, k).astype(np.int32, copy=False)
    top_logprobs = reader.array("<f4", count, k).astype(np.float32, copy=False)
    probed_ids = reader.array("<i4", count, m).astype(np.int32, copy=False)
    probed_logprobs = reader.array("<f4", count, m).astype(np.float32, copy=False)
    reader.end()
    return PromptLogprobs(stream, logprobs, top_ids, top_logprobs, probed_ids, probed_logprobs)


_DECODERS: dict[int, Callable[[bytes], Frame]] = {
    ord("J"): _decode_control,
    ord("S"): _decode_step,
    ord("B"): _decode_begun,
    ord("P"): _decode_prompt_logprobs,
}
