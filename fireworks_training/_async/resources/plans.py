"""Makes or finds a trainer, a deployment and a reference trainer as configured.

A deployment names the trainer job whose snapshots it loads, so it is asked for once the control
plane has that job; what both of them take to come up passes at the same time. They are waited for
in one task group: when one fails, the waits for the others end at once, the caller
deletes what was made, and the first error is raised. It knows configurations and the control plane;
`ownership` keeps track of the resources, `readiness` waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from fireworks_training._async.control_plane.bodies import (
    deployment_body,
    deployment_query,
    job_body,
    job_query,
)
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.control_plane.deployment_config import create_body, create_query
from fireworks_training._async.platform.tokenizers import LOCAL_ACCOUNT
from fireworks_training._async.resources.ownership import Claim, Role, RunResources
from fireworks_training._async.resources.readiness import deployment_ready, trainer_ready
from fireworks_training._core.lifecycle import (
    SLOWEST,
    Readiness,
    ReadinessWait,
    deployment_readiness,
    job_readiness,
)
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import (
    InvalidArgument,
    NotSupported,
    ProvisioningError,
)
from fireworks_training.models import DeploymentInfo, TrainerJobInfo, TrainingProfile
from fireworks_training.options import DeploymentConfig

logger = logging.getLogger("fireworks_training.provisioning")

SERVING = ("READY", "UPDATING")


@dataclass(slots=True)
class Resources:
    """Holds a service's resources, as far as they exist.

    Attributes:
        profile: the training shape, resolved.
        job_id, job: the trainer job; its id is chosen before it exists.
        deployment_id, deployment: the deployment; likewise.
        reference: the separate reference trainer, if there is one.
        stale: whether the deployment was found, and so may serve the weights of another run.
    """

    profile: TrainingProfile | None = None
    job_id: str | None = None
    job: TrainerJobInfo | None = None
    deployment_id: str | None = None
    deployment: DeploymentInfo | None = None
    reference: Resources | None = None
    stale: bool = False

    def max_context_length(self, configured: int | None) -> int | None:
        """Tokens of a sequence at most, by the configuration, the trainer's shape or its job; None
        where none of them says."""
        lengths = [
            configured,
            self.profile.max_context_length if self.profile else None,
            self.job.max_context_length if self.job else None,
        ]
        return next((length for length in lengths if length is not None), None)


def separate_reference(config: FiretitanProvisioningConfig) -> bool:
    """Whether a reference model needs a trainer of its own.

    It does where there is no adapter to turn off, or the caller names a shape or a job for it.
    """
    named = config.reference_training_shape_id or config.reference_trainer_job_id
    return bool(named) or (config.lora_rank == 0 and config.max_lora_rank is None)


def reference_config(config: FiretitanProvisioningConfig) -> FiretitanProvisioningConfig:
    """Configure the forward-only trainer that serves a service's reference model.

    It has neither the shape of the policy's trainer, which is one for training, nor its number of
    replicas: without a shape of its own the control plane chooses one.
    """
    return replace(
        config,
        create_deployment=False,
        deployment_id=None,
        lora_rank=0,
        lora_alpha=None,
        max_lora_rank=None,
        training_shape_id=config.reference_training_shape_id,
        trainer_replica_count=None,
        trainer_job_id=config.reference_trainer_job_id,
        reference_training_shape_id=None,
        reference_trainer_job_id=None,
        reference_required=False,
        forward_only=True,
        cleanup_trainer_on_close=config.cleanup_reference_trainer_on_close,
    )


async def provision(
    plane: AsyncControlPlane,
    config: FiretitanProvisioningConfig,
    resources: Resources,
    holdings: RunResources,
    *,
    role: Role = "trainer",
) -> None:
    """Make or find the resources that `config` describes, and wait until they are ready.

    `resources` is filled in as they come into being; `holdings` keeps track of the clean-up.
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
    wait = await _trainer(plane, config, resources, holdings, role)
    if config.wait_for_trainer_before_deployment:
        await wait()
        await _deployment(plane, config, resources, holdings)
        return
    async with asyncio.TaskGroup() as group:
        group.create_task(wait())
        group.create_task(_deployment(plane, config, resources, holdings))


