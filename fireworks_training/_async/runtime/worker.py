"""Runs long computations off the event loop, in one worker thread a loop, one after another.

Encoding and decoding of large passes go this way. The work holds the interpreter, so a second
thread would make nothing faster, and the loop wait for both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

INLINE_TOKENS = 2048
"""Tokens that are encoded or decoded on the loop; more go to a thread, which costs about 0.1 ms."""

_LANES: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def in_worker(work: Callable[[], T]) -> T:
    """Run `work` in a thread when what was asked for before it on this loop is done.

    Cancelled, it leaves work that has begun to end by itself, and lets the next begin.
    """
    lane = _LANES.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with lane:
        return await asyncio.to_thread(work)


async def off_loop(tokens: int, work: Callable[[], T]) -> T:
    """Run `work`, which is about so many tokens, here or in a thread."""
    return work() if tokens <= INLINE_TOKENS else await in_worker(work)
