"""Calls a user's function, plain or async, without holding up the loop.

A plain function runs in a daemon thread of its own: it may block, and one that never returns delays
neither its pool's close nor the process's exit. A thread can't be stopped: on cancellation its
result is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and await its result if it is awaitable."""
    if _is_async(function):
        return await function(*arguments)
    result = await _in_thread(function, arguments)
    return await result if inspect.isawaitable(result) else result


def _is_async(function: Callable[..., Any]) -> bool:
    method = getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(method)


async def _in_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.done():  # cancelled: nobody waits
            return
        if isinstance(error, StopIteration):  # which a future can't carry
            error = RuntimeError("the function raised StopIteration")
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = function(*arguments)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, failure)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), daemon=True, name="rollout").start()
    return await done
