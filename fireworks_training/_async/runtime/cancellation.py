"""Clean-up that a cancellation does not cut, and the first of several failures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait until a task has ended, however it ends."""
    await asyncio.wait([task])


async def first_to_end(*works: Coroutine[Any, Any, T]) -> T:
    """What whichever ends first comes to; the others are cancelled, and have ended too."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(task for task in tasks if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await finish_in_spite_of_cancellation(_all_ended(tasks))
    return first.result()


async def _all_ended(tasks: list[asyncio.Task[T]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


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
