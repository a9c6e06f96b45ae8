"""The two handles that calls return: `APIFuture` (an operation that runs by itself) and
`SampleCall` (a request that starts when somebody wants it).

Both can be awaited on any loop and waited for in any thread. Neither knows what runs behind it: it
sees an `Outcome`, which the owner of the work fills in. Waiters come and go without touching the
work: cancelling or timing out a waiter never cancels an operation; only the last waiter of a
`SampleCall`, when it is cancelled, takes the request with it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from fireworks_training.errors import (
    ClientClosed,
    FireworksTrainingError,
    OperationCancelled,
    WrongLoop,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

logger = logging.getLogger("fireworks_training.futures")


class Outcome(concurrent.futures.Future[T]):
    """A future that counts as running from the start, so that no waiter can cancel it.

    Args:
        loop: tells the loop that does the work, once known; a blocking wait on it would dead-lock.
        cancel: asks the owner to cancel the work; True if it agreed. None: never.
        label: what the work is, for messages.
        guard: raises if waiting here can never end, for a reason that the owner knows.
    """

    def __init__(
        self,
        *,
        loop: Callable[[], asyncio.AbstractEventLoop | None] | None = None,
        cancel: Callable[[], bool] | None = None,
        label: str = "operation",
        guard: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._guard = guard
        self._loop_of_work = loop
        self._cancel_work = cancel
        self.label = label
        self.set_running_or_notify_cancel()

    def refuse_dead_lock(self) -> None:
        """Raise `WrongLoop` if waiting here would stop the loop that has to do the work."""
        self.refuse_endless_wait()
        if self.done() or self._loop_of_work is None:
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
        """Raise if the owner knows that the work waits for whoever waits here."""
        if self._guard is not None and not self.done():
            self._guard()

    def request_cancel(self) -> bool:
        """Ask the owner to cancel the work. True if it did."""
        return not self.done() and self._cancel_work is not None and self._cancel_work()

    def settle(self, result: T) -> None:
        """Give the result, unless there is an outcome already."""
        if not self.done():
            self.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Give the error, unless there is an outcome already."""
        if not self.done():
            self.set_exception(error)


def mark_retrieved(error: BaseException | None) -> None:
    """Note that the caller has seen this error, and those it was caused by."""
    while error is not None and "_fireworks_retrieved" not in error.__dict__:
        error.__dict__["_fireworks_retrieved"] = True
        error = getattr(error, "cause", None)


def was_retrieved(error: BaseException | None) -> bool:
    """Whether the caller has seen this error, or the one that it was caused by."""
    while error is not None:
        if "_fireworks_retrieved" in error.__dict__:
            return True
        error = getattr(error, "cause", None)
    return False


class APIFuture(Generic[T_co]):
    """The result of an operation that is under way.

    `future.result(timeout)` waits in a thread, `await future` on any loop. The operation goes on
    whatever its waiters do. A failure that nobody retrieves is logged when the future dies.
    """

    __slots__ = ("__weakref__", "_outcome")

    def __init__(self, outcome: Outcome[T_co]) -> None:
        self._outcome = outcome

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the result in this thread.

        Args:
            timeout: seconds; None waits as long as the operation takes.

        Raises:
            TimeoutError: the result was not there in time; the operation goes on.
            WrongLoop: called on the loop that runs the operation, which is not done yet; or inside
                the loss function of this operation or of one before it.
            FireworksTrainingError: why the operation failed.
        """
        self._outcome.refuse_dead_lock()
        return _retrieve(self._outcome, timeout)

    def __await__(self) -> Generator[Any, None, T_co]:
        if not self._outcome.done():
            self._outcome.refuse_endless_wait()
            yield from done_here(self._outcome)
        return _retrieve(self._outcome, 0)

    async def result_async(self, timeout: float | None = None) -> T_co:
        """`await` with a time limit in seconds: on `TimeoutError` the operation goes on."""
        async with asyncio.timeout(timeout):
            return await self

    def coroutine(self) -> Coroutine[Any, Any, T_co]:
        """The wait as a coroutine, for calls that insist on one."""
        return self.result_async()

    def future(self) -> concurrent.futures.Future[T_co]:
        """The plain `concurrent.futures.Future` behind this; `cancel()` on it has no effect."""
        self._outcome.add_done_callback(_consume_concurrent)
        return self._outcome

    def cancel(self) -> bool:
        """Cancel the operation if it has not been sent yet; True if that was so.

        It then fails with `OperationCancelled`, and counts as a failure of its step.
        """
        return self._outcome.request_cancel()

    def done(self) -> bool:
        """Whether the result or the failure is there."""
        return self._outcome.done()

    def __repr__(self) -> str:
        return f"<APIFuture of {self._outcome.label}: {'done' if self.done() else 'pending'}>"

    def __del__(self) -> None:
        outcome = getattr(self, "_outcome", None)
        if outcome is None or not outcome.done() or sys.is_finalizing():
            return
        error = outcome.exception()
        given_up = isinstance(
            error, (ClientClosed, OperationCancelled)
        )  # by the caller's own doing
        if error is not None and not given_up and not was_retrieved(error):
            logger.error("%s failed, and nobody asked for its result: %s", outcome.label, error)


def _retrieve(outcome: Outcome[T], timeout: float | None) -> T:
    try:
        error = outcome.exception(timeout)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(
            f"{outcome.label} was not done within {timeout} s; it goes on, ask again"
        ) from None
    if error is not None:
        mark_retrieved(error)
        if isinstance(error, FireworksTrainingError):
            # One error may end many operations: without this each raise would add to its traceback.
            error = error.with_traceback(None)
        raise error
    return outcome.result(0)


def done_here(outcome: Outcome[Any]) -> asyncio.Future[None]:
    """A future of the running loop that is done when the outcome is, and may be cancelled alone.

    Where the work ends on the same loop, it is woken without the write to the loop's own socket
    that `asyncio.wrap_future` costs.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def ended(_: concurrent.futures.Future[Any]) -> None:
        try:
            if asyncio.get_running_loop() is loop:
                wake()
                return
        except RuntimeError:
            pass  # it ended in a thread without a loop
        with contextlib.suppress(RuntimeError):  # the waiter's loop is closed: nobody waits
            loop.call_soon_threadsafe(wake)

    outcome.add_done_callback(ended)
    return waiter


