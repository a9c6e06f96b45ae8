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
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from fireworks_training._inbox import call_on
from fireworks_training.errors import OwnerLoopGone, WrongLoop

T = TypeVar("T")

logger = logging.getLogger("fireworks_training.futures")

LOOK_EVERY = 0.25
"""Seconds between two looks of a waiter at the loop that does the work: it may have been closed."""

LOOP_ADVICE = (
    "Use the service inside one `asyncio.run`, as `async with`, or take the synchronous class "
    "(without `Async`), whose loop lives as long as the service."
)

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
        "_waits",
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
        self._waits = 0

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

    @property
    def owner_loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that does the work, once known."""
        return self._loop_of_work()

    def handed_out(self) -> None:
        """Note that user code was handed the error; for owners to whom that matters."""

    def interrupted(self) -> None:
        """Note that Ctrl-C has ended the wait of user code; for owners to whom that matters."""

    @property
    def is_waited_for(self) -> bool:
        """Whether user code is waiting right now, so that it will see how this ends."""
        return self._waits > 0

    def begin_wait(self) -> None:
        """Count a waiter of user code."""
        with changing:
            self._waits += 1

    def end_wait(self) -> None:
        """Count a waiter less."""
        with changing:
            self._waits -= 1

    def fail_if_loop_is_gone(self) -> None:
        """Fail with `OwnerLoopGone` where the loop that has to do the work was closed."""
        loop = self._loop_of_work()
        if not self._done and loop is not None and loop.is_closed():
            self.fail(
                OwnerLoopGone(
                    f"{self.label}: the event loop that owns this service was closed before the "
                    f"result was there. {LOOP_ADVICE}"
                )
            )

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
            try:
                self._wait(done, timeout)
            except BaseException:
                self.forget(wake)
                raise
        return self._error

    def _wait(self, done: threading.Lock, timeout: float | None) -> None:
        """Wait for the lock that is released when this is done, with an eye on the loop."""
        until = None if timeout is None else time.monotonic() + max(timeout, 0.0)
        self.fail_if_loop_is_gone()
        while True:
            left = LOOK_EVERY if until is None else until - time.monotonic()
            if done.acquire(timeout=min(max(left, 0.0), LOOK_EVERY)):
                return
            self.fail_if_loop_is_gone()
            if until is not None and time.monotonic() >= until and not self._done:
                raise TimeoutError

    def forget(self, callback: _Callback) -> None:
        """Call a callback no more: its waiter has left."""
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
                plain: concurrent.futures.Future[T] = _PlainFuture(self)
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


class _PlainFuture(concurrent.futures.Future[T]):
    """A future of the standard library that tells its outcome when the error is handed out."""

    def __init__(self, outcome: Outcome[T]) -> None:
        super().__init__()
        self._outcome = outcome

    def result(self, timeout: float | None = None) -> T:
        self._await_outcome(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._await_outcome(timeout)
        return super().exception(0)

    def _await_outcome(self, timeout: float | None) -> None:
        outcome = self._outcome
        outcome.refuse_endless_wait()
        outcome.begin_wait()
        try:
            error = outcome.exception(timeout)
        except KeyboardInterrupt:
            outcome.interrupted()
            raise
        finally:
            outcome.end_wait()
        if error is not None:
            hand_out(outcome, error)
        if not self.done():  # its callback may run in another thread this moment
            concurrent.futures.wait([self])

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        def told(plain: concurrent.futures.Future[T]) -> None:
            error = self._outcome.exception()
            if error is not None:
                hand_out(self._outcome, error)
            fn(plain)

        super().add_done_callback(told)


def hand_out(outcome: Outcome[Any], error: BaseException) -> None:
    """Note that user code is handed the error of an outcome."""
    mark_retrieved(error)
    outcome.handed_out()


def mark_retrieved(error: BaseException | None) -> None:
    """Mark this error, and those it was caused by, as seen by the caller."""
    while error is not None and "_fireworks_retrieved" not in error.__dict__:
        error.__dict__["_fireworks_retrieved"] = True
        error = getattr(error, "cause", None)


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

    __slots__ = ("_outcome",)

    def __init__(self, outcome: Outcome[Any], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._outcome = outcome
        outcome.add_done_callback(self)

    def cancel(self, msg: Any = None) -> bool:
        """Leave; the outcome keeps nothing of a waiter that has left."""
        self._outcome.forget(self)
        return super().cancel(msg)

    def watch(self) -> None:
        """Look at the loop of the work from time to time, until this is done."""
        if not self.done():
            self._outcome.fail_if_loop_is_gone()
            self.get_loop().call_later(LOOK_EVERY, self.watch)

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
    loop = asyncio.get_running_loop()
    waiter = _LoopFuture(outcome, loop)
    owner = outcome.owner_loop
    if owner is not None and owner is not loop:
        waiter.watch()
    return waiter
