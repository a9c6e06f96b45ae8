"""Runs blocking work in daemon threads of the SDK's own, never in the caller's default executor.

A loop's default executor has few threads, and callers block them on what this SDK's loop has to do
(`asyncio.to_thread(future.result)`): work of ours that waited there for its turn would never begin,
and neither would what they wait for. Here no work waits for other work: one begins in a thread that
is idle, or in a new one. It knows nothing of the work, whose callers bound how much there is.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

IDLE = 10.0
"""Seconds after which a thread without work ends."""

NAME = "fireworks-training work"
"""Name of the threads."""


class Threads:
    """Runs each piece of work at once, in a daemon thread that is idle or new.

    Args:
        idle: seconds after which a thread without work ends.
    """

    def __init__(self, idle: float = IDLE) -> None:
        self._idle_limit = idle
        self.forget()

    def forget(self) -> None:
        """Forget all threads: a forked child has none of them."""
        self._lock = threading.Lock()
        self._work = SimpleQueue[Callable[[], object]]()
        self._idle = 0  # threads that wait for work, less the work that is on its way to them

    def start(self, work: Callable[[], object]) -> None:
        """Run `work`, which must not raise, in a thread.

        Raises:
            RuntimeError: the system allows no further thread, or the interpreter ends.
        """
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._work.put(work)
                return
        threading.Thread(target=self._run, args=(work,), name=NAME, daemon=True).start()

    def _run(self, work: Callable[[], object]) -> None:
        while True:
            work()
            del work  # and what it holds, while this thread is idle
            with self._lock:
                self._idle += 1
            while True:
                try:
                    work = self._work.get(timeout=self._idle_limit)
                    break
                except Empty:
                    with self._lock:
                        if self._idle:
                            self._idle -= 1
                            return
                    # Work is on its way to this thread, or to one that takes it before.


_THREADS = Threads()
os.register_at_fork(after_in_child=_THREADS.forget)


async def in_thread(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread of the SDK's own, in the caller's context.

    When cancelled, it lets a function that has begun end by itself, and drops its result.

    Raises:
        BaseException: what the function raised.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    call = partial(contextvars.copy_context().run, partial(fn, *args, **kwargs))
    _THREADS.start(partial(_carry_out, call, loop, done))
    return await done


def _carry_out(
    call: Callable[[], T], loop: asyncio.AbstractEventLoop, done: asyncio.Future[T]
) -> None:
    deliver: Callable[[], None]
    try:
        result = call()
        deliver = partial(_settle, done, result=result)
    except StopIteration as error:  # no future takes one
        raised = RuntimeError(f"the work raised {type(error).__name__}")
        raised.__cause__ = error
        deliver = partial(_settle, done, error=raised)
    except BaseException as error:
        deliver = partial(_settle, done, error=error)
    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:
        if not loop.is_closed():
            raise
        # Nobody can wait for it any more.


def _settle(
    done: asyncio.Future[Any], *, result: object = None, error: BaseException | None = None
) -> None:
    if done.done():  # cancelled
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
