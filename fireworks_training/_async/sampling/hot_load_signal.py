"""News of hot loads: who loads a snapshot says so, and requests that wait for it go on at once.

A deployment that loads a snapshot may answer 404 or 425 for as long as that takes. A sampler that
shares this with the one who coordinates the load waits until the load's end instead of asking again
and again. It knows neither snapshots nor requests, and all of it happens on the owner loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator


class HotLoadSignal:
    """Whether a hot load is under way, and the end of it.

    Attributes:
        loading: loads under way.
    """

    def __init__(self) -> None:
        self.loading = 0
        self._waiters: set[asyncio.Future[None]] = set()

    @contextlib.contextmanager
    def load(self) -> Generator[None]:
        """A load is under way while this is entered; leaving wakes all who wait for it."""
        self.loading += 1
        try:
            yield
        finally:
            self.loading -= 1
            self.wake()

    def wake(self) -> None:
        """The deployment changed: whoever waits may ask it again."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, seconds: float) -> bool:
        """Sleep, at most until the news; whether there was news."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(seconds):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True
