"""Runs the background event loop behind the blocking classes, and its clean-ups at exit.

One daemon thread with one asyncio loop serves the whole process. It is leased: the first lease
starts it, the last release ends it. At interpreter exit, before any thread is joined, the
registered clean-ups run on it, all together within `EXIT_BUDGET` seconds, so that a script that
forgets `close()` still ends, and still gives back what it holds.

This module knows loops, threads and outcomes; it does not know the work that runs on them.
"""

from __future__ import annotations

import asyncio

# Its exit hook registers first, so that ours runs before it.
import concurrent.futures.thread  # pyright: ignore[reportUnusedImport]
import contextlib
import contextvars
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from functools import partial
from typing import Any, Generic, ParamSpec, Self, TypeVar, TypeVarTuple, cast, get_args

from anyio.from_thread import BlockingPortal, BlockingPortalProvider

from fireworks_training._inbox import call_on
from fireworks_training._outcome import LOOP_ADVICE, Outcome, mark_retrieved
from fireworks_training.errors import OperationCancelled, OwnerLoopGone, WrongLoop
from fireworks_training.futures import APIFuture

T = TypeVar("T")
A = TypeVar("A")
P = ParamSpec("P")
Args = TypeVarTuple("Args")

EXIT_BUDGET = 1.5
"""Seconds that all clean-ups at interpreter exit may take together."""

logger = logging.getLogger("fireworks_training.portal")


class Lease:
    """Keeps the background loop running until it is released.

    Attributes:
        loop: the loop; it runs at least until `release()`.
    """

    def __init__(self) -> None:
        _state.prepare()
        self._provider = _state.provider
        self.loop = _state.loop_of(self._provider.__enter__())
        self._released = False

    def release(self) -> None:
        """Release the loop; idempotent. The last release waits for the thread to end."""
        if self._released:
            return
        if _running_loop() is self.loop:
            # Ending the thread from inside would wait for itself; the next blocking call does it.
            _state.deferred.append(self)
            return
        self._released = True
        if self._provider is _state.provider and not _state.exiting:
            self._provider.__exit__(None, None, None)


class _State:
    """Holds the process's portal: one provider, and the clean-ups for its exit."""

    def __init__(self) -> None:
        self.provider = BlockingPortalProvider()
        self.clean_ups: dict[int, tuple[str, Callable[[], Awaitable[None]]]] = {}
        self.exiting = False
        self.deferred: list[Lease] = []
        self._loops: weakref.WeakKeyDictionary[BlockingPortal, asyncio.AbstractEventLoop] = (
            weakref.WeakKeyDictionary()
        )
        self._next = 0
        self.registered = False
        self._lock = threading.Lock()

    def loop_of(self, portal: BlockingPortal) -> asyncio.AbstractEventLoop:
        """Find the loop that a portal runs; once, since a portal can't be asked on its own loop."""
        if portal not in self._loops:
            self._loops[portal] = portal.call(asyncio.get_running_loop)
            # The thread keeps the provider. A program may end with leases open; were the provider
            # collected then, its end would wait for ever for a thread that no longer runs.
            cast(Any, portal)._kept_by_its_thread = self.provider
        return self._loops[portal]

    def prepare(self) -> None:
        with self._lock:
            if not self.registered:
                # Runs before threads are joined, unlike `atexit`. The private name is what
                # concurrent.futures itself uses; the test of the exit fails if it goes away.
                threading._register_atexit(_run_clean_ups)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
                self.registered = True

    def add(self, what: str, clean_up: Callable[[], Awaitable[None]]) -> int:
        self.prepare()
        with self._lock:
            self._next += 1
            self.clean_ups[self._next] = (what, clean_up)
            return self._next


_state = _State()


