"""Server-sent events, decoded as the bytes arrive.

It knows the line format (https://html.spec.whatwg.org/multipage/server-sent-events.html) and
nothing of what the data means. However the bytes are split, the events are the same. `id:` and
`retry:` are ignored: a completion is never resumed. An event that the stream leaves unfinished is
not an event.

Almost every event of a completion is one `data:` line, so that case takes a short path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fireworks_training.errors import ProtocolError

MAX_EVENT_BYTES = 16 * 2**20
"""Default limit of one event. The last chunk of a completion of 100,000 tokens is about 1 MB."""

_BOM = b"\xef\xbb\xbf"


class ServerSentEvent(NamedTuple):
    """One event.

    Attributes:
        data: the payload; several `data:` lines are joined by newlines.
        event: its type, "message" unless the stream says another.
    """

    data: bytes
    event: str = "message"


_new: Any = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_event: Callable[[type[ServerSentEvent], tuple[bytes, str]], ServerSentEvent] = _new
"""Makes an event without the Python call of a named tuple's constructor."""


class SseDecoder:
    """Turns pieces of a stream into events.

    Args:
        max_event_bytes: an event (its lines, comments among them) over this size is refused, so
            that a server can't fill the memory.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._limit = max_event_bytes
        self._pieces: list[bytes] = []  # the unfinished event, line ends made "\n"
        self._size = 0
        self._drop_newline = False  # the last byte was CR: an LF right after it belongs to it
        self._at_start = True

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """The events that these bytes complete.

        Raises:
            ProtocolError: an event is over the limit. The decoder is of no use afterwards.
        """
        data = self._with_plain_newlines(data)
        if not data:
            return []
        ends_blank = data[:1] == b"\n" and bool(self._pieces) and self._pieces[-1][-1:] == b"\n"
        if not ends_blank and b"\n\n" not in data:
            self._keep(data)
            return []
        self._pieces.append(data)
        *blocks, rest = b"".join(self._pieces).split(b"\n\n")
        self._pieces.clear()
        self._size = 0
        events: list[ServerSentEvent] = []
        for block in blocks:
            if len(block) > self._limit:
                raise self._too_large()
            if self._at_start:
                self._at_start = False
                block = block.removeprefix(_BOM)
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(_event(ServerSentEvent, (block[6:], "message")))
            else:
                _parse_block(block, events)
        if rest:
            self._keep(rest)
        return events

    def _with_plain_newlines(self, data: bytes) -> bytes:
        """CR LF and CR become LF, also when a CR LF is split between two pieces."""
        if self._drop_newline and data:
            data = data.removeprefix(b"\n")
            self._drop_newline = False
        if b"\r" in data:
            self._drop_newline = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _keep(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._size += len(piece)
        # One byte more may be the newline that ends the last line.
        if self._size > self._limit + 1:
            raise self._too_large()

    def _too_large(self) -> ProtocolError:
        self._pieces.clear()
        return ProtocolError(
            f"the server sent an event of more than {self._limit:,} bytes; it was refused so that "
            "it can't fill the memory"
        )


def _parse_block(block: bytes, events: list[ServerSentEvent]) -> None:
    """Add the events of a block of lines: one at most, since no line but the first is empty."""
    data: list[bytes] = []
    event = b""
    for line in block.split(b"\n"):
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            data.append(value)
        elif name == b"event":
            event = value
    if data:
        joined = b"\n".join(data)
        events.append(ServerSentEvent(joined, event.decode("utf-8", "replace") or "message"))
