"""Runs long computations off the event loop, in one worker thread a loop, one after another.

It carries the encoding and decoding of large passes, and knows neither. The work holds the
interpreter, so a second thread would make nothing faster, and the loop wait for both.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from weakref import WeakKeyDictionary

from fireworks_training._async.runtime.threads import in_thread

T = TypeVar("T")

INLINE_TOKENS = 2048
"""Tokens up to which work runs on the loop; more go to a thread, which costs about 0.1 ms."""

WORK_SECONDS = 0.001
"""How long work in a thread goes on before it lets the others have the interpreter."""

PAUSE_SECONDS = 50e-6
"""Long enough for a waiting thread to wake and take the interpreter; a pause of 0 is not."""

_LANES: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def in_worker(work: Callable[[], T]) -> T:
    """Run `work` in a thread, after all work that this loop has submitted before.

    When cancelled, it lets work that has begun end by itself, and the next work begin.
    """
    lane = _LANES.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with lane:
        return await in_thread(work)


async def off_loop(tokens: int, work: Callable[[], T]) -> T:
    """Run `work` on so many tokens, on the loop or in a thread."""
    return work() if tokens <= INLINE_TOKENS else await in_worker(work)


def with_pauses(
    items: Iterable[T],
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[T]:
    """Go over the items of some work, with a pause after each `WORK_SECONDS` in a thread.

    A loop that comes back from its selector while another thread computes is given the interpreter
    only after the switch interval, 5 ms, each time anew; it need not wait longer than such work
    goes on without a pause. On a loop there are no pauses.

    Args:
        items: each short to work on.
        clock: seconds, for tests.
        pause: sleeps, for tests.
    """
    begun = clock()
    for item in items:
        yield item
        if clock() - begun >= WORK_SECONDS:
            if not _on_loop():
                pause(PAUSE_SECONDS)
            begun = clock()


def _on_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
