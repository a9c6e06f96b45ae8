"""`TrainerJobManager`: makes trainer jobs, waits for them, resumes and deletes them.

Knows what to ask for and what to wait for; the requests and the waits are the core's. Capacity
(PENDING) and readiness have budgets of their own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.control_plane.rows import read_job
from fireworks_training._async.resources.readiness import trainer_ready, until_ready
from fireworks_training._core.lifecycle import Readiness, job_readiness
from fireworks_training.compat.client import (
    DEFAULT_BASE_URL,
    FireworksClient,
    Row,
    readiness_wait,
    refuse_account_id,
)
from fireworks_training.compat.trainer_config import TrainerJobConfig
from fireworks_training.config import resolve_endpoint
from fireworks_training.errors import (
    ApiError,
    NotFound,
    ProvisioningError,
)
from fireworks_training.models import Observation, TrainerJobInfo

logger = logging.getLogger("fireworks_training.compat")

POLL_INTERVAL_S = 5.0
READY_TIMEOUT_S = 900.0
PENDING_TIMEOUT_S = 48 * 3600.0
RECONNECT_TIMEOUT_S = 600.0
RESUMABLE_TIMEOUT_S = 120.0
_TOMBSTONES = frozenset({"JOB_STATE_DELETED", "JOB_STATE_ARCHIVED"})
_ADVICE = {
    Readiness.GONE: "its id can't be used again; create another",
    Readiness.FAILED: "reconnect_and_wait starts a job again that failed",
    Readiness.RESUMABLE: "resume_and_wait starts it again",
    Readiness.STOPPING: "resume_and_wait starts it again, once it has stopped",
}
"""The advice in an error about a job that will not become ready by waiting."""


@dataclass
class TrainerServiceEndpoint:
    """Describes a trainer that is ready.

    Attributes:
        job_name: full name of its job.
        job_id: last part of that name.
        base_url: URL of its data plane.
        max_context_length: tokens; None where the platform does not say.
    """

    job_name: str
    job_id: str
    base_url: str
    max_context_length: int | None = None


@dataclass
class CreatedTrainerJob:
    """Names a trainer job that was just created: its full name, and the last part of that."""

    job_name: str
    job_id: str


class TrainerJobManager(FireworksClient):
    """Trainer jobs, blocking; also everything that `FireworksClient` does.

    Args:
        trainer_gateway_url: base URL of the trainers' data planes; default
            `FIREWORKS_TRAINER_GATEWAY_URL`, else `base_url`.

    Attributes:
        boot_time_s: seconds that the last wait for a trainer took; None before there was one.
    """

    def __init__(
        self,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        additional_headers: dict[str, str] | None = None,
        verify_ssl: bool | None = None,
        trainer_gateway_url: str | None = None,
        **kwargs: object,
    ) -> None:
        refuse_account_id(kwargs)
        super().__init__(api_key, base_url, additional_headers, verify_ssl)
        endpoint = resolve_endpoint(base_url=self.base_url, api_key=api_key)
        gateway = trainer_gateway_url or endpoint.trainer_gateway_url or self.base_url
        self.trainer_gateway_url = gateway.rstrip("/")
        self._plane = AsyncControlPlane(
            self._transport, trainer_gateway_url=self.trainer_gateway_url
        )
        self.boot_time_s: float | None = None

    # -- making and finding ------------------------------------------------------------------------

    def create(self, config: TrainerJobConfig) -> CreatedTrainerJob:
        """Create a trainer job, or find the one of `requested_job_id`; does not wait.

        Raises:
            InvalidArgument: no server would take `config`, as `TrainerJobConfig.validate` says.
            ProvisioningError: the id belongs to a deleted job.
            ApiStatusError: the platform refused the job.
        """
        config.validate()
        job_id = config.requested_job_id or f"training-api-service-{uuid4().hex[:8]}"

        async def work() -> TrainerJobInfo:
            job, _ = await self._plane.create_job(job_id, config.body(), config.query())
            return job

        job = self._run(work, f"create {job_id}")
        if job.state in _TOMBSTONES:
            raise ProvisioningError(
                f"trainer {job.job_id} is {job.state}; {_ADVICE[Readiness.GONE]}",
                resource=job.name,
                state=job.state,
            )
        if job.message.startswith("Warning:"):
            logger.warning("trainer %s: %s", job.job_id, job.message)
        return CreatedTrainerJob(job_name=job.name, job_id=job.job_id)

    def create_and_wait(
        self,
        config: TrainerJobConfig,
        poll_interval_s: float = POLL_INTERVAL_S,
        timeout_s: float = READY_TIMEOUT_S,
        pending_timeout_s: float = PENDING_TIMEOUT_S,
    ) -> TrainerServiceEndpoint:
        """Create a trainer job (`create`), and wait for it (`wait_for_ready`)."""
        created = self.create(config)
        return self.wait_for_ready(
            created.job_id, created.job_name, poll_interval_s, timeout_s, pending_timeout_s
        )

    def try_get(self, job_id: str) -> Row | None:
        """Look up a job's row; None if there is none."""
        return self._get(f"/v1/accounts/{self.account_id}/rlorTrainerJobs/{job_id}")

    def get(self, job_id: str) -> Row:
        """Look up a job's row.

        Raises:
            NotFound: there is no such job.
        """
        path = f"/v1/accounts/{self.account_id}/rlorTrainerJobs/{job_id}"
        return self._call("GET", path, f"look up the trainer job {job_id}")

    def delete(self, job_id: str) -> None:
        """Delete a job; a failure is logged, not raised."""
        try:
            self._run(lambda: self._plane.delete_job(job_id), f"delete {job_id}")
        except ApiError as error:
            logger.warning("trainer %s was not deleted: %s", job_id, error)

    # -- waiting -----------------------------------------------------------------------------------

    def wait_for_ready(
        self,
        job_id: str,
        job_name: str | None = None,
        poll_interval_s: float = POLL_INTERVAL_S,
        timeout_s: float = READY_TIMEOUT_S,
        pending_timeout_s: float = PENDING_TIMEOUT_S,
    ) -> TrainerServiceEndpoint:
        """Wait until a trainer answers.

        Args:
            job_name: the name for the result; default the job's own.
            poll_interval_s: the longest time between two looks; the first ones come sooner.
            timeout_s: seconds from capacity to ready.
            pending_timeout_s: seconds until the job has capacity.

        Raises:
            ProvisioningError: the job failed, or was stopped or deleted.
            ProvisioningTimeout: one of the budgets ran out.
            NotFound: there is no such job.
        """
        # A job that failed ends the wait at once, also while an old state would be put up with:
        # nobody has asked here for it to be started again.
        budgets = poll_interval_s, timeout_s, pending_timeout_s
        return self._wait(job_id, _failed_for_good, *budgets, job_name=job_name)

    def wait_for_existing(
        self,
        job_id: str,
        poll_interval_s: float = POLL_INTERVAL_S,
        timeout_s: float = READY_TIMEOUT_S,
        pending_timeout_s: float = PENDING_TIMEOUT_S,
    ) -> TrainerServiceEndpoint:
        """Wait until the trainer of a job that was there before answers (`wait_for_ready`)."""
        return self.wait_for_ready(job_id, None, poll_interval_s, timeout_s, pending_timeout_s)

    def resume_and_wait(
        self,
        job_id: str,
        poll_interval_s: float = POLL_INTERVAL_S,
        timeout_s: float = READY_TIMEOUT_S,
        pending_timeout_s: float = PENDING_TIMEOUT_S,
    ) -> TrainerServiceEndpoint:
        """Start a stopped job again, and wait for it.

        Raises:
            Conflict: the job is in a state that can't be resumed.
        """
        self._run(lambda: self._plane.resume_job(job_id), f"resume {job_id}")
        return self._wait(job_id, job_readiness, poll_interval_s, timeout_s, pending_timeout_s)

    def reconnect_and_wait(
        self,
        job_id: str,
        poll_interval_s: float = POLL_INTERVAL_S,
        timeout_s: float = RECONNECT_TIMEOUT_S,
        max_wait_for_resumable_s: float = RESUMABLE_TIMEOUT_S,
        pending_timeout_s: float = PENDING_TIMEOUT_S,
    ) -> TrainerServiceEndpoint:
        """Wait for a job whose trainer runs, or start a stopped one again and wait for it.

        Args:
            max_wait_for_resumable_s: seconds for a job that is changing its state to settle.

        Raises:
            ProvisioningTimeout: the job did not settle in time.
        """
        job = self._run(
            lambda: self._settled(job_id, poll_interval_s, max_wait_for_resumable_s),
            f"reconnect {job_id}",
        )
        again = job_readiness(job.state) is Readiness.RESUMABLE
        go_on = self.resume_and_wait if again else self.wait_for_existing
        return go_on(job_id, poll_interval_s, timeout_s, pending_timeout_s)

    def _wait(
        self,
        job_id: str,
        read: Callable[[str], Readiness],
        poll_interval_s: float,
        timeout_s: float,
        pending_timeout_s: float,
        *,
        job_name: str | None = None,
    ) -> TrainerServiceEndpoint:
        async def work() -> TrainerServiceEndpoint:
            started = asyncio.get_running_loop().time()
            wait = readiness_wait(
                f"trainer {job_id}",
                read,
                timeout_s,
                poll_interval_s,
                pending_timeout_s=pending_timeout_s,
                resumed=True,
                advice=_ADVICE,
            )
            job = await self._job(job_id)
            job = await trainer_ready(self._plane, job_id, wait, first=job)
            self.boot_time_s = asyncio.get_running_loop().time() - started
            url = await self._plane.trainer_url(job_id)
            return TrainerServiceEndpoint(job_name or job.name, job_id, url, job.max_context_length)

        return self._run(work, f"wait for trainer {job_id}")

    async def _settled(self, job_id: str, poll_interval_s: float, budget: float) -> TrainerJobInfo:
        """Wait until a job can be used or resumed; its row."""
        changing = dict.fromkeys(
            (Readiness.STARTING, Readiness.QUEUED), "it can neither be used nor resumed"
        )
        wait = readiness_wait(
            f"trainer {job_id}",
            _usable_or_resumable,
            budget,
            poll_interval_s,
            advice=_ADVICE | changing,
        )

        async def look(
            since: Observation[TrainerJobInfo], hold_s: int
        ) -> Observation[TrainerJobInfo]:
            found = await self._plane.look_at_job(job_id, since, hold_s)
            return found if found.row is not None else Observation(await self._job(job_id))

        return await until_ready(wait, look)

    async def _job(self, job_id: str) -> TrainerJobInfo:
        path = await self._account.path("rlorTrainerJobs", job_id)
        what = f"look up the trainer job {job_id}"
        try:
            return read_job(await self._account.call("GET", path, what=what))
        except NotFound as error:
            raise NotFound(
                f"there is no trainer job {job_id!r} in this account: check the id, or create one",
                status=error.status,
                request_id=error.request_id,
            ) from error


def _failed_for_good(state: str) -> Readiness:
    return Readiness.FAILED if state == "JOB_STATE_FAILED" else job_readiness(state)


def _usable_or_resumable(state: str) -> Readiness:
    found = job_readiness(state)
    settled = {Readiness.RESUMABLE: Readiness.READY, Readiness.STOPPING: Readiness.STARTING}
    return settled.get(found, found)
