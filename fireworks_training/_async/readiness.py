"""Waits for one resource: looks, and does what `_core.lifecycle.Watch` decides.

A change of state is logged as INFO, a long silence as WARNING, both with state, age and message; a
terminal shows the same as it changes. A look that fails for a passing reason is no look: a control
plane that is away for a minute must not end a wait of hours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fireworks_training._async.progress import shown
from fireworks_training._core.backoff import is_retryable
from fireworks_training._core.lifecycle import Again, GiveUp, Go, Resume, Seen, Watch
from fireworks_training.errors import ApiError
from fireworks_training.models import DeploymentInfo, TrainerJobInfo

Row = TypeVar("Row", TrainerJobInfo, DeploymentInfo)

logger = logging.getLogger("fireworks_training.provisioning")


async def until_ready(
    watch: Watch,
    look: Callable[[], Awaitable[Row | None]],
    *,
    first: Row | None = None,
    resume: Callable[[], Awaitable[None]] | None = None,
    answers: Callable[[Row], Awaitable[bool]] | None = None,
) -> Row:
    """Look at a resource until it is ready.

    Args:
        look: fetches it; None where it is not there.
        first: a look that was just made.
        resume: asks for it to be started again, where the watch allows that.
        answers: what must hold beyond the state; asked where that is ready.

    Raises:
        ProvisioningError: it failed, or is not there.
        ProvisioningTimeout: not ready within its budget.
        ApiError: the control plane refuses to be asked.
    """
    loop = asyncio.get_running_loop()
    with shown(lambda: watch.describe(loop.time())):
        return await _until_ready(watch, look, first, resume, answers)


async def _until_ready(
    watch: Watch,
    look: Callable[[], Awaitable[Row | None]],
    row: Row | None,
    resume: Callable[[], Awaitable[None]] | None,
    answers: Callable[[Row], Awaitable[bool]] | None,
) -> Row:
    loop = asyncio.get_running_loop()
    while True:
        try:
            row = row if row is not None else await look()
            ready = row is not None and watch.is_ready(row.state)
            answer = not ready or answers is None or await answers(row)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except ApiError as error:
            if not is_retryable(error):
                raise
            logger.warning("a look at the control plane failed: %s", error)
            verdict = watch.unseen(loop.time())
        else:
            seen = None if row is None else Seen(row.name, row.state, row.message)
            verdict = watch.see(seen, loop.time(), answers=answer)
            if watch.changed:
                logger.info("%s", watch.describe(loop.time()))
        if isinstance(verdict, Go):
            assert row is not None
            return row
        if isinstance(verdict, GiveUp):
            raise verdict.error
        if watch.due(loop.time()):
            logger.warning("waiting: %s", watch.describe(loop.time()))
        if isinstance(verdict, Resume) and resume is not None:
            await resume()
        if isinstance(verdict, Again):
            await asyncio.sleep(verdict.delay)
        row = None