def _consume_concurrent(future: concurrent.futures.Future[Any]) -> None:
    mark_retrieved(future.exception())


class SampleCall(Coroutine[Any, Any, T]):
    """A sampling request that starts at its first `await` or `.result()`, once.

    It is a coroutine for everything that takes one (`await`, `asyncio.gather`, `asyncio.wait_for`,
    `asyncio.run`, `create_task`), may be awaited again for the same result, and may be waited for
    in a plain thread by `.result()`. Cancelling its last waiter cancels the request; a waiter that
    times out in `.result(timeout)` only leaves.

    Args:
        start: starts the request on the loop that owns it, and returns its outcome.
        label: what is sampled, for messages.
    """

    def __init__(self, start: Callable[[], Outcome[T]], *, label: str = "sample") -> None:
        self._start = start
        self._label = label
        self._lock = threading.Lock()
        self._outcome: Outcome[T] | None = None
        self._waiters = 0
        self._driver: Coroutine[Any, Any, T] | None = None
        self._abandoned = False

    def _begin(self) -> Outcome[T]:
        with self._lock:
            if self._outcome is None:
                self._abandoned = True  # a start that raises has said enough
                self._outcome = self._start()
            self._waiters += 1
            return self._outcome

    def _leave(self, *, cancelled: bool) -> None:
        with self._lock:
            self._waiters -= 1
            last = self._waiters == 0
        if cancelled and last and self._outcome is not None:
            self._outcome.request_cancel()

    async def _wait(self) -> T:
        outcome = self._begin()
        try:
            result = await APIFuture(outcome)
        except BaseException:
            self._leave(cancelled=not outcome.done())
            raise
        self._leave(cancelled=False)
        return result

    def result(self, timeout: float | None = None) -> T:
        """Start the request if need be, and wait for the result in this thread.

        Args:
            timeout: seconds; None waits as long as the request takes.

        Raises:
            TimeoutError: not there in time; the request goes on, ask again.
            WrongLoop: called on the loop that has to run the request.
            SamplingError: why there is no result.
        """
        outcome = self._begin()
        try:
            outcome.refuse_dead_lock()
            result = _retrieve(outcome, timeout)
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            self._leave(cancelled=interrupted and not outcome.done())
            raise
        self._leave(cancelled=False)
        return result

    def done(self) -> bool:
        """Whether the result or the failure is there."""
        return self._outcome is not None and self._outcome.done()

    def cancel(self) -> bool:
        """Cancel the request, whoever waits for it; True if it was under way."""
        return self._outcome is not None and self._outcome.request_cancel()

    # -- the coroutine protocol: one driver at a time, made anew when the last one has ended ----

    def __await__(self) -> Generator[Any, Any, T]:
        return self._wait().__await__()

    def send(self, value: Any) -> Any:
        if self._driver is None:
            self._driver = self._wait()
        try:
            return self._driver.send(value)
        except BaseException:
            self._driver = None
            raise

    def throw(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> Any:
        if self._driver is None:
            self._driver = self._wait()
        error = typ if isinstance(typ, BaseException) else val
        if not isinstance(error, BaseException):
            error = cast(type[BaseException], typ)() if error is None else RuntimeError(error)
        try:
            return self._driver.throw(error if tb is None else error.with_traceback(tb))
        except BaseException:
            self._driver = None
            raise

    def close(self) -> None:
        """End the driving coroutine; a call that was never started then dies without a warning."""
        self._abandoned = True
        if self._driver is not None:
            driver, self._driver = self._driver, None
            driver.close()

    def __repr__(self) -> str:
        state = "not started" if self._outcome is None else "done" if self.done() else "pending"
        return f"<SampleCall of {self._label}: {state}>"

    def __del__(self) -> None:
        if getattr(self, "_outcome", self) is None and not self._abandoned:
            warnings.warn(
                f"{self._label} was never started: await it, or call .result()",
                RuntimeWarning,
                stacklevel=1,
                source=self,
            )
