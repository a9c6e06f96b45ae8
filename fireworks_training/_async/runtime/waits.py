"""Logs a warning while an awaitable takes long: after 30 s, then at doubling intervals.

It knows asyncio and the log; the times come from `_core.waits.reports`.
"""

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
    """Await `work`, and log a warning while it takes long.

    Cancelling the wait cancels the work; `asyncio.shield(work)` goes on.

    Args:
        what: describes what is waited for, when a line is due.
        first: seconds until the first line.
    """
    loop = asyncio.get_running_loop()
    schedule = ReportSchedule(loop.time(), first=first)
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=schedule.next - loop.time()))[0]:
            if schedule.take_if_due(now := loop.time()):
                logger.warning("waiting for %.0f s: %s", schedule.age(now), what())
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task.result()
