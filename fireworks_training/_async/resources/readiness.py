"""Waits for one resource: polls it, and does what `_core.lifecycle.ReadinessWait` decides.

A change of state is logged as INFO, a long wait as WARNING, both with state, age and message; a
terminal shows the same. A poll that fails for a passing reason is ignored: a control plane that is
away for a minute must not end a wait of hours. It knows the control plane's routes, and nothing of
configurations.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol, TypeVar

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.runtime.cancellation import first_to_end
from fireworks_training._async.runtime.terminal import shown_on_terminal
from fireworks_training._core.backoff import is_retryable
from fireworks_training._core.lifecycle import (
    Again,
    GiveUp,
    Go,
    Readiness,
    ReadinessWait,
    Resume,
    Seen,
    job_readiness,
)
from fireworks_training.errors import ApiError, Conflict
from fireworks_training.models import DeploymentInfo, Observation, TrainerJobInfo

PROBE_EVERY = 5.0
"""Seconds between two attempts to get a completion from a deployment that is CREATING."""

_GOES_ON = (Readiness.READY, Readiness.STARTING, Readiness.QUEUED)


class HasState(Protocol):
    """Names what the wait reads of a resource."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def message(self) -> str: ...


Row = TypeVar("Row", bound=HasState)

LookAgain = Callable[[Observation[Row], int], Awaitable[Observation[Row]]]
"""Fetches a resource, given the observation before and the seconds to wait for a change."""

logger = logging.getLogger("fireworks_training.provisioning")


async def until_ready(
    watch: ReadinessWait,
    look: LookAgain[Row],
    *,
    first: Row | None = None,
    resume: Callable[[], Awaitable[None]] | None = None,
    answers: Callable[[Row], Awaitable[bool]] | None = None,
) -> Row:
    """Poll a resource until it is ready.

    Args:
        look: fetches the resource.
        first: the resource, if it was just fetched.
        resume: starts the resource again, where `watch` allows that.
        answers: a further condition, checked when the state is ready.

    Raises:
        ProvisioningError: it failed, or is not there.
        ProvisioningTimeout: not ready within its budget.
        ApiError: the control plane refuses a request.
    """
    loop = asyncio.get_running_loop()
    with shown_on_terminal(lambda: watch.describe(loop.time())):
        return await _until_ready(watch, look, first, resume, answers)


async def _until_ready(
    watch: ReadinessWait,
    look_again: LookAgain[Row],
    first: Row | None,
    resume: Callable[[], Awaitable[None]] | None,
    answers: Callable[[Row], Awaitable[bool]] | None,
) -> Row:
    loop = asyncio.get_running_loop()
    look, hold, known = Observation(first), 0, first is not None
    row = first
    while True:
        try:
            if not known:
                look = await look_again(look, hold)
            known, row = False, look.row
            ready = row is not None and watch.is_ready(row.state)
            answer = not ready or answers is None or await answers(row)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        except ApiError as error:
            if not is_retryable(error):
                raise
            logger.warning("a look at the control plane failed: %s", error)
            verdict = watch.unseen(loop.time())
        else:
            seen = None if row is None else Seen(row.name, row.state, row.message)
            verdict = watch.see(seen, loop.time(), answers=answer, held=look.held_s)
            if watch.changed:
                logger.info("%s", watch.describe(loop.time()))
        if isinstance(verdict, Go):
            assert row is not None
            return row
        if isinstance(verdict, GiveUp):
            raise verdict.error
        if watch.take_if_due(loop.time()):
            logger.warning("waiting: %s", watch.describe(loop.time()))
        if isinstance(verdict, Resume) and resume is not None:
            await resume()
        hold = 0
        if isinstance(verdict, Again):
            hold = verdict.hold
            await asyncio.sleep(verdict.delay)


async def trainer_ready(
    plane: AsyncControlPlane,
    job_id: str,
    watch: ReadinessWait,
    *,
    first: TrainerJobInfo | None = None,
) -> TrainerJobInfo:
    """Wait until a trainer job runs and answers.

    Args:
        first: the job, if it was just fetched.
    """

    async def healthy(_: TrainerJobInfo) -> bool:
        try:
            return await plane.trainer_healthy(job_id)
        except ApiError:
            return False  # not reachable yet: the wait goes on, within its budget

    async def resume() -> None:
        logger.info("trainer %s stands: resuming it", job_id)
        try:
            await plane.resume_job(job_id)
        except Conflict:  # somebody else may have been quicker: the job's state tells
            job = await plane.get_job(job_id)
            if job is None or job_readiness(job.state) not in _GOES_ON:
                raise

    return await until_ready(
        watch, partial(plane.look_at_job, job_id), first=first, resume=resume, answers=healthy
    )


async def deployment_ready(
    plane: AsyncControlPlane,
    deployment_id: str,
    watch: ReadinessWait,
    *,
    settled: Callable[[DeploymentInfo], bool] | None = None,
) -> DeploymentInfo:
    """Wait until a deployment is ready, and `settled`.

    A deployment that is CREATING and answers a completion counts as ready: its state may lag.

    Args:
        settled: a condition on the deployment; with it, only the state counts as ready.
    """
    last: Observation[DeploymentInfo] = Observation(None)

    async def look(since: Observation[DeploymentInfo], hold_s: int) -> Observation[DeploymentInfo]:
        nonlocal last
        last = await plane.look_at_deployment(deployment_id, since, hold_s)
        return last

    async def is_settled(row: DeploymentInfo) -> bool:
        return settled is None or settled(row)

    async def until_it_answers() -> DeploymentInfo:
        while True:
            await asyncio.sleep(PROBE_EVERY)
            row = last.row
            if row is None or row.state != "CREATING":
                continue
            if await plane.deployment_answers(deployment_id):
                logger.info("deployment %s answers, though it is CREATING", deployment_id)
                return row

    waiting = until_ready(watch, look, answers=is_settled)
    if settled is not None:
        return await waiting
    return await first_to_end(waiting, until_it_answers())
