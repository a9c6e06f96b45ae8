"""The encoding of large passes before their turn."""

from __future__ import annotations

import asyncio
import threading

from fireworks_training._async.runtime.worker import INLINE_TOKENS
from fireworks_training._async.training.encoding import EncodingJob, EncodingQueue


async def test_a_cancelled_waiter_does_not_stop_the_encoding_of_others() -> None:
    begun, release = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        assert release.wait(10)
        return 1

    work = EncodingQueue()
    first, second = EncodingJob(slow, INLINE_TOKENS + 1), EncodingJob(lambda: 2, INLINE_TOKENS + 1)
    work.add(first)
    work.add(second)
    waiter = asyncio.create_task(first.result())
    await asyncio.to_thread(begun.wait, 10)
    waiter.cancel()
    await asyncio.wait([waiter])
    release.set()
    async with asyncio.timeout(10):
        assert await second.result() == 2
    await work.stop()
    assert work._worker is not None
    assert work._worker.exception() is None
