"""Gets a trainer and a deployment up, together, and gives back what it made.

Both are made in one task group: when one fails, the wait for the other ends at once, what this call
made is cleaned up, and the first error is raised. What was found is never touched.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from uuid import uuid4

from fireworks_training._async.connection import Connection
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.tokenizers import LOCAL_ACCOUNT
from fireworks_training._core.lifecycle import (
    FIRST_DELAY,
    Readiness,
    deployment_readiness,
    job_readiness,
    next_delay,
)
from fireworks_training._core.notices import Notices
from fireworks_training._portal import at_exit
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import (
    ApiError,
    InvalidArgument,
    NotSupported,
    ProvisioningError,
    ProvisioningTimeout,
)
from fireworks_training.models import DeploymentInfo, TrainerJobInfo, TrainingProfile

T = TypeVar("T", TrainerJobInfo, DeploymentInfo)

logger = logging.getLogger("fireworks_training.provisioning")


@dataclass(slots=True)
class Resources:
    """What a service has, and whether it made it."""

    profile: TrainingProfile | None = None
    job_id: str | None = None
    job_created: bool = False
    job: TrainerJobInfo | None = None
    deployment_id: str | None = None
    deployment_created: bool = False
    deployment: DeploymentInfo | None = None
    errors: list[BaseException] = field(default_factory=list[BaseException])


class Provisioner:
    """What one service has on its platform, from the first need of it to the end.

    Args:
        connection: the platform.
        config: what the service was made for.
    """

    def __init__(self, connection: Connection, config: FiretitanProvisioningConfig) -> None:
        self.resources = Resources()
        self._connection = connection
        self._config = config
        self._ready = False
        self._lock = asyncio.Lock()
        self._forget_exit: Callable[[], None] = lambda: None

    async def provisioned(self) -> Resources:
        """Provision once, whoever asks; a failed or cancelled attempt leaves nothing behind."""
        async with self._lock:
            if not self._ready:
                plane = await self._connection.open()
                self._forget_exit()
                what = f"the service of {self._config.base_model}"
                self._forget_exit = at_exit(what, self._clean_up_at_exit)
                try:
                    async with asyncio.TaskGroup() as group:
                        # Imported while the trainer starts: on the loop it would stop for seconds.
                        group.create_task(asyncio.to_thread(_import_tinker))
                        group.create_task(provision(plane, self._config, self.resources))
                except BaseException as error:
                    await finish_in_spite_of_cancellation(abandon(plane, self.resources))
                    self.resources = Resources()
                    raise first_of(error) from None
                self._ready = True
        return self.resources

    async def revive(self) -> None:
        """Start the trainer job again after its process was lost, and wait until it is ready."""
        async with self._lock:
            plane = await self._connection.open()
            job_id = self.resources.job_id
            assert job_id is not None
            self.resources.job = await _attach(plane, self._config, job_id)

    async def clean_up(self) -> list[BaseException]:
        """Give back what was made, as the policies say; what went wrong on the way."""
        if self._ready:
            await clean_up(await self._connection.open(), self._config, self.resources)
        self._forget_exit()
        return self.resources.errors

    async def _clean_up_at_exit(self) -> None:
        """The policies, at interpreter exit, on the portal's loop, over a pool of its own."""
        if self._connection.temporary or not self._ready:
            return
        async with self._connection.make_transport(OwnerLoop(portal=True)) as transport:
            await clean_up(AsyncControlPlane(transport), self._config, self.resources)


def _import_tinker() -> None:
    importlib.import_module("tinker")


async def provision(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, resources: Resources
) -> None:
    """Make or find what `config` describes, and wait until it is ready.

    `resources` is filled in as things come into being, so that a cancelled or failed call leaves a
    record of what there is to clean up.

    Raises:
        ProvisioningError: a resource failed.
        ProvisioningTimeout: one was not ready within its budget.
        NotSupported: an option that only the local platform has, elsewhere.
    """
    if config.snapshot_dtype is not None and await plane.account() != LOCAL_ACCOUNT:
        raise NotSupported("snapshot_dtype is an option of the local platform: leave it out here")
    resources.job_id = config.trainer_job_id or f"training-api-service-{uuid4().hex[:8]}"
    if config.create_deployment:
        short = config.base_model.rsplit("/", 1)[-1].lower().replace(".", "-").replace("_", "-")
        resources.deployment_id = (
            config.deployment_id or f"{short[:50].strip('-')}-{uuid4().hex[:8]}"
        )
    if config.training_shape_id is not None:
        resources.profile = await plane.training_profile(config.training_shape_id)
    if config.wait_for_trainer_before_deployment:
        await _trainer(plane, config, resources)
        await _deployment(plane, config, resources)
        return
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_trainer(plane, config, resources))
            group.create_task(_deployment(plane, config, resources))
    except BaseExceptionGroup as failures:
        raise first_of(failures) from None


