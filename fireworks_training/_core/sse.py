"""`SseDecoder`: decodes server-sent events as the bytes arrive.

It knows the line format (https://html.spec.whatwg.org/multipage/server-sent-events.html) and
nothing of what the data means. However the bytes are split, the events are the same. `id:` and
`retry:` are ignored: a completion is never resumed. An event that the stream leaves unfinished is
not an event.

Almost every chunk of a completion holds whole events of one `data:` line each: `plain` is a short
path for these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fireworks_training.errors import ProtocolError

MAX_EVENT_BYTES = 16 * 2**20
"""Default limit of one event; who knows what was asked for sets a limit that fits."""

_BOM = b"\xef\xbb\xbf"


class ServerSentEvent(NamedTuple):
    """Holds one event.

    Attributes:
        data: the payload; several `data:` lines are joined by newlines.
        event: its type, "message" unless the stream names another.
    """

    data: bytes
    event: str = "message"


_new: Any = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_event: Callable[[type[ServerSentEvent], tuple[bytes, str]], ServerSentEvent] = _new
"""Makes an event without the Python call of a named tuple's constructor."""


class SseDecoder:
    """Turns the bytes of a stream into events, however they are split.

    Args:
        max_event_bytes: an event (its lines, comments among them) over this size is refused, so
            that a server can't fill the memory.
    """

    __slots__ = ("_at_start", "_data", "_drop_newline", "_event", "_limit", "_line", "_size")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._limit = max_event_bytes
        self._line: list[bytes] | None = None  # pieces of the unfinished line
        self._data: list[bytes] | None = None  # of the unfinished event
        self._event = b""
        self._size = 0  # of the unfinished event and line
        self._drop_newline = False  # the last byte was CR: an LF right after it belongs to it
        self._at_start = True

    @property
    def held(self) -> int:
        """Bytes of an unfinished event's data; 0 while only comments or nothing came."""
        lines = 0 if self._data is None else len(self._data)
        if self._line and not self._line[0].startswith(b":"):
            return lines + self._size
        return lines

    def plain(self, data: bytes) -> list[bytes] | None:
        """Return the data of the events, if these bytes are whole one-line messages and no more.

        None if they are not, or come amid an event: then `feed` has to take them.
        """
        if not (self._size == 0 and data.startswith(b"data: ") and data.endswith(b"\n\n")):
            return None
        if self._drop_newline or len(data) > self._limit or b"\r" in data:
            return None
        events = data[6:-2].split(b"\n\ndata: ")
        if True in [b"\n" in event for event in events]:
            return None
        self._at_start = False
        return events

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Take bytes, and return the events that they complete.

        Raises:
            ProtocolError: an event is over the limit. The decoder is of no use afterwards.
        """
        data = self._with_plain_newlines(data)
        if b"\n" not in data:
            if data:
                self._hold(data)
            return []
        if self._line:
            self._size -= sum(map(len, self._line))
            data = b"".join((*self._line, data))
            self._line = None
        # By single newlines: a search for one byte is four times as fast as one for two.
        *lines, rest = data.split(b"\n")
        events: list[ServerSentEvent] = []
        held, size, limit = self._data or [], self._size, self._limit
        if self._at_start:
            # Only the very first line may begin with a mark, and an empty one is a line too.
            self._at_start = False
            size += len(lines[0]) - len(lines[0].removeprefix(_BOM))
            lines[0] = lines[0].removeprefix(_BOM)
        for line in lines:
            if line:
                size += len(line)
                if line.startswith(b"data: "):
                    held.append(line[6:])
                else:
                    self._field(line, held)
                continue
            if size > limit:
                raise self._too_large()
            if len(held) == 1 and not self._event:
                events.append(_event(ServerSentEvent, (held.pop(), "message")))
            elif held:
                kind = self._event.decode("utf-8", "replace") or "message"
                events.append(ServerSentEvent(b"\n".join(held), kind))
                held.clear()
            self._event = b""
            size = 0
        self._size = size
        self._data = held or None
        if rest:
            self._hold(rest)
        elif size > limit:
            raise self._too_large()
        return events

    def _field(self, line: bytes, held: list[bytes]) -> None:
        """Take a line that does not begin with `data: `."""
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            held.append(value)
        elif name == b"event":
            self._event = value

    def _with_plain_newlines(self, data: bytes) -> bytes:
        """Turn CR LF and CR into LF, also when a CR LF is split between two chunks."""
        if self._drop_newline and data:
            data = data.removeprefix(b"\n")
            self._drop_newline = False
        if b"\r" in data:
            self._drop_newline = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _hold(self, piece: bytes) -> None:
        """Keep a part of a line that is not finished."""
        if self._line is None:
            self._line = []
        self._line.append(piece)
        self._size += len(piece)
        if self._size > self._limit:
            raise self._too_large()

    def _too_large(self) -> ProtocolError:
        self._line = self._data = None
        return ProtocolError(
            f"the server sent an event of more than {self._limit:,} bytes; it was refused so that "
            "it can't fill the memory"
        )
