"""Runs long computations off the event loop, in one worker thread a loop, one after another.

It carries the encoding and decoding of large passes, and knows neither. The work holds the
interpreter, so a second thread would make nothing faster, and the loop wait for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

from fireworks_training._async.runtime.threads import in_thread

T = TypeVar("T")

INLINE_TOKENS = 2048
"""Tokens up to which work runs on the loop; more go to a thread, which costs about 0.1 ms."""

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
