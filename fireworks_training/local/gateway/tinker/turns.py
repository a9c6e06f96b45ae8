"""Turns of snapshots on one engine: requests for different snapshots wait for each other.

An engine holds one set of weights. Requests for the snapshot that it holds run together; those for
another wait until these have ended, so that no sample ever sees weights it did not ask for. While
others wait, no new request joins the current turn: every snapshot's turn comes. Knows the order
alone. Does not know how a snapshot is loaded: the loader is handed in.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

Load = Callable[[str], Awaitable[None]]


class SnapshotTurns:
    """Orders the requests for the snapshots of one engine.

    Args:
        load: makes the engine hold a snapshot; all requests that wait for it get what it raises.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._held: str | None = None
        self._running = 0
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._changing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(self, identity: str) -> AsyncGenerator[None]:
        """Hold the engine on a snapshot for as long as the block runs."""
        await self._begin(identity)
        try:
            yield
        finally:
            self._running -= 1
            self._go_on()

    def forget(self) -> None:
        """Forget what the engine holds, since it was replaced."""
        self._held = None

    async def close(self) -> None:
        """Give up a change that is under way."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.gather(self._changing, return_exceptions=True)

    async def _begin(self, identity: str) -> None:
        if identity == self._held and not self._waiting and self._changing is None:
            self._running += 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((identity, place))
        self._go_on()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._running -= 1  # let in and cancelled at once: the turn goes on
                self._go_on()
            raise

    def _go_on(self) -> None:
        """Begin the next turn when the current one has ended."""
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        if self._running or self._changing is not None or not self._waiting:
            return
        identity = self._waiting[0][0]
        if identity == self._held:
            self._let_in(identity, None)
            return
        self._changing = asyncio.create_task(self._change(identity), name="snapshot turn")

    async def _change(self, identity: str) -> None:
        failure: Exception | None = None
        self._held = None
        try:
            await self._load(identity)
            self._held = identity
        except Exception as error:
            failure = error
        finally:
            self._changing = None
        self._let_in(identity, failure)
        self._go_on()

    def _let_in(self, identity: str, failure: Exception | None) -> None:
        """Let all in that wait for this snapshot, not only the first."""
        others: deque[tuple[str, asyncio.Future[None]]] = deque()
        for wanted, place in self._waiting:
            if place.done():
                continue
            if wanted != identity:
                others.append((wanted, place))
            elif failure is not None:
                place.set_exception(failure)
            else:
                self._running += 1
                place.set_result(None)
        self._waiting = others