# -- trainers ------------------------------------------------------------------------------------


async def _trainer(
    plane: AsyncControlPlane,
    config: FiretitanProvisioningConfig,
    resources: Resources,
    holdings: RunResources,
    role: Role,
) -> Callable[[], Coroutine[Any, Any, None]]:
    """Make or find the trainer job; gives the wait until it runs."""
    job_id = resources.job_id
    assert job_id is not None
    claim = Claim(
        role,
        job_id,
        "delete" if config.cleanup_trainer_on_close else None,
        own_id=config.trainer_job_id is None,
    )
    job = await plane.get_job(job_id) if config.trainer_job_id else None
    if job is not None and job_readiness(job.state) is Readiness.GONE:
        raise ProvisioningError(
            f"the trainer job {job_id} is {job.state}, and its id can't be used again: give "
            "another trainer_job_id, or none",
            resource=job.name,
            state=job.state,
        )
    if job is None:
        body = job_body(config, holdings.job_name(config.display_name))
        query = job_query(config, resources.profile)
        job = await holdings.create(plane, claim, lambda: plane.create_job(job_id, body, query))
    else:
        await holdings.adopt(plane, claim)
    _log_warning("trainer", job_id, job.message)
    first = job

    async def wait() -> None:
        found = claim.standing == "adopted"
        resources.job = await until_running(plane, config, job_id, first=first, resumable=found)

    return wait


async def until_running(
    plane: AsyncControlPlane,
    config: FiretitanProvisioningConfig,
    job_id: str,
    *,
    first: TrainerJobInfo | None = None,
    resumable: bool,
) -> TrainerJobInfo:
    """Wait until a trainer job runs and answers.

    Args:
        first: the job, if it was just fetched.
        resumable: whether a job that has stopped is resumed.
    """
    watch = ReadinessWait(
        f"trainer {job_id}",
        job_readiness,
        started=asyncio.get_running_loop().time(),
        budget=config.trainer_timeout_s,
        queue_budget=config.trainer_pending_timeout_s,
        resumable=resumable,
    )
    return await trainer_ready(plane, job_id, watch, first=first)


# -- deployments ---------------------------------------------------------------------------------


async def _deployment(
    plane: AsyncControlPlane,
    config: FiretitanProvisioningConfig,
    resources: Resources,
    holdings: RunResources,
) -> None:
    deployment_id = resources.deployment_id
    if deployment_id is None:
        return
    claim = Claim(
        "deployment",
        deployment_id,
        config.cleanup_deployment_on_close,
        own_id=config.deployment_id is None,
    )
    job = await plane.resource_name("rlorTrainerJobs", resources.job_id or "")
    found = await plane.get_deployment(deployment_id) if config.deployment_id else None
    if found is None or deployment_readiness(found.state) is Readiness.GONE:
        body = deployment_body(config, resources.profile, job, holdings.annotations())
        query = deployment_query(config)
        found = await holdings.create(
            plane, claim, lambda: plane.create_deployment(deployment_id, body, query)
        )
    else:
        await holdings.adopt(plane, claim)
    _log_warning("deployment", deployment_id, found.message)
    if claim.standing == "created":
        resources.deployment = await wait_for_deployment(
            plane, deployment_id, budget=config.deployment_timeout_s
        )
    else:
        resources.stale = True
        resources.deployment = await _reattach(plane, config, found, job)


