"""Encodes the datums of large passes before the turn of their operations comes.

One job at a time, in call order, in the loop's worker thread (`runtime.worker`); as far ahead as
the bound allows, so that a thousand operations called at once do not hold a second copy of all
their data.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from fireworks_training._async.runtime.worker import INLINE_TOKENS, in_worker

T = TypeVar("T")

ENCODED_TOKENS = 4_000_000
"""Tokens that may lie encoded and not yet sent; those of one operation always may."""


@dataclass(eq=False, slots=True)
class EncodingJob(Generic[T]):
    """The encoding of the datums of one operation.

    Attributes:
        work: does it, until it is done; its error, too, comes out of `result()`.
        tokens: its size.
        done: holds the result, if the queue does it.
        ready: the result or the error, if it was done at once.
    """

    work: Callable[[], T] | None
    tokens: int
    done: asyncio.Future[T] | None = field(default=None, init=False)
    ready: T | Exception | None = field(default=None, init=False)

    def do(self) -> None:
        """Encode now, and let go of the datums."""
        assert self.work is not None
        try:
            self.ready = self.work()
        except Exception as error:
            self.ready = error
        self.work = None

    async def result(self) -> T:
        """Wait for what the work gives; it is done now if it was too small for the queue."""
        if self.done is not None:
            return await self.done
        if self.work is not None:
            self.do()
        if isinstance(self.ready, Exception):
            raise self.ready
        return cast(T, self.ready)


class EncodingQueue:
    """Carries out the encoding jobs of one model; on its owner loop.

    Args:
        bound: tokens of jobs that may be done and not released.
    """

    def __init__(self, bound: int = ENCODED_TOKENS) -> None:
        self._bound = bound
        self._held = 0
        self._waiting: deque[EncodingJob[Any]] = deque()
        self._released = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def add(self, job: EncodingJob[Any]) -> None:
        """Start a job when those before it are done and the bound allows."""
        if job.tokens <= INLINE_TOKENS or job.work is None:
            return
        job.done = asyncio.get_running_loop().create_future()
        job.done.add_done_callback(_consume)
        self._waiting.append(job)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work(), name="encoding")

    def release(self, job: EncodingJob[Any]) -> None:
        """Let go of a job that its operation needs no more."""
        if job.done is not None:
            if job in self._waiting:
                self._waiting.remove(job)
                job.done.cancel()
            else:
                self._held -= job.tokens
                self._released.set()

    async def _work(self) -> None:
        while self._waiting:
            while self._held and self._held + self._waiting[0].tokens > self._bound:
                self._released.clear()
                await self._released.wait()
                if not self._waiting:
                    return
            job = self._waiting.popleft()
            self._held += job.tokens
            assert job.done is not None
            assert job.work is not None
            work, job.work = job.work, None
            try:
                result = await in_worker(work)
            except Exception as error:
                if not job.done.done():
                    job.done.set_exception(error)
            else:
                if not job.done.done():  # its operation may have been cancelled meanwhile
                    job.done.set_result(result)

    async def stop(self) -> None:
        """Stop, and leave no work behind; who waits for a job is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        for job in self._waiting:
            if job.done is not None:
                job.done.cancel()
        self._waiting.clear()


def _consume(done: asyncio.Future[Any]) -> None:
    # The operation may have been cancelled: then nobody asks for the error.
    if not done.cancelled():
        done.exception()
