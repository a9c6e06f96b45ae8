"""Clean-up that a cancellation does not cut, and the first of several failures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, cast


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait until a task has ended, however it ends."""
    await asyncio.wait([task])


def first_of(error: BaseException) -> BaseException:
    """The first failure in a group; the error itself if it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = cast(BaseExceptionGroup[BaseException], error).exceptions[0]
    return error


async def finish_in_spite_of_cancellation(work: Coroutine[Any, Any, None]) -> None:
    """Await clean-up to its end, even when the waiter is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
