"""Waits for what others do: long ones are said in the log, and some outlast their cancellation."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, TypeVar

T = TypeVar("T")

FIRST_WORD = 30.0
"""Seconds of silence before a wait is said; the gap to the next word doubles each time."""

logger = logging.getLogger("fireworks_training.tito")


async def until_done(work: asyncio.Future[T], what: str) -> T:
    """The result of work that goes on when this wait is cancelled.

    Args:
        what: is waited for; for the log.
    """
    await _ended(work, what)
    return work.result()


async def in_spite_of_cancellation(work: asyncio.Future[T], what: str) -> T:
    """The same, but a cancellation is raised only when the work is done."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await _ended(work, what)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return work.result()


async def _ended(work: asyncio.Future[Any], what: str) -> None:
    gap = FIRST_WORD
    while not (await asyncio.wait([work], timeout=gap))[0]:
        logger.warning("still waiting for %s", what)
        gap *= 2
