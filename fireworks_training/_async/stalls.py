"""Streams whose server has fallen silent: one timer for all of them.

A timer for each would be set anew at every piece that comes. This one looks at all streams now and
then, and compares how much each has received. It fails the silent ones; what that means is their
reader's business.
"""

from __future__ import annotations

import asyncio

import aiohttp

LOOKS = 16
"""Looks in the time that a stream may be silent: it is failed at most an eighth of that late."""


class StallWatch:
    """The streams of one loop that may be silent for the same time.

    Args:
        limit: seconds.
        loop: the loop.
    """

    def __init__(self, limit: float, loop: asyncio.AbstractEventLoop) -> None:
        self._limit = limit
        self._loop = loop
        # What each had received, and when that was first seen.
        self._seen: dict[aiohttp.StreamReader, tuple[int, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, content: aiohttp.StreamReader) -> None:
        """Watch a stream."""
        self._seen[content] = (content.total_bytes, self._loop.time())
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit / LOOKS, self._look)

    def discard(self, content: aiohttp.StreamReader) -> None:
        """Watch it no longer."""
        self._seen.pop(content, None)
        if not self._seen and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        # Bytes that came while something blocked the loop were taken in before its timers run.
        now = self._loop.time()
        silent: list[aiohttp.StreamReader] = []
        for content, (received, since) in self._seen.items():
            if content.total_bytes != received:
                self._seen[content] = (content.total_bytes, now)
            elif now - since >= self._limit:
                silent.append(content)
        for content in silent:
            del self._seen[content]
            content.set_exception(aiohttp.SocketTimeoutError(f"no byte within {self._limit:g} s"))
        self._timer = None
        if self._seen:
            self._timer = self._loop.call_later(self._limit / LOOKS, self._look)


class Stalls:
    """The streams of a connection pool, by how long each may be silent."""

    def __init__(self) -> None:
        self._watches: dict[float, StallWatch] = {}

    def add(self, response: aiohttp.ClientResponse, limit: float) -> None:
        """Watch the body of an answer, instead of the connection's own timer."""
        connection = response.connection
        if connection is None or connection.protocol is None:
            return  # all of it is there
        connection.protocol.read_timeout = None
        connection.protocol.start_timeout()  # without a time, it ends the timer
        watch = self._watches.get(limit)
        if watch is None:
            watch = self._watches[limit] = StallWatch(limit, asyncio.get_running_loop())
        watch.add(response.content)

    def discard(self, response: aiohttp.ClientResponse, limit: float) -> None:
        """Watch it no longer."""
        watch = self._watches.get(limit)
        if watch is not None:
            watch.discard(response.content)
            if not watch:
                del self._watches[limit]
