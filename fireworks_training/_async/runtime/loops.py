"""Binds a service to its owner loop, the one event loop that does its work.

An `Async*` service is owned by the loop that runs at its first call, a blocking one by the
portal's. Everything that touches a socket runs there; a call from elsewhere costs one hop. It knows
loops and threads, and nothing of services.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple

from fireworks_training._async.runtime.loop_watch import OnBlocked, watch
from fireworks_training._inbox import call_on
from fireworks_training._outcome import LOOP_ADVICE, Outcome, done_here
from fireworks_training._portal import Lease, closed_loop, spawn_on
from fireworks_training.errors import OwnerLoopGone, WrongLoop

T = TypeVar("T")
Args = TypeVarTuple("Args")

STOPPED_LIMIT = 5.0
"""Seconds after which work queued on a loop that does not run fails with `OwnerLoopGone`."""


class OwnerLoop:
    """Holds the loop that owns a service; bound once, at first use.

    Args:
        portal: bind to the portal's loop instead of the running one.
        stopped_limit: seconds that a loop may stand still under queued work.
        on_blocked: called when a function has blocked the loop; a warning is logged anyway.
    """

    def __init__(
        self,
        *,
        portal: bool = False,
        stopped_limit: float = STOPPED_LIMIT,
        on_blocked: OnBlocked | None = None,
    ) -> None:
        self._portal = portal
        self._stopped_limit = stopped_limit
        self._lease: Lease | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._on_blocked = on_blocked
        self._unwatch: Callable[[], None] | None = None

    def use_portal(self) -> None:
        """Bind to the portal's loop; only before the first use."""
        if self._loop is not None:
            raise WrongLoop("this service is bound to a loop already")
        self._portal = True

    def use_running(self) -> None:
        """Bind to the running loop, unless bound already."""
        if self._loop is None:
            self._portal = False
            self.get()

    @property
    def bound(self) -> asyncio.AbstractEventLoop | None:
        """The loop, or None before the first use."""
        return self._loop

    def get(self) -> asyncio.AbstractEventLoop:
        """Give the loop; the first call binds it.

        Raises:
            WrongLoop: an async service's first call came from outside a running loop.
            OwnerLoopGone: the loop is closed, or this process was forked off after binding.
        """
        if self._pid != os.getpid():
            raise OwnerLoopGone(
                "this service was made before a fork, and its connections belong to the parent. "
                "Make a service of its own in the child process."
            )
        with self._lock:
            if self._loop is None:
                self._loop = self._bind()
                self._unwatch = watch(self._loop, self._on_blocked)
            if self._loop.is_closed():
                raise closed_loop()
            return self._loop

    def _bind(self) -> asyncio.AbstractEventLoop:
        if self._portal:
            self._lease = Lease()
            return self._lease.loop
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            raise WrongLoop(
                f"the first call of an async service must be made on a running loop. {LOOP_ADVICE}"
            ) from None

    def is_current(self) -> bool:
        """Whether the caller runs on the owner loop."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def spawn(
        self, factory: Callable[[*Args], Coroutine[Any, Any, T]], *args: *Args, label: str
    ) -> Outcome[T]:
        """Run a coroutine as a task of the owner loop, from any thread.

        Cancelling the outcome cancels the task. If the loop stands still for `stopped_limit`
        seconds, the outcome fails with `OwnerLoopGone`.
        """
        loop = self.get()
        outcome = spawn_on(loop, factory, *args, label=label)
        if not loop.is_running():
            self.watch(label, outcome.fail)
        return outcome

    def post(self, callback: Callable[[], object]) -> None:
        """Run a plain function soon on the owner loop, from any thread, in the caller's context.

        Raises:
            OwnerLoopGone: the loop is closed.
        """
        loop = self.get()
        if self.is_current():
            callback()
            return
        try:
            call_on(loop, callback, contextvars.copy_context())
        except RuntimeError as error:  # closed since `get` looked
            raise closed_loop(cause=error) from error

    def watch(self, label: str, gone: Callable[[OwnerLoopGone], object]) -> None:
        """If the loop stands still now and in `stopped_limit` seconds, call `gone` from a thread.

        Args:
            label: names the queued work in the message.
        """
        loop = self.get()
        if loop.is_running():
            return

        def check() -> None:
            if not loop.is_running():
                gone(
                    OwnerLoopGone(
                        f"{label}: the event loop that owns this service has stood still for "
                        f"{self._stopped_limit:g} s. {LOOP_ADVICE}"
                    )
                )

        timer = threading.Timer(self._stopped_limit, check)
        timer.daemon = True
        timer.start()

    async def run(
        self, factory: Callable[[*Args], Coroutine[Any, Any, T]], *args: *Args, label: str
    ) -> T:
        """Await a coroutine that must run on the owner loop, from any loop."""
        if self.get() is asyncio.get_running_loop():
            return await factory(*args)
        outcome = self.spawn(factory, *args, label=label)
        try:
            await done_here(outcome)
        except asyncio.CancelledError:
            outcome.request_cancel()
            raise
        return outcome.result()

    def release(self) -> None:
        """Give the portal's loop back, and watch it no more. Idempotent."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        if self._lease is not None:
            self._lease.release()