def first_of(error: BaseException) -> BaseException:
    """The first failure in a group; the error itself if it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = cast(BaseExceptionGroup[BaseException], error).exceptions[0]
    return error


async def finish_in_spite_of_cancellation(work: Coroutine[Any, Any, None]) -> None:
    """Await clean-up to its end, even when the waiter is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _trainer(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, resources: Resources
) -> None:
    job_id = resources.job_id
    assert job_id is not None
    job = await plane.get_job(job_id) if config.trainer_job_id else None
    if job is None:
        job, resources.job_created = await plane.create_job(
            job_id, _job_body(config), await _job_query(config, resources)
        )
    if job.message.startswith("Warning:"):
        logger.warning("trainer %s: %s", job_id, job.message)
    resources.job = await _until_running(plane, config, job, created=resources.job_created)


async def _attach(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, job_id: str
) -> TrainerJobInfo:
    """Wait for a trainer job that exists, started again if it stands."""
    job = await plane.get_job(job_id)
    if job is None:
        raise ProvisioningError(f"the trainer job {job_id} is gone", resource=job_id)
    return await _until_running(plane, config, job, created=False)


async def _until_running(
    plane: AsyncControlPlane,
    config: FiretitanProvisioningConfig,
    job: TrainerJobInfo,
    *,
    created: bool,
) -> TrainerJobInfo:
    job_id = job.job_id
    first: TrainerJobInfo | None = job
    if not created and job_readiness(job.state) is Readiness.RESUMABLE:
        logger.info("trainer %s is %s: resuming it", job_id, job.state)
        await plane.resume_job(job_id)
        first = None
    return await _until_ready(
        f"trainer {job_id}",
        first,
        lambda: plane.get_job(job_id),
        lambda state: job_readiness(state),
        budget=config.trainer_timeout_s,
        queue_budget=config.trainer_pending_timeout_s,
        probe=lambda: plane.trainer_healthy(job_id),
    )


async def _deployment(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, resources: Resources
) -> None:
    deployment_id = resources.deployment_id
    if deployment_id is None:
        return
    job = await plane.resource_name("rlorTrainerJobs", resources.job_id or "")
    found = await plane.get_deployment(deployment_id) if config.deployment_id else None
    if found is None or deployment_readiness(found.state) is Readiness.GONE:
        body = _deployment_body(config, resources, job)
        found, resources.deployment_created = await plane.create_deployment(
            deployment_id, body, _deployment_query(config)
        )
    else:
        await _reattach(plane, config, found, job)
    if found.message.startswith("Warning:"):
        logger.warning("deployment %s: %s", deployment_id, found.message)
    resources.deployment = await _until_ready(
        f"deployment {deployment_id}",
        None,
        lambda: plane.get_deployment(deployment_id),
        lambda state: deployment_readiness(state),
        budget=config.deployment_timeout_s,
        queue_budget=config.deployment_timeout_s,
    )


async def _reattach(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, found: DeploymentInfo, job: str
) -> None:
    """Point a deployment that was found to this service's trainer, if it points elsewhere."""
    wanted = config.deployment_shape
    if wanted and found.deployment_shape and _parent(wanted) != _parent(found.deployment_shape):
        raise InvalidArgument(
            f"the deployment {found.deployment_id} has the shape {found.deployment_shape}, but "
            f"{wanted} was asked for: give another deployment_id, or leave deployment_shape out"
        )
    fields: dict[str, Any] = {}
    if found.hot_load_trainer_job != job:
        fields["hotLoadTrainerJob"] = job
    transition = config.hot_load_transition_type
    if transition is not None and transition != (found.hot_load_transition_type or "ASYNC"):
        fields["hotLoadTransitionType"] = transition
    masks = {
        "hotLoadTrainerJob": "hot_load_trainer_job",
        "hotLoadTransitionType": "hot_load_transition_type",
    }
    if fields:
        mask = ",".join(masks[name] for name in fields)
        await plane.update_deployment(found.deployment_id, fields, mask)
    if found.state not in ("READY", "UPDATING", "CREATING"):
        replicas = {
            "minReplicaCount": config.replica_count,
            "maxReplicaCount": config.replica_count,
        }
        await plane.update_deployment(found.deployment_id, replicas, None)


def _parent(shape: str) -> str:
    return shape.split("/versions/")[0]


