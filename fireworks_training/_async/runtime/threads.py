"""`in_thread`: runs a blocking function in a daemon thread of the SDK's own, and awaits it.

The default executor of a loop belongs to the caller, who may fill it with functions that wait for
this very loop: work of ours that queued behind them would wait for ever. The threads here take
nothing but the SDK's work, which waits for no loop. They are daemons: a program ends without them.
It knows neither what runs nor who waits.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

from fireworks_training._inbox import call_on

T = TypeVar("T")
Args = TypeVarTuple("Args")

MAX_THREADS = 32
"""Threads at most; what comes when all are busy waits for the first that is free."""

IDLE_SECONDS = 10.0
"""Seconds after which a thread without work ends."""


class _Job:
    """Holds one call, and the future of the loop that waits for it."""

    __slots__ = ("_context", "_future", "_loop", "_work")

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._future: asyncio.Future[Any] = self._loop.create_future()

    @property
    def future(self) -> asyncio.Future[Any]:
        """Is done when the call has returned."""
        return self._future

    def run(self) -> None:
        """Make the call, unless nobody waits for it any more; hand its result to the loop."""
        if self._future.cancelled():
            return
        result: object = None
        error: BaseException | None = None
        try:
            result = self._context.run(self._work)
        except StopIteration as stop:  # no future takes one
            error = RuntimeError("the function raised StopIteration")
            error.__cause__ = stop
        except BaseException as failure:
            error = failure
        try:
            call_on(self._loop, lambda: self._settle(result, error))
        except RuntimeError:
            return  # the loop is closed, and with it whoever waited

    def _settle(self, result: object, error: BaseException | None) -> None:
        if self._future.done():
            return
        if error is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(error)


class _Threads:
    """Starts daemon threads as they are needed, up to `MAX_THREADS`, and ends those that idle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._threads = 0
        self._free = 0  # threads that wait for a job, less the jobs that wait for one of them

    def submit(self, job: _Job) -> None:
        """Run a job in a free thread, or in a new one."""
        with self._lock:
            self._free -= 1
            new = self._free < 0 and self._threads < MAX_THREADS
            if new:
                self._threads += 1
                self._free += 1
            self._jobs.put(job)
        if new:
            threading.Thread(target=self._work, name="fireworks_training", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if self._free > 0:  # else a job is on its way to this thread
                        self._free -= 1
                        self._threads -= 1
                        return
                continue
            job.run()
            del job
            with self._lock:
                self._free += 1


_threads = _Threads()


def _after_fork() -> None:
    global _threads
    _threads = _Threads()  # the child has none of the threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


async def in_thread(work: Callable[[*Args], T], *args: *Args) -> T:
    """Run `work(*args)` in a daemon thread of the SDK's own, in the caller's context.

    A cancelled caller does not wait: work that has begun ends by itself, and its result is dropped.
    """
    job = _Job((lambda: work(*args)) if args else work)
    _threads.submit(job)
    result: T = await job.future
    return result
