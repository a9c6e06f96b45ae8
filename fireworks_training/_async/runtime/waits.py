"""Waits that speak: after 30 s a log line says what is waited for, and again ever more rarely."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fireworks_training._core.waits.reports import FIRST_NOTICE, ReportSchedule

T = TypeVar("T")

logger = logging.getLogger("fireworks_training")


async def log_if_slow(
    work: Awaitable[T], what: Callable[[], str], *, first: float = FIRST_NOTICE
) -> T:
    """Await `work`; a long wait is logged as a warning. Cancelling the wait cancels the work.

    Args:
        what: says what is waited for, at the time it is said.
        first: seconds until the first word.
    """
    loop = asyncio.get_running_loop()
    notices = ReportSchedule(loop.time(), first=first)
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=first)
            if not task.done() and notices.take_if_due(loop.time()):
                logger.warning("waiting for %.0f s: %s", notices.age(loop.time()), what())
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task.result()
