"""Frames survive any split of the byte stream; anything else is refused, never guessed at."""

from __future__ import annotations

import struct
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireworks_training.local.engine_frames import (
    MAX_PAYLOAD,
    Begun,
    Control,
    Frame,
    FrameDecoder,
    FrameError,
    PromptLogprobs,
    Step,
    encode_begun,
    encode_control,
    encode_prompt_logprobs,
    encode_step,
)

U32 = st.integers(0, 2**32 - 1)
F32 = st.floats(width=32, allow_nan=False)


def column(values: st.SearchStrategy, n: int, dtype: type) -> st.SearchStrategy[np.ndarray]:
    return st.lists(values, min_size=n, max_size=n).map(lambda x: np.array(x, dtype))


def table(values: st.SearchStrategy, n: int, k: int, dtype: type) -> st.SearchStrategy[np.ndarray]:
    return column(values, n * k, dtype).map(lambda x: x.reshape(n, k))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    n, k = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    token = st.integers(-1, 2**31 - 1)
    return Step(
        version=draw(U32),
        active=draw(U32),
        waiting=draw(U32),
        streams=draw(column(U32, n, np.uint32)),
        tokens=draw(column(token, n, np.int32)),
        logprobs=draw(column(F32, n, np.float32)),
        sampling_logprobs=draw(column(F32, n, np.float32)),
        finished=draw(column(st.integers(0, 3), n, np.uint8)),
        top_ids=draw(table(token, n, k, np.int32)),
        top_logprobs=draw(table(F32, n, k, np.float32)),
    )


@st.composite
def begun(draw: st.DrawFn) -> Begun:
    n = draw(st.integers(0, 4))
    return Begun(
        version=draw(U32),
        streams=draw(column(U32, n, np.uint32)),
        queued=draw(column(F32, n, np.float32)),
        prefill=draw(column(F32, n, np.float32)),
        cached=draw(column(U32, n, np.uint32)),
        active=draw(column(U32, n, np.uint32)),
    )


@st.composite
def prompt_logprobs(draw: st.DrawFn) -> PromptLogprobs:
    n, k, m = draw(st.integers(0, 5)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return PromptLogprobs(
        stream=draw(U32),
        logprobs=draw(column(F32, n, np.float32)),
        top_ids=draw(table(st.integers(-1, 99), n, k, np.int32)),
        top_logprobs=draw(table(F32, n, k, np.float32)),
        probed_ids=draw(table(st.integers(-1, 99), n, m, np.int32)),
        probed_logprobs=draw(table(F32, n, m, np.float32)),
    )


controls = st.dictionaries(st.text(), st.integers(0, 9) | st.text()).map(
    lambda extra: Control({**extra, "op": "load"})
)


def encode(frame: Frame) -> bytes:
    match frame:
        case Control():
            return encode_control(frame.message)
        case Step():
            return encode_step(frame)
        case Begun():
            return encode_begun(frame)
        case PromptLogprobs():
            return encode_prompt_logprobs(frame)


def assert_same(left: Frame, right: Frame) -> None:
    assert type(left) is type(right)
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@settings(deadline=None)
@given(
    st.lists(steps() | begun() | prompt_logprobs() | controls, max_size=4),
    st.lists(st.integers(1, 40), max_size=30),
)
def test_frames_survive_any_split(frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode(frame) for frame in frames)
    decoder = FrameDecoder()
    got: list[Frame] = []
    position = 0
    for cut in [*cuts, len(data)]:
        got += decoder.feed(data[position : position + cut])
        position += cut
    assert len(got) == len(frames)
    for left, right in zip(frames, got, strict=True):
        assert_same(left, right)


def test_one_byte_at_a_time() -> None:
    decoder = FrameDecoder()
    data = encode_control({"op": "stop"})
    got = [decoder.feed(data[i : i + 1]) for i in range(len(data))]
    assert got[:-1] == [[]] * (len(data) - 1)
    assert got[-1] == [Control({"op": "stop"})]


def test_oversize_is_refused_before_its_payload_arrives() -> None:
    with pytest.raises(FrameError, match="allowed"):
        FrameDecoder().feed(struct.pack("<IB", MAX_PAYLOAD + 1, ord("J")))
    decoder = FrameDecoder(max_payload=10)
    with pytest.raises(FrameError, match="over the 10 allowed"):
        decoder.feed(encode_control({"op": "a long operation name"}))


def test_oversize_is_refused_when_written() -> None:
    with pytest.raises(FrameError, match="allowed"):
        encode_control({"op": "x" * MAX_PAYLOAD})


@pytest.mark.parametrize(
    "payload",
    [
        b"not json",
        b"[]",
        b'{"op": 3}',
        b"{}",
    ],
)
def test_control_that_is_no_object_with_an_op(payload: bytes) -> None:
    with pytest.raises(FrameError, match="control"):
        FrameDecoder().feed(struct.pack("<IB", len(payload), ord("J")) + payload)


@pytest.mark.parametrize("kind", [b"S", b"B", b"P"])
def test_arrays_that_do_not_fit_their_head(kind: bytes) -> None:
    empty = {
        b"S": struct.pack("<IIIII", 1, 0, 0, 0, 0),
        b"B": struct.pack("<II", 1, 0),
        b"P": struct.pack("<III", 0, 1, 0),
    }[kind]
    for payload, message in [(empty, "shorter"), (empty + b"\0" * 99, "longer"), (b"", "shorter")]:
        with pytest.raises(FrameError, match=message):
            FrameDecoder().feed(struct.pack("<I", len(payload)) + kind + payload)


def test_unknown_finish_value() -> None:
    payload = struct.pack("<IIIII", 1, 0, 0, 0, 0) + b"\0" * 16 + b"\x09"
    with pytest.raises(FrameError, match="finish"):
        FrameDecoder().feed(struct.pack("<I", len(payload)) + b"S" + payload)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_gives_frames_or_a_frame_error(data: bytes) -> None:
    try:
        frames = FrameDecoder().feed(data)
    except FrameError:
        return
    assert all(isinstance(frame, Control | Step | Begun | PromptLogprobs) for frame in frames)
