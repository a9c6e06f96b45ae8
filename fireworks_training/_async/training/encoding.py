"""Work for operations that is done before their turn comes: the encoding of large passes.

One piece at a time, in call order, in a worker thread; as far ahead as the bound allows, so that a
thousand operations called at once do not hold a second copy of all their data. Decoding goes the
same way when its answer comes. A loop has one such worker for all of it: the work holds the
interpreter, so a second one would make nothing faster, and the loop wait for both.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from fireworks_training._async.runtime.worker import INLINE_TOKENS, in_worker

T = TypeVar("T")

AHEAD_TOKENS = 4_000_000
"""Tokens whose operations may lie encoded, not yet sent; one operation always may."""


@dataclass(eq=False, slots=True)
class EncodingJob(Generic[T]):
    """Work for one operation.

    Attributes:
        work: what to do, until it is done; its error, too, comes out of `result()`.
        tokens: its size.
        done: holds the result, if it is done ahead.
        ready: the result or the error, if it was done at once.
    """

    work: Callable[[], T] | None
    tokens: int
    done: asyncio.Future[T] | None = field(default=None, init=False)
    ready: T | Exception | None = field(default=None, init=False)

    def do(self) -> None:
        """Do it now, and let go of what it took."""
        assert self.work is not None
        try:
            self.ready = self.work()
        except Exception as error:
            self.ready = error
        self.work = None

    async def result(self) -> T:
        """What the work gives; done now if it was too small to be done ahead."""
        if self.done is not None:
            return await self.done
        if self.work is not None:
            self.do()
        if isinstance(self.ready, Exception):
            raise self.ready
        return cast(T, self.ready)


class EncodingQueue:
    """The work ahead of one line; on its owner loop.

    Args:
        bound: tokens of pieces that are done and not released.
    """

    def __init__(self, bound: int = AHEAD_TOKENS) -> None:
        self._bound = bound
        self._held = 0
        self._waiting: deque[EncodingJob[Any]] = deque()
        self._released = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def add(self, piece: EncodingJob[Any]) -> None:
        """Start on a piece when those before it are done and the bound allows."""
        if piece.tokens <= INLINE_TOKENS or piece.work is None:
            return
        piece.done = asyncio.get_running_loop().create_future()
        piece.done.add_done_callback(_consume)
        self._waiting.append(piece)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work(), name="encoding")

    def release(self, piece: EncodingJob[Any]) -> None:
        """The operation of a piece is over with it."""
        if piece.done is not None:
            if piece in self._waiting:
                self._waiting.remove(piece)
                piece.done.cancel()
            else:
                self._held -= piece.tokens
                self._released.set()

    async def _work(self) -> None:
        while self._waiting:
            while self._held and self._held + self._waiting[0].tokens > self._bound:
                self._released.clear()
                await self._released.wait()
                if not self._waiting:
                    return
            piece = self._waiting.popleft()
            self._held += piece.tokens
            assert piece.done is not None
            assert piece.work is not None
            work, piece.work = piece.work, None
            try:
                result = await in_worker(work)
            except Exception as error:
                if not piece.done.done():
                    piece.done.set_exception(error)
            else:
                if not piece.done.done():  # its operation may have been cancelled meanwhile
                    piece.done.set_result(result)

    async def stop(self) -> None:
        """Stop, and leave no work behind; what waits for a piece is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.wait([self._worker])
        for piece in self._waiting:
            if piece.done is not None:
                piece.done.cancel()
        self._waiting.clear()


def _consume(done: asyncio.Future[Any]) -> None:
    # The operation may have been cancelled: then nobody asks for the error.
    if not done.cancelled():
        done.exception()
