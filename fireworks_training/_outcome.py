"""`Outcome`: a lock-free future that needs no event loop; one per request.

Thousands of requests are in flight at a time, and few of them ever have a thread that waits. So an
outcome has no lock and no condition of its own, and no list before there is a second callback: the
collector visits every object of every request again and again. The parts that a thread needs to
wait are made when one does.

It knows neither loops nor tasks; `_portal.py` settles outcomes, `futures.py` hands them out.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from fireworks_training._inbox import call_on
from fireworks_training.errors import WrongLoop

T = TypeVar("T")

logger = logging.getLogger("fireworks_training.futures")

changing = threading.RLock()
"""Guards the state of all outcomes and calls: it is held for a few instructions at a time. It is
reentrant, since a finalizer may run inside."""

if hasattr(os, "register_at_fork"):
    # A thread that the child lacks may have held it. The standard library does the same with its.
    os.register_at_fork(after_in_child=changing._at_fork_reinit)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType]


class Outcome(Generic[T]):
    """Holds the result or the error of some work, which is given once, from any thread.

    Args:
        loop: returns the loop that does the work, once known; a blocking wait on it would
            dead-lock.
        cancel: asks the owner to cancel the work; True if it agreed. None: never.
        label: names the work in messages.
        guard: raises if waiting here can never end, for a reason that the owner knows.
    """

    __slots__ = (
        "__weakref__",
        "_callback",
        "_callbacks",
        "_cancel",
        "_done",
        "_error",
        "_guard",
        "_loop",
        "_plain",
        "_result",
        "label",
    )
    _result: T

    def __init__(
        self,
        *,
        loop: Callable[[], asyncio.AbstractEventLoop | None] | None = None,
        cancel: Callable[[], bool] | None = None,
        label: str = "operation",
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.label = label
        self._loop = loop
        self._cancel = cancel
        self._guard = guard
        self._done = False
        self._error: BaseException | None = None
        self._callback: _Callback | None = None  # most have one
        self._callbacks: list[_Callback] | None = None  # the others
        self._plain: concurrent.futures.Future[T] | None = None

    # -- for its owner -----------------------------------------------------------------------------

    def settle(self, result: T) -> None:
        """Give the result, unless there is a result or an error already."""
        with changing:
            if self._done:
                return
            self._result = result
            self._done = True
        self._call_back()

    def fail(self, error: BaseException) -> None:
        """Give the error, unless there is a result or an error already."""
        with changing:
            if self._done:
                return
            self._error = error
            self._done = True
        self._call_back()

    def _call_back(self) -> None:
        first, self._callback = self._callback, None
        others, self._callbacks = self._callbacks, None
        if first is not None:
            self._call(first)
        for callback in others or ():
            self._call(callback)

    def _call(self, callback: _Callback) -> None:
        try:
            callback(self)
        except Exception:
            logger.exception("a callback of %s failed", self.label)

    def _loop_of_work(self) -> asyncio.AbstractEventLoop | None:
        return None if self._loop is None else self._loop()

    def _cancel_work(self) -> bool:
        return self._cancel is not None and self._cancel()

    # -- for its waiters ---------------------------------------------------------------------------

    def done(self) -> bool:
        """Return whether the result or the error is there."""
        return self._done

    def add_done_callback(self, callback: _Callback) -> None:
        """Call `callback(outcome)` when it is done: at once if it is, else where it gets done."""
        with changing:
            if not self._done:
                if self._callback is None:
                    self._callback = callback
                elif self._callbacks is None:
                    self._callbacks = [callback]
                else:
                    self._callbacks.append(callback)
                return
        self._call(callback)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait in this thread, and return the error, or None if there is a result.

        Raises:
            TimeoutError: neither was there within `timeout` seconds.
        """
        if not self._done:
            # A lock that is released when it is done: a future of the standard library would be
            # ten objects for a moment's wait.
            done = threading.Lock()
            done.acquire()
            wake = _Releases(done)
            self.add_done_callback(wake)
            if not done.acquire(timeout=-1 if timeout is None else max(timeout, 0.0)):
                self._forget(wake)
                raise TimeoutError
        return self._error

    def _forget(self, callback: _Callback) -> None:
        with changing:
            if self._callback is callback:
                self._callback = None
            elif self._callbacks is not None and callback in self._callbacks:
                self._callbacks.remove(callback)

    def result(self, timeout: float | None = None) -> T:
        """Wait in this thread, and return the result or raise the error."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._result

    def plain(self) -> concurrent.futures.Future[T]:
        """Return a future of the standard library that settles with this; always the same one.

        It counts as running from the start: no waiter can cancel it.
        """
        with changing:
            if self._plain is None:
                plain: concurrent.futures.Future[T] = concurrent.futures.Future()
                plain.set_running_or_notify_cancel()
                self.add_done_callback(partial(_hand_over, plain))
                # Last, so that a Ctrl-C leaves none that is never settled.
                self._plain = plain
            return self._plain

    def refuse_dead_lock(self) -> None:
        """Raise `WrongLoop` if waiting here would stop the loop that has to do the work."""
        self.refuse_endless_wait()
        if self._done:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if running is self._loop_of_work():
            raise WrongLoop(
                f".result() of {self.label} was called on the event loop that has to run it, and "
                "would wait for ever. Write `await future` there, or use the synchronous class "
                "(without the `Async` prefix) from a plain function."
            )

    def refuse_endless_wait(self) -> None:
        """Raise if the owner knows that the work waits for the caller."""
        if self._guard is not None and not self._done:
            self._guard()

    def request_cancel(self) -> bool:
        """Ask the owner to cancel the work; True if it did."""
        return not self._done and self._cancel_work()


_Callback = Callable[[Outcome[Any]], object]


def _hand_over(plain: concurrent.futures.Future[Any], outcome: Outcome[Any]) -> None:
    error = outcome.exception()
    if error is None:
        plain.set_result(outcome.result())
    else:
        plain.set_exception(error)


class _Releases:
    """Releases the lock that a thread waits for."""

    __slots__ = ("_lock",)

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __call__(self, _: Outcome[Any]) -> None:
        self._lock.release()


class _LoopFuture(asyncio.Future[None]):
    """Waits on one loop for an outcome, which may be settled in any thread."""

    __slots__ = ()

    def __call__(self, _: Outcome[Any]) -> None:
        loop = self.get_loop()
        try:
            if asyncio.get_running_loop() is loop:
                self._wake()
                return
        except RuntimeError:
            pass  # it was settled in a thread without a loop
        with contextlib.suppress(RuntimeError):  # the waiter's loop is closed: nobody waits
            call_on(loop, self._wake)

    def _wake(self) -> None:
        if not self.done():
            self.set_result(None)


def done_here(outcome: Outcome[Any]) -> asyncio.Future[None]:
    """Make a future of the running loop that is done when the outcome is; its cancel is its own.

    Where the work ends on the same loop, it is woken without the write to the loop's own socket
    that `asyncio.wrap_future` costs.
    """
    waiter = _LoopFuture(loop=asyncio.get_running_loop())
    outcome.add_done_callback(waiter)
    return waiter
