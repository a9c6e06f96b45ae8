"""`SamplerTasks`: runs a sampler's calls as tasks, waits for them in a drain, cancels the rest.

It knows the owner loop and the transport, and nothing of what the tasks do.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

from fireworks_training._async.http.transport import Transport
from fireworks_training._outcome import Outcome
from fireworks_training._portal import at_exit
from fireworks_training.errors import ClientClosed, SamplingClientClosedError

T = TypeVar("T")
Args = TypeVarTuple("Args")

logger = logging.getLogger("fireworks_training.sampling")


class SamplerTasks:
    """Runs the calls of a sampler on its owner loop.

    Args:
        transport: the connection pool, and the loop it lives on.
        owns_transport: whether the pool is closed with the sampler.
        label: names the sampler in messages.

    Attributes:
        closed: whether new calls are refused.
    """

    def __init__(self, transport: Transport, *, owns_transport: bool, label: str) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._transport = transport
        self._owns_transport = owns_transport
        self._label = label
        self._running: set[asyncio.Task[Any]] = set()
        self._cancelling = False
        self._forget_exit: Callable[[], None] | None = None

    def check_open(self) -> None:
        """Refuse calls after the close.

        Raises:
            ClientClosed: the sampler was closed.
        """
        if self.closed:
            raise ClientClosed.of("sampler")

    def spawn(
        self, work: Callable[[*Args], Coroutine[Any, Any, T]], *args: *Args, label: str
    ) -> Outcome[T]:
        """Run work on the owner loop, from any thread.

        What this accepts, `close()` waits for or cancels: both take the lock, so that an accepted
        call is on its way to the loop before the end begins there.

        Raises:
            ClientClosed: the sampler was closed.
        """
        with self._lock:
            self.check_open()
            if self._owns_transport and self._forget_exit is None:
                self._forget_exit = at_exit(self._label, self._transport.close)
            return self._transport.owner.spawn(self._until_closed, work, *args, label=label)

    async def _until_closed(
        self, work: Callable[[*Args], Coroutine[Any, Any, T]], *args: *Args
    ) -> T:
        """Run work that `close()` may end."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            if self._cancelling:
                raise asyncio.CancelledError
            running = work(*args)
            del work, args  # for as long as it runs the collector would visit them
            return await running
        except asyncio.CancelledError:
            if not self._cancelling:
                raise
            raise SamplingClientClosedError(
                "the sampler was closed before the completions were there; they are safe to ask "
                "for again"
            ) from None
        finally:
            self._running.discard(task)

    async def aclose(self, drain: float = 0.0) -> None:
        """Refuse new calls, wait `drain` seconds for the running ones, cancel the rest."""
        if self._start_closing():
            await self._transport.owner.run(self._end, drain, label="closing a sampler")
            self._release()

    def close(self) -> None:
        """Do as `aclose()`, for plain functions; not for the loop that runs the sampler."""
        if self._start_closing():
            outcome = self._transport.owner.spawn(self._end, 0.0, label="closing a sampler")
            outcome.refuse_dead_lock()
            outcome.result()
            self._release()

    def close_later(self, drain: float) -> None:
        """Refuse new calls and return; the rest of `aclose(drain)` happens in the background."""
        if self._start_closing():
            outcome = self._transport.owner.spawn(self._end, drain, label="draining a sampler")
            outcome.add_done_callback(lambda _: self._release())

    def _start_closing(self) -> bool:
        """Refuse further calls; returns whether there is anything to end."""
        with self._lock:
            if self.closed:
                return False
            self.closed = True
        return self._transport.owner.bound is not None

    async def _end(self, drain: float) -> None:
        mine = asyncio.current_task()

        def running() -> list[asyncio.Task[Any]]:
            return [task for task in self._running if task is not mine]

        # Calls that were accepted before the close may have their first step behind this one.
        await asyncio.sleep(0)
        try:
            if drain > 0 and (left := running()):
                logger.info(
                    "%s: closing; %d calls are under way and may take %g s more",
                    self._label,
                    len(left),
                    drain,
                )
                await asyncio.wait(left, timeout=drain)
        finally:
            self._cancelling = True
            left = running()
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)
            if self._owns_transport:
                await self._transport.close()

    def _release(self) -> None:
        if self._owns_transport:
            if self._forget_exit is not None:
                self._forget_exit()
            self._transport.owner.release()