async def _until_ready(
    what: str,
    first: T | None,
    look: Callable[[], Awaitable[T | None]],
    read: Callable[[str], Readiness],
    *,
    budget: float,
    queue_budget: float,
    probe: Callable[[], Awaitable[bool]] | None = None,
) -> T:
    """Look at a resource until it is ready; its states have separate budgets, in seconds."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    placed_at: float | None = None
    notices = Notices(started)
    delay = FIRST_DELAY
    row = first
    while True:
        row = row if row is not None else await look()
        state = row.state if row is not None else "missing"
        readiness = read(state)
        now = loop.time()
        if row is None or readiness in (Readiness.GONE, Readiness.FAILED, Readiness.RESUMABLE):
            message = f": {row.message}" if row is not None and row.message else ""
            raise ProvisioningError(
                f"{what} is {state}{message}",
                resource=None if row is None else row.name,
                state=state,
            )
        if readiness is Readiness.READY and (probe is None or await _probe(probe)):
            return row
        if placed_at is None and readiness is not Readiness.QUEUED:
            placed_at = now
        limit = queue_budget if placed_at is None else budget
        if now - (started if placed_at is None else placed_at) > limit:
            raise ProvisioningTimeout(
                f"{what} is {state} after {now - started:.0f} s (budget {limit:.0f} s)"
                + (f": {row.message}" if row.message else ""),
                resource=row.name,
                state=state,
            )
        if notices.due(now):
            logger.warning(
                "%s: waiting for %.0f s, state %s %s", what, now - started, state, row.message
            )
        await asyncio.sleep(delay)
        delay = next_delay(delay)
        row = None


async def _probe(probe: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await probe()
    except ApiError:
        return False  # not reachable yet: the wait goes on, within its budget


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, False, (), "")}


def _job_body(config: FiretitanProvisioningConfig) -> dict[str, Any]:
    extra = dict(config.extra_values or {})
    if config.snapshot_dtype is not None:
        extra["snapshot_dtype"] = config.snapshot_dtype
    return {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "useReservation": True,
        "trainingConfig": {
            "baseModel": config.base_model,
            "loraRank": config.lora_rank,
            "learningRate": config.learning_rate,
            **_present(
                maxContextLength=None if config.training_shape_id else config.max_context_length,
                customImageTag=config.custom_image_tag,
                region=config.region,
                extraArgs=list(config.extra_args),
                extraValues=extra or None,
            ),
        },
        **_present(
            trainerReplicaCount=config.trainer_replica_count,
            displayName=config.display_name,
            purpose=config.purpose,
            managedBy=config.managed_by,
            preemptible=config.preemptible,
            inactivityTimeout=config.inactivity_timeout,
            disableInactivityCleanup=config.disable_inactivity_cleanup,
            extraValues=extra or None,
        ),
    }


async def _job_query(config: FiretitanProvisioningConfig, resources: Resources) -> dict[str, str]:
    query: dict[str, str] = {}
    if config.training_shape_id is not None:
        pinned = "/versions/" in config.training_shape_id
        name = resources.profile.name if resources.profile else config.training_shape_id
        query["trainingShape"] = config.training_shape_id if pinned else _parent(name)
    if config.skip_validations:
        query["skipValidations"] = "true"
    return query


def _deployment_body(
    config: FiretitanProvisioningConfig, resources: Resources, job: str
) -> dict[str, Any]:
    linked = resources.profile.deployment_shape if resources.profile else None
    return {
        "baseModel": config.base_model,
        "description": "Fireworks training deployment",
        "minReplicaCount": config.replica_count,
        "maxReplicaCount": config.replica_count,
        "enableHotLoad": True,
        "forTraining": True,
        "hotLoadBucketType": "FW_HOSTED",
        "hotLoadTrainerJob": job,
        **_present(
            placement={"region": config.region} if config.region else None,
            hotLoadTransitionType=config.hot_load_transition_type,
            deploymentShape=config.deployment_shape or linked,
            extraArgs=list(config.deployment_extra_args),
            extraValues=dict(config.deployment_extra_values or {}) or None,
            preemptible=config.preemptible,
        ),
    }


def _deployment_query(config: FiretitanProvisioningConfig) -> dict[str, str]:
    query: dict[str, str] = {}
    if config.disable_speculative_decoding:
        query["disableSpeculativeDecoding"] = "true"
    return query


async def abandon(plane: AsyncControlPlane, resources: Resources) -> None:
    """Delete what a call made that then failed: nobody has a handle on it."""
    if resources.deployment_created and resources.deployment_id is not None:
        await _attempt(resources, resources.deployment_id, plane.delete_deployment)
    if resources.job_created and resources.job_id is not None:
        await _attempt(resources, resources.job_id, plane.delete_job)
    resources.deployment_created = resources.job_created = False


async def _attempt(resources: Resources, name: str, step: Callable[[str], Awaitable[None]]) -> None:
    try:
        await step(name)
    except ApiError as error:
        logger.warning("%s was not cleaned up: %s", name, error)
        resources.errors.append(error)


async def clean_up(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, resources: Resources
) -> None:
    """Give back what this service made, as its policies say; errors are collected and noted."""
    if resources.deployment_created and resources.deployment_id is not None:
        if config.cleanup_deployment_on_close == "delete":
            await _attempt(resources, resources.deployment_id, plane.delete_deployment)
        elif config.cleanup_deployment_on_close == "scale_to_zero":
            await _attempt(resources, resources.deployment_id, plane.scale_to_zero)
    if resources.job_created and resources.job_id is not None and config.cleanup_trainer_on_close:
        await _attempt(resources, resources.job_id, plane.delete_job)
    resources.deployment_created = resources.job_created = False
