"""The SSE decoder against a plain reading of the standard, and against every split of the bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fireworks_training._core.sse import ServerSentEvent, SseDecoder
from fireworks_training.errors import ProtocolError


def decode(*pieces: bytes, limit: int = 1000) -> list[tuple[bytes, str]]:
    """The events of a stream, read as a client does: by the short path where it goes."""
    decoder = SseDecoder(limit)
    events: list[tuple[bytes, str]] = []
    for piece in pieces:
        plain = decoder.plain(piece)
        events += decoder.feed(piece) if plain is None else [(data, "message") for data in plain]
    return events


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [(b"a", "message")]),
        (b"data:a\n\n", [(b"a", "message")]),
        (b"data:  a\n\n", [(b" a", "message")]),
        (b"data: a\r\n\r\n", [(b"a", "message")]),
        (b"data: a\r\r", [(b"a", "message")]),
        (b"data: a\n\r\n", [(b"a", "message")]),
        (b"data: a\ndata: b\n\n", [(b"a\nb", "message")]),
        (b"data: a\n\n\n\ndata: b\n\n", [(b"a", "message"), (b"b", "message")]),
        (b"event: error\ndata: a\n\ndata: b\n\n", [(b"a", "error"), (b"b", "message")]),
        (b"event: ping\n\ndata: b\n\n", [(b"b", "message")]),
        (b": comment\n\ndata: a\n: comment\n\n", [(b"a", "message")]),
        (b"id: 4\nretry: 10\ndata: a\nother: x\nplain\n\n", [(b"a", "message")]),
        (b"data\n\n", [(b"", "message")]),
        (b"data: a:b\n\n", [(b"a:b", "message")]),
        (b"\xef\xbb\xbfdata: a\n\n", [(b"a", "message")]),
        (b"\xef\xbb\xbf\n\ndata: a\n\n", [(b"a", "message")]),
        (b"data: a\n", []),
        (b"data: a", []),
        (b"", []),
    ],
)
def test_lines(stream: bytes, events: list[tuple[bytes, str]]) -> None:
    assert decode(stream) == events
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == events


def plain_reading(stream: bytes) -> list[tuple[bytes, str]]:
    """The standard's own algorithm, line by line over the whole stream."""
    text = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removeprefix(b"\xef\xbb\xbf")
    events: list[tuple[bytes, str]] = []
    data: list[bytes] = []
    kind = b""
    for line in text.split(b"\n")[:-1]:
        if not line:
            if data:
                events.append((b"\n".join(data), kind.decode("utf-8", "replace") or "message"))
            data, kind = [], b""
            continue
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
    return events


fragments = st.sampled_from(
    b"data:|data: |event: |event|:| |\n|\r|\r\n|\n\n|x|{}|\xef\xbb\xbf|\xc3|\xa9|id: 1".split(b"|")
)


@example(b"\n\xef\xbb\xbfdata:\n\n", [])  # a mark, but not on the first line
@example(b"\xef\xbb\xbfdata: x\n\n", [2])
@given(st.lists(fragments, max_size=40).map(b"".join), st.lists(st.integers(0, 300), max_size=12))
def test_any_split_gives_the_events_of_the_standard(stream: bytes, cuts: list[int]) -> None:
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in itertools.pairwise(borders)]
    assert decode(*pieces) == plain_reading(stream)


@given(st.integers(0, 30), st.integers(1, 50))
def test_the_limit_is_the_same_for_any_split(length: int, step: int) -> None:
    stream = b"data: " + b"x" * length + b"\n\n"
    pieces = [stream[i : i + step] for i in range(0, len(stream), step)]
    if length <= 10:
        assert decode(*pieces, limit=16) == [(b"x" * length, "message")]
    else:
        with pytest.raises(ProtocolError, match="16 bytes"):
            decode(*pieces, limit=16)


def test_a_frame_without_an_end_is_refused_before_it_fills_the_memory() -> None:
    decoder = SseDecoder(100_000)
    with pytest.raises(ProtocolError):
        for _ in range(101):
            assert decoder.feed(b"x" * 1000) == []


@pytest.mark.parametrize(
    ("piece", "events"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: \n\n", [b""]),
        (b"data: a\n\ndata: b\n", None),
        (b"data: a\ndata: b\n\n", None),
        (b"data: a\n\n\n\n", None),
        (b"data: a\n\nevent: error\ndata: b\n\n", None),
        (b"data: a\r\n\n", None),
        (b"", None),
    ],
)
def test_the_short_path_takes_whole_messages_only(piece: bytes, events: list[bytes] | None) -> None:
    assert SseDecoder().plain(piece) == events
    amid = SseDecoder()
    amid.feed(b"event: error\n")
    assert amid.plain(piece) is None
    assert SseDecoder(max_event_bytes=5).plain(piece) is None


def test_an_event_reads_as_its_fields() -> None:
    (event,) = SseDecoder().feed(b"data: [DONE]\n\n")
    assert event == ServerSentEvent(b"[DONE]")
    assert event.data == b"[DONE]"
    assert event.event == "message"
