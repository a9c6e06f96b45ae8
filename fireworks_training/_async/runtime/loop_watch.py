"""Watches the loops that do the SDK's work, and logs which function has blocked one.

A blocked loop sends nothing and reads nothing: streams stall, and syncs wait. One daemon thread
asks all watched loops for a sign of life twice a second; when one does not answer, it reads the
stack of the loop's thread. It starts with the first loop and ends with the last. It does not decide
what counts as a block: `_core.waits.loop_health` does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import site
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from types import FrameType

from fireworks_training._core.waits.loop_health import Block, LoopHealth

BLOCKED_AFTER = 2.0
"""Seconds without a sign of life after which a warning is logged."""

PERIOD = 0.5
"""Seconds between two checks."""

OnBlocked = Callable[[float, str], None]
"""Is called on the loop itself when it goes on, with the seconds of the block and its place."""

logger = logging.getLogger("fireworks_training.loop")


class LoopWatch:
    """Watches the loops of a process.

    Args:
        limit: seconds without a sign of life that count as a block.
        period: seconds between two checks.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        *,
        limit: float = BLOCKED_AFTER,
        period: float = PERIOD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._period = period
        self._clock = clock
        self._lock = threading.RLock()
        self._loops: dict[int, _Watched] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(
        self, loop: asyncio.AbstractEventLoop, on_blocked: OnBlocked | None = None
    ) -> Callable[[], None]:
        """Watch a loop; the function returned ends that.

        Args:
            on_blocked: called at the end of each block.
        """
        key = object()
        with self._lock:
            watched = self._loops.get(id(loop))
            if watched is None or watched.loop is not loop:
                watched = self._loops[id(loop)] = _Watched(
                    loop, LoopHealth(self._limit), self._clock
                )
            watched.users[key] = on_blocked
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(
                    target=self._work,
                    args=(self._stop,),
                    name="fireworks_training: loop watch",
                    daemon=True,
                )
                self._thread.start()

        def release() -> None:
            self._release(loop, key)

        return release

    def _release(self, loop: asyncio.AbstractEventLoop, key: object) -> None:
        with self._lock:
            watched = self._loops.get(id(loop))
            if watched is None or watched.loop is not loop:
                return
            watched.users.pop(key, None)
            if not watched.users:
                del self._loops[id(loop)]
            ended = self._end_if_idle()
        if ended is not None and ended is not threading.current_thread():
            ended.join(1.0)

    def _end_if_idle(self) -> threading.Thread | None:
        """Stop the thread if no loop is left, and give it for joining; call under the lock."""
        if self._loops or self._thread is None:
            return None
        self._stop.set()
        ended, self._thread = self._thread, None
        return ended

    def _work(self, stop: threading.Event) -> None:
        began = self._clock()
        while not stop.wait(self._period):
            now = self._clock()
            self.check(now, now - began - self._period)
            began = self._clock()

    def check(self, now: float, overslept: float) -> None:
        """Ask each loop, or note where it is; `overslept` is by how much this check is late."""
        with self._lock:
            for watched in list(self._loops.values()):
                if watched.loop.is_closed():
                    del self._loops[id(watched.loop)]
                else:
                    watched.check(now, overslept)
            self._end_if_idle()


class _Watched:
    """Watches one loop; all its methods but `_answer` run in the watcher's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, health: LoopHealth, clock: Callable[[], float]
    ) -> None:
        self.loop = loop
        self.users: dict[object, OnBlocked | None] = {}
        self._health = health
        self._clock = clock
        self._thread: int | None = None
        self._question = 0

    def check(self, now: float, overslept: float) -> None:
        if not self.loop.is_running():
            self._health.forget()
            return
        if self._health.waiting:
            self._health.overslept(overslept)
            self._health.note(where_is(self._thread))
            seconds = self._health.take_long_block(now)
            if seconds is not None:
                logger.warning(
                    "the event loop has been blocked for %.0f s and still is, in %s: nothing is "
                    "sent or received meanwhile",
                    seconds,
                    where_is(self._thread) or "a call that can't be seen",
                )
            return
        self._question += 1
        question = self._question
        self._health.ask(now)
        try:
            self.loop.call_soon_threadsafe(self._answer, question)
        except RuntimeError:
            self._health.forget()  # closed just now

    def _answer(self, question: int) -> None:
        """Note the answer to a question; runs on the loop."""
        self._thread = threading.get_ident()
        if question != self._question:
            return
        now = self._clock()
        block = self._health.answer(now)
        if block is None:
            return
        unreported = self._health.take_unreported(now)
        if unreported is not None:
            logger.warning("%s", _line(block, unreported))
        for on_blocked in list(self.users.values()):
            if on_blocked is not None:
                on_blocked(block.seconds, block.where)


def _line(block: Block, unreported: int) -> str:
    before = f" ({unreported} more since the last such line)" if unreported else ""
    if block.frozen:
        return (
            f"the process stood still for {block.seconds:.1f} s{before}: a call held the "
            f"interpreter's lock{f' ({block.where})' if block.where else ''}, or the machine "
            "was suspended"
        )
    return (
        f"the event loop was blocked for {block.seconds:.1f} s in "
        f"{block.where or 'a call that ended unseen'}{before}: nothing was sent or received "
        "meanwhile. Run what takes long with asyncio.to_thread, or in a process"
    )


def where_is(thread: int | None) -> str:
    """Name the innermost function of a thread, with its place, leaving out Python's and libraries'.

    Where all functions are theirs, this is the innermost one.
    """
    # The documented way, in spite of its name, to see what another thread is in.
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    frame = None if thread is None else frames.get(thread)
    if frame is None:
        return ""
    found: FrameType | None = frame
    while found is not None and _foreign(found.f_code.co_filename):
        found = found.f_back if found.f_code.co_name not in _LOOP_FUNCTIONS else None
    chosen = found or frame
    code = chosen.f_code
    return f"{code.co_qualname}() at {code.co_filename}:{chosen.f_lineno}"


_LOOP_FUNCTIONS = {"_run_once", "run_forever"}
"""Functions of asyncio whose callers have started the loop, and block nothing."""

_LIBRARIES = tuple(
    f"{path}{os.sep}"
    for path in {
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("platstdlib"),
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
    }
)


def _foreign(filename: str) -> bool:
    return filename.startswith(("<frozen", *_LIBRARIES))


_process = LoopWatch()


def watch(
    loop: asyncio.AbstractEventLoop, on_blocked: OnBlocked | None = None
) -> Callable[[], None]:
    """Watch a loop with the process's own `LoopWatch`; the function returned ends that."""
    return _process.watch(loop, on_blocked)


def _after_fork() -> None:
    # The thread and the loops are the parent's.
    global _process
    _process = LoopWatch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
