"""The blocking twins of `fireworks_training._async.control_plane.client`.

Written by `python -m fireworks_training._generate_sync`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from fireworks_training._async.control_plane.account import PAGE_SIZE
from fireworks_training._async.control_plane.client import PROBE_TIMEOUT, AsyncControlPlane
from fireworks_training._portal import Blocking
from fireworks_training.models import (
    CheckpointInfo,
    DeploymentInfo,
    ModelInfo,
    Observation,
    OperationInfo,
    TrainerJobInfo,
    TrainingProfile,
)


class ControlPlane(Blocking[AsyncControlPlane]):
    """The resources of one account, without a service around them.

    Make one with `connect`; use it as a context manager, or `close()` it. Every call is retried
    while that may help, and raises a typed `ApiError` when it does not.
    """

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
            InvalidArgument: no key, or a URL that is none ("local" included: an embedded platform
                belongs to a service).
        """
        instance = AsyncControlPlane.connect(
            api_key=api_key,
            base_url=base_url,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
        )
        return cls._wrap(instance)._bind()

    @property
    def base_url(self) -> str:
        """URL of the platform."""
        return self._async.base_url

    def account(self) -> str:
        """The id of the account that the key belongs to.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        return self._run(self._async.account)

    def get_model(self, name: str) -> ModelInfo | None:
        """A model by its full resource name; None if there is none."""
        return self._run(self._async.get_model, name)

    def list_models(self) -> list[ModelInfo]:
        """The models of the account."""
        return self._run(self._async.list_models)

    def list_training_shapes(self) -> list[TrainingProfile]:
        """The training shapes of the account, each at its latest validated version; shapes without
        one are left out."""
        return self._run(self._async.list_training_shapes)

    def training_profile(self, shape: str) -> TrainingProfile:
        """A training shape, resolved to its latest validated version (or the one it names).

        Args:
            shape: `accounts/<account>/trainingShapes/<shape>[/versions/<version>]`; "latest" is no
                name of a version: leave it out.

        Raises:
            InvalidArgument: not such a name, or a shape without a validated version.
            NotFound: there is no such shape.
        """
        return self._run(self._async.training_profile, shape)

    def create_job(
        self, job_id: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None
    ) -> tuple[TrainerJobInfo, bool]:
        """Create a trainer job; the job, and whether this call made it (False: it was there)."""
        return self._run(self._async.create_job, job_id, body, query)

    def get_job(self, job_id: str) -> TrainerJobInfo | None:
        """A trainer job; None if there is none of that id."""
        return self._run(self._async.get_job, job_id)

    def look_at_job(
        self, job_id: str, since: Observation[TrainerJobInfo] | None = None, hold_s: int = 0
    ) -> Observation[TrainerJobInfo]:
        """A trainer job, once it is no longer as it was at an earlier look.

        Args:
            since: the earlier look; None answers at once.
            hold_s: seconds after which the answer comes anyway. A platform that can't wait answers
                at once (`Observation.held_s` is None).
        """
        return self._run(self._async.look_at_job, job_id, since, hold_s)

    def list_jobs(self) -> list[TrainerJobInfo]:
        """The trainer jobs of the account."""
        return self._run(self._async.list_jobs)

    def resume_job(self, job_id: str) -> None:
        """Start a stopped trainer job again.

        Raises:
            Conflict: it is in a state that can't be resumed.
        """
        self._run(self._async.resume_job, job_id)

    def delete_job(self, job_id: str) -> None:
        """Delete a trainer job; one that is gone is fine."""
        self._run(self._async.delete_job, job_id)

    def trainer_url(self, job_id: str) -> str:
        """Base URL of a trainer's data plane."""
        return self._run(self._async.trainer_url, job_id)

    def trainer_healthy(self, job_id: str) -> bool:
        """Whether a trainer answers."""
        return self._run(self._async.trainer_healthy, job_id)

    def create_deployment(
        self, deployment_id: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None
    ) -> tuple[DeploymentInfo, bool]:
        """Create a deployment; it, and whether this call made it (False: it was there)."""
        return self._run(self._async.create_deployment, deployment_id, body, query)

    def get_deployment(self, deployment_id: str) -> DeploymentInfo | None:
        """A deployment; None if there is none of that id."""
        return self._run(self._async.get_deployment, deployment_id)

    def look_at_deployment(
        self, deployment_id: str, since: Observation[DeploymentInfo] | None = None, hold_s: int = 0
    ) -> Observation[DeploymentInfo]:
        """A deployment, once it is no longer as it was; see `look_at_job`."""
        return self._run(self._async.look_at_deployment, deployment_id, since, hold_s)

    def deployment_answers(self, deployment_id: str, *, timeout_s: float = PROBE_TIMEOUT) -> bool:
        """Whether a deployment answers a completion of four tokens, whatever its state says."""
        return self._run(self._async.deployment_answers, deployment_id, timeout_s=timeout_s)

    def list_deployments(self) -> list[DeploymentInfo]:
        """The deployments of the account."""
        return self._run(self._async.list_deployments)

    def update_deployment(
        self, deployment_id: str, fields: Mapping[str, Any], mask: str | None = None
    ) -> None:
        """Change fields of a deployment.

        Args:
            fields: in camelCase, as the API spells them.
            mask: snake_case names of the fields to change, comma-separated; None changes those of
                `fields`.
        """
        self._run(self._async.update_deployment, deployment_id, fields, mask)

    def scale_to_zero(self, deployment_id: str) -> None:
        """Release a deployment's replicas, and keep the deployment."""
        self._run(self._async.scale_to_zero, deployment_id)

    def delete_deployment(self, deployment_id: str) -> None:
        """Delete a deployment; one that is gone is fine."""
        self._run(self._async.delete_deployment, deployment_id)

    def list_checkpoints(self, job_id: str, *, page_size: int = PAGE_SIZE) -> list[CheckpointInfo]:
        """The saved states and sampler snapshots of a trainer job, oldest first.

        Raises:
            NotFound: there is no such job; an empty list always means a job without checkpoints.
        """
        return self._run(self._async.list_checkpoints, job_id, page_size=page_size)

    def promote_checkpoint(
        self,
        name: str,
        output_model_id: str,
        base_model: str,
        *,
        trainer_job_id: str | None = None,
        hot_load_deployment_id: str | None = None,
        timeout_s: float = 7200.0,
    ) -> ModelInfo:
        """Make a model of a checkpoint, and wait until it is one.

        Args:
            name: full name of the checkpoint, as `list_checkpoints` gives it.
            output_model_id: of the new model: 1 to 63 characters of a-z, 0-9 and '-'.
            base_model: full resource name of the model that was trained.
            trainer_job_id: whose checkpoint it is; default the job in `name`.
            hot_load_deployment_id: a deployment whose bucket holds it, where that differs.
            timeout_s: seconds for the whole.

        Raises:
            InvalidArgument: an id that is not allowed, before anything is sent.
            ProvisioningError: the promotion failed.
            ProvisioningTimeout: it was not done in time; it may still be.
        """
        return self._run(
            self._async.promote_checkpoint,
            name,
            output_model_id,
            base_model,
            trainer_job_id=trainer_job_id,
            hot_load_deployment_id=hot_load_deployment_id,
            timeout_s=timeout_s,
        )

    def get_operation(self, name: str) -> OperationInfo:
        """A long-running operation by its full name."""
        return self._run(self._async.get_operation, name)

    def wait_for_operation(self, name: str, *, timeout_s: float = 7200.0) -> OperationInfo:
        """Wait until an operation has ended well.

        Raises:
            ProvisioningError: it failed.
            ProvisioningTimeout: it did not end in time.
        """
        return self._run(self._async.wait_for_operation, name, timeout_s=timeout_s)

    def resource_name(self, kind: str, resource_id: str) -> str:
        """`accounts/<account>/<kind>/<id>`."""
        return self._run(self._async.resource_name, kind, resource_id)

    def tokenizer_files(self, model: str) -> dict[str, Any]:
        """The tokenizer of a model, where the platform serves it.

        Raises:
            NotFound: it does not.
        """
        return self._run(self._async.tokenizer_files, model)

    def close(self) -> None:
        """Close the connections; idempotent. A service's own control plane closes with it."""
        self._run(self._async.close)

    def __enter__(self) -> Self:
        self._run(self._async.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._run(self._async.__aexit__, exc_type, exc, tb)