async def inference_deployment(
    plane: AsyncControlPlane,
    config: DeploymentConfig,
    holdings: RunResources,
    claim: Claim,
    *,
    budget: float,
) -> DeploymentInfo:
    """Make or find a deployment that only serves, and wait until it is ready."""
    found = await plane.get_deployment(config.deployment_id)
    if found is not None and deployment_readiness(found.state) is Readiness.FAILED:
        raise ProvisioningError(
            f"the deployment {config.deployment_id} is {found.state}: delete it, or give another "
            "deployment_id",
            resource=found.name,
            state=found.state,
        )
    if found is None or deployment_readiness(found.state) is Readiness.GONE:
        annotations = {**(config.annotations or {}), **holdings.annotations()}
        body = create_body(replace(config, annotations=annotations))
        found = await holdings.create(
            plane,
            claim,
            lambda: plane.create_deployment(config.deployment_id, body, create_query(config)),
        )
    else:
        await holdings.adopt(plane, claim)
    _log_warning("deployment", config.deployment_id, found.message)
    return await wait_for_deployment(plane, config.deployment_id, budget=budget)


async def wait_for_deployment(
    plane: AsyncControlPlane,
    deployment_id: str,
    *,
    budget: float,
    settled: Callable[[DeploymentInfo], bool] | None = None,
    slowest: float = SLOWEST,
) -> DeploymentInfo:
    """Wait up to `budget` seconds until a deployment is ready, and `settled`.

    Args:
        slowest: the longest pause between two looks, in seconds.
    """
    watch = ReadinessWait(
        f"deployment {deployment_id}",
        deployment_readiness,
        started=asyncio.get_running_loop().time(),
        budget=budget,
        queue_budget=budget,
        slowest=slowest,
    )
    return await deployment_ready(plane, deployment_id, watch, settled=settled)


async def _reattach(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig, found: DeploymentInfo, job: str
) -> DeploymentInfo:
    """Point a deployment that was found to this service's trainer; change only what differs.

    It is changed when it is READY: one that is UPDATING carries out somebody's last change.
    """
    wanted, has = config.deployment_shape, found.deployment_shape
    if wanted and has and _parent(wanted) != _parent(has):
        raise InvalidArgument(
            f"the deployment {found.deployment_id} has the shape {has}, but {wanted} was asked "
            "for: give another deployment_id, or leave deployment_shape out"
        )
    serves = found.state in SERVING
    budget = config.reattach_settle_timeout_s if serves else config.deployment_timeout_s

    async def until(settled: Callable[[DeploymentInfo], bool]) -> DeploymentInfo:
        return await wait_for_deployment(
            plane,
            found.deployment_id,
            budget=budget,
            settled=settled,
            slowest=config.reattach_poll_interval_s,
        )

    if found.state != "READY":
        found = await until(lambda row: row.state == "READY")
    fields, masks = _changes(config, found, job)
    if fields:
        await plane.update_deployment(found.deployment_id, fields, ",".join(masks))
    return await until(lambda row: row.state == "READY" and not _changes(config, row, job)[0])


def _changes(
    config: FiretitanProvisioningConfig, row: DeploymentInfo, job: str
) -> tuple[dict[str, Any], list[str]]:
    """Compare a deployment with the configuration; gives the fields to change, and their mask."""
    fields: dict[str, Any] = {}
    masks: list[str] = []
    if row.hot_load_trainer_job != job:
        fields["hotLoadTrainerJob"] = job
        masks.append("hot_load_trainer_job")
    transition = config.hot_load_transition_type
    if transition is not None and transition != (row.hot_load_transition_type or "ASYNC"):
        fields["hotLoadTransitionType"] = transition
        masks.append("hot_load_transition_type")
    if row.max_replica_count == 0:  # scaled to zero
        fields |= {"minReplicaCount": config.replica_count, "maxReplicaCount": config.replica_count}
        masks += ["min_replica_count", "max_replica_count"]
    return fields, masks


def _parent(shape: str) -> str:
    return shape.split("/versions/")[0]


def _log_warning(kind: str, resource_id: str, message: str) -> None:
    if message.startswith("Warning:"):
        logger.warning("%s %s: %s", kind, resource_id, message)
