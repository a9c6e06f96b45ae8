"""`call_on`: makes calls on an event loop from other threads, with one wake-up for many calls.

`call_soon_threadsafe` writes to the loop's own socket at each call, and the loop reads that and
makes a handle and a context of it. When a thousand requests start or end from another thread, most
find the loop awake already. It knows loops, and nothing of what the calls do.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections import deque
from collections.abc import Callable

Call = Callable[[], object]


class _Inbox:
    """Queues the calls that one loop has not made yet."""

    __slots__ = ("_calls", "_due")

    def __init__(self) -> None:
        self._calls: deque[tuple[Call, contextvars.Context | None]] = deque()
        self._due = False  # whether the loop is going to look

    def put(
        self, loop: asyncio.AbstractEventLoop, call: Call, context: contextvars.Context | None
    ) -> None:
        # First the call, then the look at the flag: the loop takes them in the other order.
        self._calls.append((call, context))
        if self._due and not loop.is_closed():
            return
        self._due = True
        try:
            loop.call_soon_threadsafe(self._make, loop)
        except RuntimeError:  # it is closed, and makes none of them any more
            self._due = False
            self._calls.clear()
            raise

    def _make(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = False
        try:
            for _ in range(len(self._calls)):
                self._make_one(loop)
        finally:
            # Something ends the loop (Ctrl-C): should it run again, the rest is not forgotten.
            if self._calls and not self._due:
                self._due = True
                loop.call_soon(self._make, loop)

    def _make_one(self, loop: asyncio.AbstractEventLoop) -> None:
        call, context = self._calls.popleft()
        try:
            if context is None:
                call()
            else:
                context.run(call)
        except Exception as error:
            loop.call_exception_handler({"message": f"{call!r} failed", "exception": error})


_inboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Inbox] = weakref.WeakKeyDictionary()


def call_on(
    loop: asyncio.AbstractEventLoop, call: Call, context: contextvars.Context | None = None
) -> None:
    """Make a call on a loop, soon, from any thread; calls from one thread keep their order.

    Args:
        context: to make it in. None is for calls that start nothing: they run in that of whichever
            call woke the loop, and a task that they made would take it over.

    Raises:
        RuntimeError: the loop is closed.
    """
    inbox = _inboxes.get(loop)
    if inbox is None:
        inbox = _inboxes.setdefault(loop, _Inbox())
    inbox.put(loop, call, context)
