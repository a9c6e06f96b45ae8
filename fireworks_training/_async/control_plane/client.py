"""The control plane over HTTP: accounts, training shapes, trainer jobs, deployments.

One method an exchange, typed results, retries in the transport. Waiting and deciding is elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

from fireworks_training._async.transport import Transport
from fireworks_training.errors import (
    ApiStatusError,
    Conflict,
    InvalidArgument,
    NotFound,
    ProtocolError,
)
from fireworks_training.models import DeploymentInfo, TrainerJobInfo, TrainingProfile


class ControlPlane:
    """The resources of one account.

    Args:
        transport: the service's pool; its base URL is the control plane's.
        trainer_gateway_url: base of the trainers' data planes; None is the control plane's.
    """

    def __init__(self, transport: Transport, *, trainer_gateway_url: str | None = None) -> None:
        self._transport = transport
        self._gateway = (trainer_gateway_url or transport.base_url).rstrip("/")
        self._account: str | None = None
        self._lock = asyncio.Lock()

    async def account(self) -> str:
        """The id of the account that the key belongs to.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        async with self._lock:
            if self._account is None:
                answer = await self._transport.call(
                    "GET", "/v1/accounts?pageSize=2", what="look up the account"
                )
                names = [str(row["name"]) for row in answer.get("accounts", [])]
                if len(names) != 1:
                    raise InvalidArgument(
                        f"the API key belongs to {len(names)} accounts; exactly one is needed"
                    )
                self._account = names[0].removeprefix("accounts/")
            return self._account

    async def training_profile(self, shape: str) -> TrainingProfile:
        """A training shape, resolved to its latest validated version (or the one it names).

        Raises:
            NotFound: there is no such shape.
        """
        if "/versions/" in shape:
            row = await self._transport.call("GET", f"/v1/{shape}", what=f"look up {shape}")
        else:
            answer = await self._transport.call(
                "GET",
                f"/v1/{shape}/versions?filter=latest_validated%3Dtrue&pageSize=1",
                what=f"look up the training shape {shape}",
            )
            rows = cast(list[dict[str, Any]], answer.get("trainingShapeVersions") or [])
            if not rows:
                raise InvalidArgument(f"the training shape {shape} has no validated version")
            row = rows[0]
        snapshot = cast(Mapping[str, Any], row.get("snapshot") or {})
        return TrainingProfile(
            name=str(row.get("name", shape)),
            trainer_mode=str(snapshot.get("trainerMode") or "POLICY_TRAINER"),
            max_context_length=snapshot.get("maxSupportedContextLength"),
            deployment_shape=snapshot.get("deploymentShapeVersion") or None,
        )

    # -- trainer jobs ------------------------------------------------------------------------------

    async def create_job(
        self, job_id: str, body: Mapping[str, Any], query: Mapping[str, str]
    ) -> tuple[TrainerJobInfo, bool]:
        """Create a trainer job; the job, and whether this call made it (False: it was there)."""
        collection = await self._collection("rlorTrainerJobs")
        parameters = "&".join(f"{k}={v}" for k, v in {**query, "rlorTrainerJobId": job_id}.items())
        try:
            row = await self._transport.call(
                "POST",
                f"{collection}?{parameters}",
                what=f"create the trainer job {job_id}",
                json=body,
                timeout=60.0,
            )
        except Conflict:
            existing = await self.get_job(job_id)
            if existing is None:
                raise
            return existing, False
        return _job(row), True

    async def get_job(self, job_id: str) -> TrainerJobInfo | None:
        """A trainer job; None if there is none of that id."""
        row = await self._get(f"{await self._collection('rlorTrainerJobs')}/{job_id}")
        return None if row is None else _job(row)

    async def resume_job(self, job_id: str) -> None:
        """Start a stopped trainer job again."""
        path = f"{await self._collection('rlorTrainerJobs')}/{job_id}:resume"
        await self._transport.call("POST", path, what=f"resume {job_id}", json={})

    async def delete_job(self, job_id: str) -> None:
        """Delete a trainer job; one that is gone is fine."""
        await self._delete(f"{await self._collection('rlorTrainerJobs')}/{job_id}")

    async def trainer_url(self, job_id: str) -> str:
        """Base URL of a trainer's data plane."""
        return f"{self._gateway}/training/v1/rlorTrainerJobs/{await self.account()}/{job_id}"

    async def trainer_healthy(self, job_id: str) -> bool:
        """Whether a trainer answers."""
        url = f"{await self.trainer_url(job_id)}/api/v1/healthz"
        return (await self._transport.exchange("GET", url, timeout=5.0)).status == 200

    # -- deployments -------------------------------------------------------------------------------

    async def create_deployment(
        self, deployment_id: str, body: Mapping[str, Any], query: Mapping[str, str]
    ) -> tuple[DeploymentInfo, bool]:
        """Create a deployment; it, and whether this call made it (False: it was there)."""
        collection = await self._collection("deployments")
        parameters = "&".join(
            f"{k}={v}" for k, v in {"deploymentId": deployment_id, **query}.items()
        )
        try:
            row = await self._transport.call(
                "POST",
                f"{collection}?{parameters}",
                what=f"create the deployment {deployment_id}",
                json=body,
                timeout=60.0,
            )
        except Conflict:
            existing = await self.get_deployment(deployment_id)
            if existing is None:
                raise
            return existing, False
        return _deployment(row), True

    async def get_deployment(self, deployment_id: str) -> DeploymentInfo | None:
        """A deployment; None if there is none of that id."""
        row = await self._get(f"{await self._collection('deployments')}/{deployment_id}")
        return None if row is None else _deployment(row)

    async def update_deployment(
        self, deployment_id: str, fields: Mapping[str, Any], mask: str | None
    ) -> None:
        """Change fields of a deployment."""
        path = f"{await self._collection('deployments')}/{deployment_id}"
        if mask:
            path += f"?updateMask={mask}"
        await self._transport.call(
            "PATCH", path, what=f"update the deployment {deployment_id}", json=fields, timeout=60.0
        )

    async def scale_to_zero(self, deployment_id: str) -> None:
        """Release a deployment's replicas, and keep the deployment."""
        zero = {"maxReplicaCount": 0, "minReplicaCount": 0}
        await self.update_deployment(deployment_id, zero, None)

    async def delete_deployment(self, deployment_id: str) -> None:
        """Delete a deployment; one that is gone is fine."""
        path = f"{await self._collection('deployments')}/{deployment_id}"
        await self._delete(f"{path}?ignoreChecks=true&hard=true")

    async def resource_name(self, kind: str, resource_id: str) -> str:
        """`accounts/<account>/<kind>/<id>`."""
        return f"accounts/{await self.account()}/{kind}/{resource_id}"

    async def tokenizer_files(self, model: str) -> dict[str, Any]:
        """The tokenizer of a model, where the platform serves it.

        Raises:
            NotFound: it does not.
        """
        return await self._transport.call(
            "GET", f"/v1/{model}/tokenizer", what=f"fetch the tokenizer of {model}"
        )

    # -- plumbing ----------------------------------------------------------------------------------

    async def _collection(self, kind: str) -> str:
        return f"/v1/accounts/{await self.account()}/{kind}"

    async def _get(self, path: str) -> dict[str, Any] | None:
        try:
            return await self._transport.call("GET", path, what=f"look up {path}")
        except NotFound:
            return None

    async def _delete(self, path: str) -> None:
        try:
            await self._transport.call("DELETE", path, what=f"delete {path}", timeout=60.0)
        except ApiStatusError as error:
            if error.status not in (404, 410):
                raise


