"""The control plane over HTTP: accounts, models, shapes, trainer jobs, deployments, checkpoints.

Each method makes one exchange and gives a typed result; the transport retries. Creating is safe to
repeat, since the caller chooses the id. Readiness is waited for in `resources/readiness.py`; only
promotion waits here, since its operation serves no other purpose.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlencode

from fireworks_training._async.control_plane.account import PAGE_SIZE, WRITE_TIMEOUT, Account
from fireworks_training._async.control_plane.bodies import promotion_body
from fireworks_training._async.control_plane.names import id_after, validate_output_model_id
from fireworks_training._async.control_plane.promotions import start_promotion
from fireworks_training._async.control_plane.rows import (
    CHECKPOINT_LISTS,
    Row,
    naming,
    read_checkpoint,
    read_deployment,
    read_job,
    read_list,
    read_model,
    read_name,
    read_operation,
    read_profile,
)
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._core.kept_checkpoints import to_delete
from fireworks_training._core.lifecycle import Readiness, job_readiness
from fireworks_training.config import resolve_endpoint
from fireworks_training.errors import (
    ApiStatusError,
    Conflict,
    InvalidArgument,
    ProtocolError,
    ProvisioningError,
    ProvisioningTimeout,
)
from fireworks_training.models import (
    CheckpointInfo,
    DeploymentInfo,
    ModelInfo,
    Observation,
    OperationInfo,
    TrainerJobInfo,
    TrainingProfile,
)

logger = logging.getLogger("fireworks_training.control_plane")

T = TypeVar("T")

PROBE_TIMEOUT = 10.0
FIRST_POLL, SLOWEST_POLL = 0.2, 5.0
"""Seconds between two looks at an operation: at first, and at most."""

_BEING_MADE = ("CREATING", "UPLOADING")
"""States of a model that is not there yet."""

_CHECKPOINT = re.compile(r"accounts/[^/?#]+/rlorTrainerJobs/[^/?#]+/checkpoints/[^/?#]+")
_SHAPE = re.compile(r"accounts/[^/?#]+/trainingShapes/[^/?#]+(/versions/[^/?#]+)?")


class AsyncControlPlane:
    """The resources of one account, without a service around them.

    Make one with `connect`; use it as a context manager, or `close()` it. Every call is retried
    while that may help, and raises a typed `ApiError` when it does not.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        trainer_gateway_url: str | None = None,
        inference_url: str | None = None,
    ) -> None:
        self._account = Account(transport)
        self._gateway = (trainer_gateway_url or transport.base_url).rstrip("/")
        self._inference = (inference_url or transport.base_url).rstrip("/")

    @classmethod
    def connect(
        cls,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
    ) -> Self:
        """Describe the connection; nothing is sent yet.

        Args:
            api_key: default `FIREWORKS_API_KEY`.
            base_url: default `FIREWORKS_BASE_URL`, else the Fireworks cloud.
            additional_headers: sent with every request; they win over the SDK's own.
            verify_ssl: False accepts any TLS certificate.

        Raises:
            InvalidArgument: no key, or `base_url` is not a URL ("local" included: an embedded
                platform belongs to a service).
        """
        endpoint = resolve_endpoint(base_url=base_url, api_key=api_key)
        if endpoint.embedded:
            raise InvalidArgument(
                "an embedded platform lives in its service's process: pass the base_url of a "
                "running one (fireworks-training serve), or of a cloud"
            )
        transport = Transport(
            owner=OwnerLoop(),
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "",
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
        )
        return cls(
            transport,
            trainer_gateway_url=endpoint.trainer_gateway_url,
            inference_url=endpoint.inference_url,
        )

    @property
    def base_url(self) -> str:
        """URL of the platform."""
        return self._account.transport.base_url

    async def account(self) -> str:
        """Look up the id of the account that the key belongs to, once.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        return await self._account.id()

    # -- models and shapes -------------------------------------------------------------------------

    async def get_model(self, name: str) -> ModelInfo | None:
        """Look up a model by its full resource name; None if there is none."""
        row = await self._account.get(f"/v1/{name}")
        return None if row is None else _read(read_model, row, "models")

    async def list_models(self) -> list[ModelInfo]:
        """List the models of the account."""
        return [
            _read(read_model, row, "models") for row in await self._account.rows("models", "models")
        ]

    async def list_training_shapes(self) -> list[TrainingProfile]:
        """List the training shapes of the account, each at its latest validated version; shapes
        without one are left out."""
        rows = await self._account.rows("trainingShapes", "trainingShapes")
        found = [await self._latest(_read(read_name, row, "trainingShapes")) for row in rows]
        return [profile for profile in found if profile is not None]

    async def training_profile(self, shape: str) -> TrainingProfile:
        """Resolve a training shape to its latest validated version, or to the one it names.

        Args:
            shape: `accounts/<account>/trainingShapes/<shape>[/versions/<version>]`; the version
                "latest" means the same as no version.

        Raises:
            InvalidArgument: `shape` is not such a name, or has no validated version.
            NotFound: there is no such shape.
        """
        if not _SHAPE.fullmatch(shape):
            raise InvalidArgument(
                f"training_shape_id={shape!r}: a full name is needed, "
                "accounts/<account>/trainingShapes/<shape>[/versions/<version>]"
            )
        pinned, _, version = shape.partition("/versions/")
        if version and version != "latest":
            row = await self._account.call("GET", f"/v1/{shape}", what=f"look up {shape}")
            return _read(partial(read_profile, shape=shape), row, shape)
        profile = await self._latest(pinned)
        if profile is None:
            raise InvalidArgument(f"the training shape {pinned} has no validated version")
        return profile

    async def _latest(self, shape: str) -> TrainingProfile | None:
        query = urlencode({"filter": "latest_validated=true", "pageSize": 1})
        what = f"look up the training shape {shape}"
        answer = await self._account.call("GET", f"/v1/{shape}/versions?{query}", what=what)
        rows = read_list(answer, "trainingShapeVersions", what=what)
        return _read(partial(read_profile, shape=shape), rows[0], shape) if rows else None

    # -- trainer jobs ------------------------------------------------------------------------------

    async def create_job(
        self, job_id: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None
    ) -> tuple[TrainerJobInfo, bool]:
        """Create a trainer job.

        Returns:
            The job, and whether this call made it; False if it was there.
        """
        collection = await self._account.path("rlorTrainerJobs")
        parameters = urlencode({**(query or {}), "rlorTrainerJobId": job_id}, safe="/")
        try:
            row = await self._account.call(
                "POST",
                f"{collection}?{parameters}",
                what=f"create the trainer job {job_id}",
                json=body,
                timeout=WRITE_TIMEOUT,
            )
        except Conflict:
            existing = await self.get_job(job_id)
            if existing is None:
                raise
            return existing, False
        return _read(read_job, row, "rlorTrainerJobs"), True

    async def get_job(self, job_id: str) -> TrainerJobInfo | None:
        """Look up a trainer job; None if there is none of that id."""
        row = await self._account.get(await self._account.path("rlorTrainerJobs", job_id))
        return None if row is None else _read(read_job, row, "rlorTrainerJobs")

    async def look_at_job(
        self, job_id: str, since: Observation[TrainerJobInfo] | None = None, hold_s: int = 0
    ) -> Observation[TrainerJobInfo]:
        """Look up a trainer job, answered once it differs from an earlier observation.

        Args:
            since: the earlier observation; None answers at once.
            hold_s: seconds after which the answer comes anyway. A platform that can't wait answers
                at once (`Observation.held_s` is None).
        """
        path = await self._account.path("rlorTrainerJobs", job_id)
        return await self._account.look(path, read_job, since, hold_s)

    async def list_jobs(self) -> list[TrainerJobInfo]:
        """List the trainer jobs of the account."""
        rows = await self._account.rows("rlorTrainerJobs", "rlorTrainerJobs")
        return [_read(read_job, row, "rlorTrainerJobs") for row in rows]

    async def resume_job(self, job_id: str) -> None:
        """Start a stopped trainer job again.

        Raises:
            Conflict: the job is in a state that can't be resumed.
        """
        job = await self._account.path("rlorTrainerJobs", job_id)

        async def there(_: ApiStatusError) -> Row | None:
            # The lost answer may have been a success, after which the old state lingers: whoever
            # waits for the job judges it.
            row = await self._account.get(job)
            gone = row is None or job_readiness(_read(read_job, row, job).state) is Readiness.GONE
            return None if gone else row

        await self._account.call(
            "POST", f"{job}:resume", what=f"resume {job_id}", after_retry=there
        )

    async def delete_job(self, job_id: str) -> None:
        """Delete a trainer job; it is no error if it is gone."""
        await self._account.delete(await self._account.path("rlorTrainerJobs", job_id))

    async def trainer_url(self, job_id: str) -> str:
        """Build the base URL of a trainer's data plane."""
        return f"{self._gateway}/training/v1/rlorTrainerJobs/{await self.account()}/{job_id}"

    async def trainer_healthy(self, job_id: str) -> bool:
        """Ask whether a trainer answers."""
        url = f"{await self.trainer_url(job_id)}/api/v1/healthz"

        async def ask() -> bool:
            return (await self._account.transport.exchange("GET", url, timeout=5.0)).status == 200

        return await self._account.transport.owner.run(ask, label="healthz")

    # -- deployments -------------------------------------------------------------------------------

    async def create_deployment(
        self, deployment_id: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None
    ) -> tuple[DeploymentInfo, bool]:
        """Create a deployment.

        Returns:
            The deployment, and whether this call made it; False if it was there.
        """
        collection = await self._account.path("deployments")
        parameters = urlencode({"deploymentId": deployment_id, **(query or {})}, safe="/")
        try:
            row = await self._account.call(
                "POST",
                f"{collection}?{parameters}",
                what=f"create the deployment {deployment_id}",
                json=body,
                timeout=WRITE_TIMEOUT,
            )
        except Conflict:
            existing = await self.get_deployment(deployment_id)
            if existing is None:
                raise
            return existing, False
        return _read(read_deployment, row, "deployments"), True

    async def get_deployment(self, deployment_id: str) -> DeploymentInfo | None:
        """Look up a deployment; None if there is none of that id."""
        row = await self._account.get(await self._account.path("deployments", deployment_id))
        return None if row is None else _read(read_deployment, row, "deployments")

    async def look_at_deployment(
        self, deployment_id: str, since: Observation[DeploymentInfo] | None = None, hold_s: int = 0
    ) -> Observation[DeploymentInfo]:
        """Look up a deployment, answered once it differs, as for `look_at_job`."""
        path = await self._account.path("deployments", deployment_id)
        return await self._account.look(path, read_deployment, since, hold_s)

    async def deployment_answers(
        self, deployment_id: str, *, timeout_s: float = PROBE_TIMEOUT
    ) -> bool:
        """Ask a deployment for a completion of four tokens; whether it answers, in any state."""
        model = await self.resource_name("deployments", deployment_id)
        return await self._account.answers(self._inference, model, timeout_s=timeout_s)

    async def list_deployments(self) -> list[DeploymentInfo]:
        """List the deployments of the account."""
        rows = await self._account.rows("deployments", "deployments")
        return [_read(read_deployment, row, "deployments") for row in rows]

    async def update_deployment(
        self, deployment_id: str, fields: Mapping[str, Any], mask: str | None = None
    ) -> None:
        """Change fields of a deployment.

        Args:
            fields: the new values, by the API's camelCase names.
            mask: snake_case names of the fields to change, comma-separated; None changes those of
                `fields`.
        """
        path = await self._account.path("deployments", deployment_id)
        if mask:
            path += "?" + urlencode({"updateMask": mask}, safe=",")
        await self._account.call(
            "PATCH",
            path,
            what=f"update the deployment {deployment_id}",
            json=fields,
            timeout=WRITE_TIMEOUT,
        )

    async def scale_to_zero(self, deployment_id: str) -> None:
        """Release a deployment's replicas, and keep the deployment."""
        zero = {"maxReplicaCount": 0, "minReplicaCount": 0}
        await self.update_deployment(deployment_id, zero, None)

    async def delete_deployment(self, deployment_id: str) -> None:
        """Delete a deployment; it is no error if it is gone."""
        path = await self._account.path("deployments", deployment_id)
        await self._account.delete(f"{path}?ignoreChecks=true&hard=true")

    # -- checkpoints -------------------------------------------------------------------------------

    async def list_checkpoints(
        self, job_id: str, *, page_size: int = PAGE_SIZE
    ) -> list[CheckpointInfo]:
        """List the saved states and sampler snapshots of a trainer job, oldest first.

        Raises:
            NotFound: there is no such job; an empty list always means a job without checkpoints.
        """
        rows = await self._account.rows(
            f"rlorTrainerJobs/{job_id}/checkpoints", *CHECKPOINT_LISTS, page_size=page_size
        )
        return [_read(read_checkpoint, row, "checkpoints") for row in rows]

    async def checkpoint_name(self, job_id: str, checkpoint_id: str) -> str:
        """Build a checkpoint's full name."""
        return f"{await self.resource_name('rlorTrainerJobs', job_id)}/checkpoints/{checkpoint_id}"

    async def delete_checkpoint(self, name: str) -> None:
        """Delete a checkpoint for good; it is no error if it is gone.

        Args:
            name: its full name, as `list_checkpoints` gives it.

        Raises:
            InvalidArgument: it is no such name.
            Conflict: a deployment serves the snapshot, or a later one is a difference to it.
        """
        job, checkpoint = id_after(name, "rlorTrainerJobs"), id_after(name, "checkpoints")
        if job is None or checkpoint is None or not _CHECKPOINT.fullmatch(name):
            raise InvalidArgument(
                f"name={name!r}: a checkpoint's full name is needed, "
                "accounts/<account>/rlorTrainerJobs/<job>/checkpoints/<checkpoint>"
            )
        await self._account.delete(f"/v1/{name}")

    async def keep_checkpoints(
        self,
        job_id: str,
        last: int,
        keep: Collection[str] = (),
        kinds: Collection[Literal["state", "snapshot"]] = ("state", "snapshot"),
        *,
        dry_run: bool = False,
    ) -> list[CheckpointInfo]:
        """Keep the newest checkpoints of a job, and those that are named; delete the rest.

        Args:
            last: how many of the newest of each kind are kept.
            keep: ids or full names to keep besides.
            kinds: the kinds to clean up.
            dry_run: only list what would be deleted.

        Returns:
            What was deleted, newest first; without what a deployment serves, which stays.

        Raises:
            InvalidArgument: a name to keep that the job does not have: nothing is deleted.
        """
        rows = await self.list_checkpoints(job_id)
        there = {name for row in rows for name in (row.name, row.checkpoint_id)}
        if missing := sorted(set(keep) - there):
            raise InvalidArgument(
                f"keep={missing}: the job {job_id} has no such checkpoint; nothing was deleted"
            )
        gone: list[CheckpointInfo] = []
        for row in to_delete(rows, kinds=kinds, last=last, keep=keep):
            try:
                if not dry_run:
                    await self.delete_checkpoint(row.name)
            except Conflict as error:
                logger.info("%s stays: %s", row.name, error)
                continue
            gone.append(row)
        return gone

    async def promote_checkpoint(
        self,
        name: str,
        output_model_id: str,
        base_model: str,
        *,
        trainer_job_id: str | None = None,
        hot_load_deployment_id: str | None = None,
        timeout_s: float = 7200.0,
    ) -> ModelInfo:
        """Promote a checkpoint to a model, and wait until that is done.

        Args:
            name: full name of the checkpoint, as `list_checkpoints` gives it.
            output_model_id: id of the new model: 1 to 63 characters of a-z, 0-9 and '-'.
            base_model: full resource name of the model that was trained.
            trainer_job_id: job that saved the checkpoint; default the job in `name`.
            hot_load_deployment_id: a deployment whose bucket holds the checkpoint, where the job's
                does not.
            timeout_s: seconds for the whole.

        Raises:
            InvalidArgument: an id is not allowed; nothing was sent.
            ProvisioningError: the promotion failed.
            ProvisioningTimeout: the promotion was not done in time; it may still be going on.
        """
        validate_output_model_id(output_model_id)
        body = promotion_body(
            await self.account(),
            output_model_id,
            base_model,
            trainer_job_id=await self._job_name(trainer_job_id, name),
            hot_load_deployment_id=hot_load_deployment_id,
        )
        operation, row = await start_promotion(self._account, name, body)
        if operation is not None:
            await self.wait_for_operation(operation, timeout_s=timeout_s)
        elif row.get("name"):
            return await self._made(_read(read_model, row, "models"), timeout_s)
        model = await self.get_model(body["output_model"])
        if model is None:
            raise ProtocolError(f"{name} was promoted, but {body['output_model']} is not there")
        return model

    async def _job_name(self, job: str | None, checkpoint: str) -> str | None:
        """Build the full name of a trainer job, which may be told by that, by its id, or by the
        name of its checkpoint; None if it is told by none of them."""
        if job is None:
            owner, _, _ = checkpoint.partition("/checkpoints/")
            return owner if id_after(owner, "rlorTrainerJobs") else None
        return job if "/" in job else await self.resource_name("rlorTrainerJobs", job)

    async def _made(self, model: ModelInfo, timeout_s: float) -> ModelInfo:
        """Wait until a model that is being made, by an operation of no known name, is there."""
        name, last = model.name, [model]

        async def there() -> ModelInfo:
            delay = FIRST_POLL
            while last[0].state in _BEING_MADE:
                await asyncio.sleep(delay)
                delay = min(delay * 1.5, SLOWEST_POLL)
                found = await self.get_model(name)
                if found is None:
                    raise ProvisioningError(f"{name} was not made", resource=name)
                last[0] = found
            return last[0]

        try:
            async with asyncio.timeout(timeout_s):
                return await log_if_slow(there(), lambda: f"{name} {last[0].state}")
        except TimeoutError as error:
            raise ProvisioningTimeout(
                f"{name} is {last[0].state} after {timeout_s:g} s", resource=name
            ) from error

    # -- operations --------------------------------------------------------------------------------

    async def get_operation(self, name: str) -> OperationInfo:
        """Look up a long-running operation by its full name."""
        row = await self._account.call("GET", f"/v1/{name}", what=f"look up {name}")
        return _read(read_operation, row, name)

    async def wait_for_operation(self, name: str, *, timeout_s: float = 7200.0) -> OperationInfo:
        """Wait until an operation has ended well.

        Raises:
            ProvisioningError: the operation failed.
            ProvisioningTimeout: the operation did not end in time.
        """
        last: list[OperationInfo] = []

        async def ended() -> OperationInfo:
            delay = FIRST_POLL
            while True:
                last[:] = [await self.get_operation(name)]
                if last[0].done:
                    return last[0]
                await asyncio.sleep(delay)
                delay = min(delay * 1.5, SLOWEST_POLL)

        def state() -> str:
            return f"{name} {last[0].message if last else ''}".strip()

        try:
            async with asyncio.timeout(timeout_s):
                operation = await log_if_slow(ended(), state)
        except TimeoutError as error:
            raise ProvisioningTimeout(
                f"{state()} has not ended within {timeout_s:g} s", resource=name
            ) from error
        if operation.failed:
            raise ProvisioningError(f"{name} failed: {operation.message}", resource=name)
        return operation

    # -- the rest ----------------------------------------------------------------------------------

    async def resource_name(self, kind: str, resource_id: str) -> str:
        """Build a resource's full name, `accounts/<account>/<kind>/<id>`."""
        return f"accounts/{await self.account()}/{kind}/{resource_id}"

    async def tokenizer_files(self, model: str) -> dict[str, Any]:
        """Fetch the tokenizer of a model, where the platform serves it.

        Raises:
            NotFound: the platform does not serve it.
        """
        return await self._account.call(
            "GET", f"/v1/{model}/tokenizer", what=f"fetch the tokenizer of {model}"
        )

    async def close(self) -> None:
        """Close the connections; idempotent. A service's own control plane closes with it."""
        if self._account.transport.owner.bound is not None:
            await self._account.transport.owner.run(self._account.transport.close, label="close")
            self._account.transport.owner.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncControlPlane {self.base_url}>"

    def _bind_to_portal(self) -> None:
        self._account.transport.owner.use_portal()


def _read(read: Callable[[Row], T], row: Row, route: str) -> T:
    """Read a row; a `ProtocolError` names the route that gave it."""
    with naming(route):
        return read(row)
