"""`HotLoadSignal`: wakes the sampling requests that wait for a hot load to end.

A deployment that loads a snapshot may answer 404 or 425 for as long as that takes. A sampler that
shares the signal with the coordinator of the load waits until the load's end instead of asking
again and again. It knows neither snapshots nor requests, and is used on the owner loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator


class HotLoadSignal:
    """Counts the hot loads under way, and wakes the waiters when one ends.

    Attributes:
        loading: loads under way.
    """

    def __init__(self) -> None:
        self.loading = 0
        self._waiters: set[asyncio.Future[None]] = set()

    @contextlib.contextmanager
    def load(self) -> Generator[None]:
        """Mark a load as under way until the block is left, which wakes the waiters."""
        self.loading += 1
        try:
            yield
        finally:
            self.loading -= 1
            self.wake()

    def wake(self) -> None:
        """Let the waiters ask the deployment again: it has changed."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, seconds: float) -> bool:
        """Sleep until a load ends, or for so many seconds; returns whether one ended."""
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
