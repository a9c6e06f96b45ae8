"""Requests whose server has fallen silent: one timer for all of them.

A timer for each would be made and set anew at every piece that comes, and a thousand cancelled ones
would wait in the loop's heap. This one looks at all requests now and then, and compares how much
each has received. It fails the silent ones; what that means is their owner's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

import aiohttp

LOOKS = 16
"""Looks in the time that a request may be silent: it is failed at most an eighth of that late."""


class Watched(Protocol):
    """A request that is under way."""

    @property
    def received(self) -> int:
        """Grows with everything that comes."""
        ...

    def fail(self, error: TimeoutError) -> None:
        """The server has been silent for too long; called once, on the loop."""
        ...


class StallWatch:
    """The requests of one loop that may be silent for the same time.

    The timer outlives the last request by a look: requests that follow one another share it.

    Args:
        limit: seconds.
        loop: the loop.
        idle: told when there is nothing to watch any more.
    """

    def __init__(
        self, limit: float, loop: asyncio.AbstractEventLoop, idle: Callable[[], object]
    ) -> None:
        self._limit = limit
        self._loop = loop
        self._idle = idle
        # What each had received, and when that was first seen.
        self._seen: dict[Watched, tuple[int, float]] = {}
        self._timer = loop.call_later(limit / LOOKS, self._look)

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, watched: Watched) -> None:
        """Watch a request."""
        self._seen[watched] = (watched.received, self._loop.time())

    def discard(self, watched: Watched) -> None:
        """Watch it no longer."""
        self._seen.pop(watched, None)

    def stop(self) -> None:
        """Look no more."""
        self._timer.cancel()

    def _look(self) -> None:
        # Bytes that came while something blocked the loop were taken in before its timers run.
        now = self._loop.time()
        silent: list[Watched] = []
        for watched, (received, since) in self._seen.items():
            if watched.received != received:
                self._seen[watched] = (watched.received, now)
            elif now - since >= self._limit:
                silent.append(watched)
        for watched in silent:
            del self._seen[watched]
            watched.fail(aiohttp.SocketTimeoutError(f"no byte within {self._limit:g} s"))
        if self._seen:
            self._timer = self._loop.call_later(self._limit / LOOKS, self._look)
        else:
            self._idle()


class Stalls:
    """The requests of a connection pool, by how long each may be silent."""

    def __init__(self) -> None:
        self._watches: dict[float, StallWatch] = {}

    def add(self, watched: Watched, limit: float) -> None:
        """Watch a request; on the pool's loop."""
        watch = self._watches.get(limit)
        if watch is None:
            loop = asyncio.get_running_loop()
            watch = StallWatch(limit, loop, partial(self._watches.pop, limit))
            self._watches[limit] = watch
        watch.add(watched)

    def discard(self, watched: Watched, limit: float) -> None:
        """Watch it no longer."""
        watch = self._watches.get(limit)
        if watch is not None:
            watch.discard(watched)

    def close(self) -> None:
        """Watch nothing any more."""
        for watch in self._watches.values():
            watch.stop()
        self._watches.clear()
