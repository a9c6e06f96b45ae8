"""Fails requests whose server has sent nothing for too long: one timer for all of them.

A timer for each would be made and set anew at every chunk that comes, and a thousand cancelled ones
would wait in the loop's heap. This one looks at all requests now and then, and compares how much
each has received. It fails the silent ones, and does not know what they were for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

import aiohttp

LOOKS = 16
"""Looks within the time that a request may be silent: it fails at most an eighth of that late."""


class Watched(Protocol):
    """Declares what is needed of a request that waits for its server."""

    @property
    def received(self) -> int:
        """Bytes that have come so far."""
        ...

    def fail(self, error: TimeoutError) -> None:
        """Fail: the server has been silent for too long. Called once, on the loop."""
        ...


class SilenceTimer:
    """Watches the requests of one loop that may be silent for the same time.

    The timer outlives the last request by a look: requests that follow one another share it.

    Args:
        limit: seconds that a request may be silent.
        loop: the loop.
        idle: called when there is nothing to watch any more.
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
        """Watch a request from now on."""
        self._seen[watched] = (watched.received, self._loop.time())

    def discard(self, watched: Watched) -> None:
        """Watch a request no longer."""
        self._seen.pop(watched, None)

    def stop(self) -> None:
        """Stop the timer."""
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


class ReadTimeouts:
    """Watches the requests of a connection pool, by how long each may be silent."""

    def __init__(self) -> None:
        self._timers: dict[float, SilenceTimer] = {}

    def add(self, watched: Watched, limit: float) -> None:
        """Watch a request from now on; call on the pool's loop."""
        timer = self._timers.get(limit)
        if timer is None:
            loop = asyncio.get_running_loop()
            timer = SilenceTimer(limit, loop, partial(self._timers.pop, limit))
            self._timers[limit] = timer
        timer.add(watched)

    def discard(self, watched: Watched, limit: float) -> None:
        """Watch a request no longer."""
        timer = self._timers.get(limit)
        if timer is not None:
            timer.discard(watched)

    def close(self) -> None:
        """Stop all timers."""
        for timer in self._timers.values():
            timer.stop()
        self._timers.clear()
