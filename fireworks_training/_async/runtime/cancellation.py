"""Finishes clean-up in spite of a cancellation, and takes apart failures of several tasks.

It knows asyncio's tasks; what they do is their callers' concern.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

T = TypeVar("T")


async def ended(task: asyncio.Task[Any]) -> None:
    """Wait until a task has ended, however it ends."""
    await asyncio.wait([task])


async def first_to_end(*works: Coroutine[Any, Any, T]) -> T:
    """Run coroutines at once; give the result of the first that ends, and cancel the others.

    All of them have ended when this returns or raises.
    """
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
    """Find the first failure in a group of exceptions; an exception alone is its own."""
    while isinstance(error, BaseExceptionGroup):
        error = cast(BaseExceptionGroup[BaseException], error).exceptions[0]
    return error


async def finish_in_spite_of_cancellation(work: Coroutine[Any, Any, T]) -> T:
    """Await work to its end, even when the waiter is cancelled meanwhile.

    Such a cancellation is raised when the work has ended, with the work's own failure, if there is
    one, as its cause.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await ended(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()