def _job(row: Mapping[str, Any]) -> TrainerJobInfo:
    config = cast(Mapping[str, Any], row.get("trainingConfig") or {})
    return TrainerJobInfo(
        name=_name(row),
        state=str(row.get("state", "")),
        message=_message(row),
        max_context_length=config.get("maxContextLength"),
    )


def _deployment(row: Mapping[str, Any]) -> DeploymentInfo:
    def either(camel: str, snake: str) -> str | None:
        return row.get(camel) or row.get(snake) or None

    return DeploymentInfo(
        name=_name(row),
        state=str(row.get("state", "")),
        message=_message(row),
        base_model=either("baseModel", "base_model"),
        deployment_shape=either("deploymentShape", "deployment_shape"),
        hot_load_trainer_job=either("hotLoadTrainerJob", "hot_load_trainer_job"),
        hot_load_transition_type=either("hotLoadTransitionType", "hot_load_transition_type"),
    )


def _name(row: Mapping[str, Any]) -> str:
    name = row.get("name")
    if not isinstance(name, str) or not name:
        raise ProtocolError("the control plane described a resource without a name")
    return name


def _message(row: Mapping[str, Any]) -> str:
    status = row.get("status")
    inner = cast(Mapping[str, Any], status).get("message") if isinstance(status, Mapping) else None
    return str(row.get("statusMessage") or row.get("message") or inner or "")