def _after_fork() -> None:
    # The child has neither the thread nor a usable lock: it starts from nothing, and owes nothing.
    global _state
    registered = _state.registered
    _state = _State()
    _state.registered = registered


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def at_exit(what: str, clean_up: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Register a clean-up for interpreter exit; the function returned removes it again.

    It runs on the background loop, whatever loop its owner used: it must bring its own session.

    Args:
        what: names the resources, for the warning if the clean-up fails or runs out of time.
        clean_up: the work; its errors are logged.
    """
    state = _state
    key = state.add(what, clean_up)

    def forget() -> None:
        state.clean_ups.pop(key, None)

    return forget


def _run_clean_ups() -> None:
    state = _state
    if not state.clean_ups:
        state.exiting = True
        return
    lease = Lease()
    pending = dict(state.clean_ups)

    async def one(key: int, what: str, clean_up: Callable[[], Awaitable[None]]) -> None:
        try:
            await clean_up()
        except Exception as error:
            logger.warning("at exit, %s was not cleaned up: %s", what, error)
        pending.pop(key, None)

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(one(k, w, c)) for k, (w, c) in list(pending.items())]
        await asyncio.wait(tasks, timeout=EXIT_BUDGET)
        for task in tasks:
            task.cancel()

    outcome = spawn_on(lease.loop, all_of_them, label="clean-up at exit")
    concurrent.futures.wait([outcome.plain()], timeout=EXIT_BUDGET + 0.25)
    for what, _ in pending.values():
        logger.warning(
            "at exit, %s was not cleaned up within %.1f s: call close()", what, EXIT_BUDGET
        )
    state.exiting = True


class _Spawned(Outcome[T]):
    """Runs a coroutine as a task of a loop, and is the outcome of that."""

    __slots__ = ("_args", "_asked", "_factory", "_owner", "_task")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        factory: Callable[..., Coroutine[Any, Any, T]],
        args: tuple[Any, ...],
        label: str,
    ) -> None:
        super().__init__(label=label)
        self._owner = loop
        self._factory: Callable[..., Coroutine[Any, Any, T]] | None = factory
        self._args = args
        self._task: asyncio.Task[T] | None = None
        self._asked = False

    def start(self) -> None:
        """Make the task; call on its loop."""
        factory, args = self._factory, self._args
        assert factory is not None
        self._factory, self._args = None, ()
        if self._asked:
            self.fail(OperationCancelled(f"{self.label} was cancelled before it started"))
            return
        name = f"fireworks_training: {self.label}"
        # One context for the task and for its end: each would copy one, for as long as it runs.
        context = contextvars.copy_context()
        if self._owner.get_task_factory() is None:
            task = self._owner.create_task(factory(*args), name=name, context=context)
        else:  # a factory need not know of contexts
            task = self._owner.create_task(factory(*args), name=name)
        self._task = task
        _tasks.add(task)
        task.add_done_callback(self._finish, context=context)

    def _finish(self, task: asyncio.Task[T]) -> None:
        _tasks.discard(task)
        self._task = None
        if task.cancelled():
            self.fail(OperationCancelled(f"{self.label} was cancelled"))
        elif (error := task.exception()) is not None:
            self.fail(error)
        else:
            self.settle(task.result())

    def _loop_of_work(self) -> asyncio.AbstractEventLoop:
        return self._owner

    def _cancel_work(self) -> bool:
        self._asked = True
        try:
            call_on(self._owner, self._cancel_task)
        except RuntimeError:
            return False
        return True

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()


_tasks: set[asyncio.Task[Any]] = set()  # a loop itself holds its tasks weakly


def spawn_on(
    loop: asyncio.AbstractEventLoop,
    factory: Callable[[*Args], Coroutine[Any, Any, T]],
    *args: *Args,
    label: str,
) -> Outcome[T]:
    """Run a coroutine as a task of a loop, from any thread, in the caller's context.

    Cancelling the outcome cancels the task; the outcome then fails with `OperationCancelled`.

    Raises:
        OwnerLoopGone: the loop is closed.
    """
    spawned = _Spawned(loop, factory, args, label)
    if _running_loop() is loop:
        spawned.start()
        return spawned
    try:
        call_on(loop, spawned.start, contextvars.copy_context())
    except RuntimeError as error:
        raise closed_loop(label, cause=error) from error
    return spawned


def closed_loop(label: str | None = None, *, cause: BaseException | None = None) -> OwnerLoopGone:
    """Make the error for work on a loop that is closed; `label` names the work."""
    prefix = "" if label is None else f"{label}: "
    return OwnerLoopGone(
        f"{prefix}the event loop that owns this service is closed. {LOOP_ADVICE}", cause=cause
    )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def wait_for(outcome: Outcome[T]) -> T:
    """Wait in this thread for work that has no other waiter; Ctrl-C cancels it."""
    outcome.refuse_dead_lock()
    try:
        error = outcome.exception()
    except BaseException:
        outcome.request_cancel()
        raise
    if error is not None:
        mark_retrieved(error)
        raise error
    return outcome.result()


class Blocking(Generic[A]):
    """Base of the generated blocking classes: holds the async object and runs its coroutines."""

    _async: A

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the signatures that the async class shows: `**options` written out."""
        super().__init_subclass__(**kwargs)
        (source,) = get_args(cls.__orig_bases__[0])  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
        for name, member in vars(cls).items():
            shown = getattr(getattr(source, name, None), "__signature__", None)
            if isinstance(member, classmethod) and shown is not None:
                cast(Any, member).__func__.__signature__ = shown

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(
            f"{name}() can't be called: a service is made by from_firetitan_config(...), and a "
            "service makes its clients"
        )

    @classmethod
    def _wrap(cls, instance: A) -> Self:
        """Make the blocking twin of an async object that exists already."""
        twin = cls.__new__(cls)
        twin._async = instance
        return twin

    def _bind(self) -> Self:
        """Bind an async object that was just made to the background loop."""
        cast(Any, self._async)._bind_to_portal()
        return self

    def _run(
        self, call: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a coroutine on the background loop and wait for it; Ctrl-C cancels it."""
        with _leased() as loop:
            if _running_loop() is loop:
                raise WrongLoop(
                    "a blocking call was made on the SDK's own loop (in a callback?); it would "
                    "wait for itself. Use the `Async` class there."
                )
            return wait_for(spawn_on(loop, partial(call, *args, **kwargs), label=call.__name__))

    async def _hop(
        self, call: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a coroutine on the background loop and await it on this one."""
        with _leased() as loop:
            outcome = spawn_on(loop, partial(call, *args, **kwargs), label=call.__name__)
            try:
                return await APIFuture(outcome)
            except asyncio.CancelledError:
                outcome.request_cancel()
                raise

    def _iterate(
        self, call: Callable[P, AsyncIterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]:
        """Iterate an async iterator from this thread; leaving early closes it."""
        iterator = call(*args, **kwargs)
        try:
            while True:
                try:
                    yield self._run(_next_of, iterator)
                except StopAsyncIteration:
                    return
        finally:
            close = getattr(iterator, "aclose", None)
            if close is not None:
                self._run(close)

    def __repr__(self) -> str:
        return repr(self._async).replace("<Async", "<", 1)


async def _next_of(iterator: AsyncIterator[T]) -> T:
    return await anext(iterator)


@contextlib.contextmanager
def _leased() -> Generator[asyncio.AbstractEventLoop]:
    """Lease the background loop for one call; also release leases that ended on the loop itself."""
    lease = Lease()
    try:
        yield lease.loop
    finally:
        if _running_loop() is not lease.loop:
            while _state.deferred:
                _state.deferred.pop().release()
        lease.release()
