"""`APIFuture` and `SampleCall`: the results of a running operation, and of a request that starts
when its result is first wanted.

Both can be awaited on any loop and waited for in any thread. Neither knows what runs behind it: it
sees an `Outcome`, which the owner of the work settles. Waiters come and go without touching the
work: cancelling or timing out a waiter never cancels an operation; only the last waiter of a
`SampleCall`, when it is cancelled, takes the request with it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar, TypeVarTuple, cast

from fireworks_training._outcome import Outcome, changing, done_here, hand_out
from fireworks_training.errors import (
    ClientClosed,
    FireworksTrainingError,
    NotSupported,
    OperationCancelled,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Args = TypeVarTuple("Args")

logger = logging.getLogger("fireworks_training.futures")


def was_retrieved(error: BaseException | None) -> bool:
    """Return whether the caller has seen this error, or one that it was caused by."""
    while error is not None:
        if "_fireworks_retrieved" in error.__dict__:
            return True
        error = getattr(error, "cause", None)
    return False


class APIFuture(Generic[T_co]):
    """Stands for the result of an operation that is running.

    `future.result(timeout)` waits in a thread, `await future` on any loop. The operation goes on
    whatever its waiters do. A failure that nobody retrieves is logged when the future dies.
    """

    __slots__ = ("__weakref__", "_outcome")

    def __init__(self, outcome: Outcome[T_co]) -> None:
        self._outcome = outcome

    def result(self, timeout: float | None = None) -> T_co:
        """Wait in this thread, and return the result.

        Args:
            timeout: seconds; None waits as long as the operation takes.

        Raises:
            TimeoutError: the result was not there in time; the operation goes on.
            WrongLoop: called on the loop that runs the operation, which is not done yet; or inside
                the loss function of this operation or of one before it.
            FireworksTrainingError: why the operation failed.
        """
        outcome = self._outcome
        outcome.refuse_dead_lock()
        if outcome.done():
            return _retrieve(outcome, timeout)
        outcome.begin_wait()
        try:
            return _retrieve(outcome, timeout)
        except KeyboardInterrupt:
            outcome.interrupted()
            raise
        finally:
            outcome.end_wait()

    def __await__(self) -> Generator[Any, None, T_co]:
        outcome = self._outcome
        if not outcome.done():
            outcome.refuse_endless_wait()
            outcome.begin_wait()
            try:
                yield from done_here(outcome)
            except KeyboardInterrupt:
                outcome.interrupted()
                raise
            finally:
                outcome.end_wait()
        return _retrieve(outcome, 0)

    async def result_async(self, timeout: float | None = None) -> T_co:
        """Await with a time limit in seconds: on `TimeoutError` the operation goes on."""
        async with asyncio.timeout(timeout):
            return await self

    def coroutine(self) -> Coroutine[Any, Any, T_co]:
        """Return the wait as a coroutine, for calls that insist on one."""
        return self.result_async()

    def future(self) -> concurrent.futures.Future[T_co]:
        """Return a plain `concurrent.futures.Future`; `cancel()` on it has no effect.

        A failure counts as seen when it is asked for its result or exception, or calls back.
        """
        return self._outcome.plain()

    def cancel(self) -> bool:
        """Cancel the operation if it has not been sent yet; True if it was cancelled.

        It then fails with `OperationCancelled`, and counts as a failure of its step.
        """
        return self._outcome.request_cancel()

    def done(self) -> bool:
        """Return whether the result or the failure is there."""
        return self._outcome.done()

    def __repr__(self) -> str:
        return f"<APIFuture of {self._outcome.label}: {'done' if self.done() else 'pending'}>"

    def __del__(self) -> None:
        _log_unretrieved(getattr(self, "_outcome", None))


def _log_unretrieved(outcome: Outcome[Any] | None) -> None:
    """Log a failure that nobody has seen and now nobody can; for finalizers."""
    if outcome is None or not outcome.done() or sys.is_finalizing():
        return
    error = outcome.exception()
    given_up = isinstance(error, (ClientClosed, OperationCancelled))  # by the caller's own doing
    said = error is not None and "_fireworks_logged" in error.__dict__
    if error is not None and not given_up and not said and not was_retrieved(error):
        logger.error("%s failed, and nobody asked for its result: %s", outcome.label, error)


def _retrieve(outcome: Outcome[T], timeout: float | None) -> T:
    try:
        error = outcome.exception(timeout)
    except concurrent.futures.TimeoutError:
        raise TimeoutError(
            f"{outcome.label} was not done within {timeout} s; it goes on, ask again"
        ) from None
    if error is not None:
        hand_out(outcome, error)
        if isinstance(error, FireworksTrainingError):
            # One error may end many operations: without this each raise would add to its traceback.
            error = error.with_traceback(None)
        raise error
    return outcome.result(0)


class SampleCall(Coroutine[Any, Any, T]):
    """Starts a sampling request at its first `await` or `.result()`, once.

    It is a coroutine for everything that takes one (`await`, `asyncio.gather`, `asyncio.wait_for`,
    `asyncio.run`, `create_task`), may be awaited again for the same result, and may be waited for
    in a plain thread by `.result()`. Cancelling its last waiter cancels the request; a waiter that
    times out in `.result(timeout)` only leaves.

    Args:
        start: starts the request on the loop that owns it, and returns its outcome.
        args: the arguments of `start`.
        label: names the request in messages.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "_driver",
        "_label",
        "_outcome",
        "_start",
        "_starting",
        "_waiters",
    )

    def __init__(
        self, start: Callable[[*Args], Outcome[T]], *args: *Args, label: str = "sample"
    ) -> None:
        self._start: tuple[Callable[..., Outcome[T]], tuple[object, ...]] | None = (start, args)
        self._starting: threading.Lock | None = threading.Lock()  # until it has started
        self._label = label
        self._outcome: Outcome[T] | None = None
        self._waiters = 0
        self._driver: Generator[Any, Any, T] | None = None
        self._abandoned = False

    def _begin(self) -> Outcome[T]:
        with changing:
            self._waiters += 1
        # Starting may wait for the background loop, which needs the lock of the outcomes.
        lock = self._starting
        if lock is not None:
            with lock:
                if self._start is not None:
                    self._abandoned = True  # a start that raises needs no warning besides
                    start, args = self._start
                    try:
                        self._outcome = start(*args)
                    except BaseException:
                        self._count_out()
                        raise
                    self._start = self._starting = None
        assert self._outcome is not None
        return self._outcome

    def _count_out(self) -> bool:
        """Count one waiter less; whether it was the last."""
        with changing:
            self._waiters -= 1
            return self._waiters == 0

    def _leave(self, *, cancelled: bool) -> None:
        if self._count_out() and cancelled and self._outcome is not None:
            self._outcome.request_cancel()

    def __await__(self) -> Generator[Any, Any, T]:
        outcome = self._begin()
        try:
            if not outcome.done():
                outcome.refuse_endless_wait()
                yield from done_here(outcome)
            result = _retrieve(outcome, 0)
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
        """Return whether the result or the failure is there."""
        return self._outcome is not None and self._outcome.done()

    def cancel(self) -> bool:
        """Cancel the request, whoever waits for it; True if it was under way."""
        return self._outcome is not None and self._outcome.request_cancel()

    # -- the coroutine protocol: one driver at a time, made anew when the last one has ended ----

    def send(self, value: Any) -> Any:
        if self._driver is None:
            self._driver = self.__await__()
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
            self._driver = self.__await__()
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

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotSupported(
            f"{self._label}: a call is a request of this process and does not pickle: send its "
            "result, or the sampler, which pickles"
        )

    def __repr__(self) -> str:
        state = "not started" if self._outcome is None else "done" if self.done() else "pending"
        return f"<SampleCall of {self._label}: {state}>"

    def __del__(self) -> None:
        outcome: Outcome[T] | SampleCall[T] | None = getattr(self, "_outcome", self)
        if isinstance(outcome, Outcome):
            _log_unretrieved(outcome)
        elif outcome is None and not self._abandoned:
            warnings.warn(
                f"{self._label} was never started: await it, or call .result()",
                RuntimeWarning,
                stacklevel=1,
                source=self,
            )
