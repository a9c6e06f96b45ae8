"""`DeploymentManager`: makes deployments, waits for them, points them at a trainer, deletes them.

Knows what to ask for and what to wait for; the requests and the waits are the core's. Its hot loads
are in `hot_loads.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.control_plane.deployment_config import create_body, create_query
from fireworks_training._async.control_plane.rows import read_deployment
from fireworks_training._async.resources.readiness import deployment_ready, until_ready
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._core.lifecycle import Readiness, Seen, deployment_readiness
from fireworks_training.compat.client import (
    DEFAULT_BASE_URL,
    readiness_wait,
    refuse_account_id,
)
from fireworks_training.compat.hot_loads import HOT_LOAD_POLL_S, HotLoads
from fireworks_training.errors import ApiError
from fireworks_training.models import DeploymentInfo, Observation
from fireworks_training.options import DeploymentConfig as DeploymentConfig
from fireworks_training.options import transition

logger = logging.getLogger("fireworks_training.compat")

READY_TIMEOUT_S = 600.0
READY_POLL_S = 15.0
DELETION_TIMEOUT_S = 60.0
WARMUP_TIMEOUT_S = 30.0
_ADVICE = {Readiness.FAILED: "create it anew", Readiness.GONE: "create it anew"}


class DeploymentManager(HotLoads):
    """Deployments and their hot loads, blocking.

    Args:
        inference_url: URL that answers completions; default `base_url`.
        hotload_api_url: URL of the hot load API; default `base_url`.

    Attributes:
        boot_time_s: seconds that the last `wait_for_ready` took; None before there was one.
    """

    def __init__(
        self,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
        additional_headers: dict[str, str] | None = None,
        verify_ssl: bool | None = None,
        **kwargs: object,
    ) -> None:
        refuse_account_id(kwargs)
        super().__init__(api_key, base_url, hotload_api_url, additional_headers, verify_ssl)
        self.inference_url = (inference_url or base_url).rstrip("/")
        self._plane = AsyncControlPlane(self._transport, inference_url=self.inference_url)
        self.boot_time_s: float | None = None

    # -- making, finding, changing -----------------------------------------------------------------

    def create_or_get(
        self, config: DeploymentConfig, force_recreate: bool = False
    ) -> DeploymentInfo:
        """Create the deployment of `config.deployment_id`, or find it; does not wait.

        A deployment that failed or was deleted is replaced; with `force_recreate`, any is.
        """
        config.validate()

        async def work() -> DeploymentInfo:
            id_ = config.deployment_id
            if (found := await self._plane.get_deployment(id_)) is not None:
                ended = (Readiness.FAILED, Readiness.GONE)
                if deployment_readiness(found.state) not in ended and not force_recreate:
                    return found
                await self._plane.delete_deployment(id_)
                await self._until_gone(id_)
            created, _ = await self._plane.create_deployment(
                id_, create_body(config), create_query(config)
            )
            if created.message.startswith("Warning:"):
                logger.warning("deployment %s: %s", id_, created.message)
            return created

        return self._run(work, f"create the deployment {config.deployment_id}")

    async def _until_gone(self, deployment_id: str) -> None:
        wait = readiness_wait(
            f"the deleted deployment {deployment_id}", _gone, DELETION_TIMEOUT_S, 2.0
        )

        async def look(_: Observation[Seen], _hold_s: int) -> Observation[Seen]:
            row = await self._plane.get_deployment(deployment_id)
            return Observation(Seen(deployment_id, "DELETED" if row is None else row.state))

        await until_ready(wait, look)

    def get(self, deployment_id: str) -> DeploymentInfo | None:
        """Look up a deployment; None if there is none."""
        return self._run(lambda: self._plane.get_deployment(deployment_id), "look up")

    def update(
        self, deployment_id: str, body: dict[str, Any], update_mask: str | list[str]
    ) -> DeploymentInfo:
        """Change the fields that the mask names.

        Args:
            body: the values, by camelCase names.
            update_mask: the fields' names, in snake_case.
        """
        mask = update_mask if isinstance(update_mask, str) else ",".join(update_mask)

        async def work() -> DeploymentInfo:
            await self._plane.update_deployment(deployment_id, body, mask)
            return await self._found(deployment_id)

        return self._run(work, f"update {deployment_id}")

    def scale_to_zero(self, deployment_id: str) -> None:
        """Release the deployment's replicas and keep it; a failure is logged, not raised."""
        self._attempt(
            lambda: self._plane.scale_to_zero(deployment_id),
            f"the deployment {deployment_id} was not scaled to zero",
        )

    def delete(self, deployment_id: str) -> None:
        """Delete the deployment; a failure is logged, not raised."""
        self._attempt(
            lambda: self._plane.delete_deployment(deployment_id),
            f"the deployment {deployment_id} was not deleted",
        )

    def _attempt(self, work: Callable[[], Coroutine[Any, Any, None]], failed: str) -> None:
        try:
            self._run(work, failed)
        except ApiError as error:
            logger.warning("%s: %s", failed, error)

    async def _found(self, deployment_id: str) -> DeploymentInfo:
        path = await self._account.path("deployments", deployment_id)
        what = f"look up the deployment {deployment_id}"
        return read_deployment(await self._account.call("GET", path, what=what))

    # -- waiting -----------------------------------------------------------------------------------

    def wait_for_ready(
        self,
        deployment_id: str,
        timeout_s: float = READY_TIMEOUT_S,
        poll_interval_s: float = READY_POLL_S,
    ) -> DeploymentInfo:
        """Wait until a deployment is READY, or answers a completion while it is CREATING.

        Args:
            poll_interval_s: the longest time between two looks; the first ones come sooner.

        Raises:
            ProvisioningError: the deployment failed or was deleted.
            ProvisioningTimeout: the deployment was not ready in time.
            NotFound: there is no such deployment.
        """
        what = f"deployment {deployment_id}"

        async def work() -> DeploymentInfo:
            wait = readiness_wait(what, _ready, timeout_s, poll_interval_s, advice=_ADVICE)
            started = asyncio.get_running_loop().time()
            await self._found(deployment_id)
            found = await deployment_ready(self._plane, deployment_id, wait)
            self.boot_time_s = asyncio.get_running_loop().time() - started
            return found

        return self._run(work, f"wait for {what}")

    def reattach_trainer(
        self,
        deployment: DeploymentInfo | str,
        *,
        base_model: str,  # noqa: ARG002 - the parameter of the API; the deployment knows its model
        trainer_job_name: str,
        timeout_s: float,
        poll_interval_s: float = HOT_LOAD_POLL_S,
        hot_load_transition_type: str | None = None,
    ) -> DeploymentInfo:
        """Point a deployment at another trainer job, in one change, and wait until it is READY.

        Args:
            trainer_job_name: full name of the trainer job.
            hot_load_transition_type: changed along with the job; None keeps the present one.

        Raises:
            ProvisioningError, ProvisioningTimeout, NotFound: as in `wait_for_ready`.
        """
        id_ = deployment if isinstance(deployment, str) else deployment.deployment_id
        wanted = transition(hot_load_transition_type)

        def changes(row: DeploymentInfo) -> dict[str, str]:
            fields: dict[str, str] = {}
            if row.hot_load_trainer_job != trainer_job_name:
                fields["hotLoadTrainerJob"] = trainer_job_name
            if wanted is not None and (row.hot_load_transition_type or "ASYNC") != wanted:
                fields["hotLoadTransitionType"] = wanted
            return fields

        async def ready(settled: Callable[[DeploymentInfo], bool]) -> DeploymentInfo:
            what = f"deployment {id_}"
            wait = readiness_wait(what, _ready, timeout_s, poll_interval_s, advice=_ADVICE)
            return await deployment_ready(self._plane, id_, wait, settled=settled)

        async def work() -> DeploymentInfo:
            await self._found(id_)
            row = await ready(lambda _: True)
            fields = changes(row)
            if not fields:
                return row
            masks = {
                "hotLoadTrainerJob": "hot_load_trainer_job",
                "hotLoadTransitionType": "hot_load_transition_type",
            }
            mask = ",".join(masks[name] for name in fields)
            await self._plane.update_deployment(id_, fields, mask)
            return await ready(lambda row: not changes(row))

        return self._run(work, f"re-attach {id_}")

    def warmup(self, model: str, max_retries: int = 30, retry_interval_s: float = 10.0) -> bool:
        """Ask for a completion of four tokens until one is answered; False after `max_retries`.

        Args:
            model: `accounts/<account>/deployments/<id>`.
        """

        async def work() -> bool:
            for attempt in range(max_retries):
                if attempt:
                    await asyncio.sleep(retry_interval_s)
                if await self._account.answers(
                    self.inference_url, model, timeout_s=WARMUP_TIMEOUT_S
                ):
                    return True
            return False

        return self._run(
            lambda: log_if_slow(work(), lambda: f"{model} to answer"), f"warm up {model}"
        )


def _ready(state: str) -> Readiness:
    """Read a state; a deployment that is UPDATING serves, but with what it had before."""
    return Readiness.STARTING if state == "UPDATING" else deployment_readiness(state)


def _gone(state: str) -> Readiness:
    return Readiness.READY if state == "DELETED" else Readiness.STARTING
