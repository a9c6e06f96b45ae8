"""The blocking twins of `fireworks_training._async.control_plane.client`.

Written by `python -m fireworks_training._generate_sync`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Literal, Self

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
            InvalidArgument: no key, or `base_url` is not a URL ("local" included: an embedded
                platform belongs to a service).
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
        """Look up the id of the account that the key belongs to, once.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        return self._run(self._async.account)

    def get_model(self, name: str) -> ModelInfo | None:
        """Look up a model by its full resource name; None if there is none."""
        return self._run(self._async.get_model, name)

    def list_models(self) -> list[ModelInfo]:
        """List the models of the account."""
        return self._run(self._async.list_models)

    def list_training_shapes(self) -> list[TrainingProfile]:
        """List the training shapes of the account, each at its latest validated version; shapes
        without one are left out."""
        return self._run(self._async.list_training_shapes)

    def training_profile(self, shape: str) -> TrainingProfile:
        """Resolve a training shape to its latest validated version, or to the one it names.

        Args:
            shape: `accounts/<account>/trainingShapes/<shape>[/versions/<version>]`; the version
                "latest" means the same as no version.

        Raises:
            InvalidArgument: `shape` is not such a name, or has no validated version.
            NotFound: there is no such shape.
        """
        return self._run(self._async.training_profile, shape)

    def create_job(
        self, job_id: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None
    ) -> tuple[TrainerJobInfo, bool]:
        """Create a trainer job.

        Returns:
            The job, and whether this call made it; False if it was there.
        """
        return self._run(self._async.create_job, job_id, body, query)

    def get_job(self, job_id: str) -> TrainerJobInfo | None:
        """Look up a trainer job; None if there is none of that id."""
        return self._run(self._async.get_job, job_id)

    def look_at_job(
        self, job_id: str, since: Observation[TrainerJobInfo] | None = None, hold_s: int = 0
    ) -> Observation[TrainerJobInfo]:
        """Look up a trainer job, answered once it differs from an earlier observation.

        Args:
            since: the earlier observation; None answers at once.
            hold_s: seconds after which the answer comes anyway. A platform that can't wait answers
                at once (`Observation.held_s` is None).
        """
        return self._run(self._async.look_at_job, job_id, since, hold_s)

    def list_jobs(self) -> list[TrainerJobInfo]:
        """List the trainer jobs of the account."""
        return self._run(self._async.list_jobs)

    def resume_job(self, job_id: str) -> None:
        """Start a stopped trainer job again.

        Raises:
            Conflict: the job is in a state that can't be resumed.
        """
        self._run(self._async.resume_job, job_id)

    def delete_job(self, job_id: str) -> None:
        """Delete a trainer job; it is no error if it is gone."""
        self._run(self._async.delete_job, job_id)

    def trainer_url(self, job_id: str) -> str:
        """Build the base URL of a trainer's data plane."""
        return self._run(self._async.trainer_url, job_id)

    def trainer_healthy(self, job_id: str) -> bool:
        """Ask whether a trainer answers."""
        return self._run(self._async.trainer_healthy, job_id)

    def create_deployment(
        self, deployment_id: str, body: Mapping[str, Any], query: Mapping[str, str] | None = None
    ) -> tuple[DeploymentInfo, bool]:
        """Create a deployment.

        Returns:
            The deployment, and whether this call made it; False if it was there.
        """
        return self._run(self._async.create_deployment, deployment_id, body, query)

    def get_deployment(self, deployment_id: str) -> DeploymentInfo | None:
        """Look up a deployment; None if there is none of that id."""
        return self._run(self._async.get_deployment, deployment_id)

    def look_at_deployment(
        self, deployment_id: str, since: Observation[DeploymentInfo] | None = None, hold_s: int = 0
    ) -> Observation[DeploymentInfo]:
        """Look up a deployment, answered once it differs, as for `look_at_job`."""
        return self._run(self._async.look_at_deployment, deployment_id, since, hold_s)

    def deployment_answers(self, deployment_id: str, *, timeout_s: float = PROBE_TIMEOUT) -> bool:
        """Ask a deployment for a completion of four tokens; whether it answers, in any state."""
        return self._run(self._async.deployment_answers, deployment_id, timeout_s=timeout_s)

    def list_deployments(self) -> list[DeploymentInfo]:
        """List the deployments of the account."""
        return self._run(self._async.list_deployments)

    def update_deployment(
        self, deployment_id: str, fields: Mapping[str, Any], mask: str | None = None
    ) -> None:
        """Change fields of a deployment.

        Args:
            fields: the new values, by the API's camelCase names.
            mask: snake_case names of the fields to change, comma-separated; None changes those of
                `fields`.
        """
        self._run(self._async.update_deployment, deployment_id, fields, mask)

    def scale_to_zero(self, deployment_id: str) -> None:
        """Release a deployment's replicas, and keep the deployment."""
        self._run(self._async.scale_to_zero, deployment_id)

    def delete_deployment(self, deployment_id: str) -> None:
        """Delete a deployment; it is no error if it is gone."""
        self._run(self._async.delete_deployment, deployment_id)

    def list_checkpoints(self, job_id: str, *, page_size: int = PAGE_SIZE) -> list[CheckpointInfo]:
        """List the saved states and sampler snapshots of a trainer job, oldest first.

        Raises:
            NotFound: there is no such job; an empty list always means a job without checkpoints.
        """
        return self._run(self._async.list_checkpoints, job_id, page_size=page_size)

    def checkpoint_name(self, job_id: str, checkpoint_id: str) -> str:
        """Build a checkpoint's full name."""
        return self._run(self._async.checkpoint_name, job_id, checkpoint_id)

    def delete_checkpoint(self, name: str) -> None:
        """Delete a checkpoint for good; it is no error if it is gone.

        Args:
            name: its full name, as `list_checkpoints` gives it.

        Raises:
            InvalidArgument: it is no such name.
            Conflict: a deployment serves the snapshot, or a later one is a difference to it.
        """
        self._run(self._async.delete_checkpoint, name)

    def keep_checkpoints(
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
        return self._run(self._async.keep_checkpoints, job_id, last, keep, kinds, dry_run=dry_run)

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
        """Look up a long-running operation by its full name."""
        return self._run(self._async.get_operation, name)

    def wait_for_operation(self, name: str, *, timeout_s: float = 7200.0) -> OperationInfo:
        """Wait until an operation has ended well.

        Raises:
            ProvisioningError: the operation failed.
            ProvisioningTimeout: the operation did not end in time.
        """
        return self._run(self._async.wait_for_operation, name, timeout_s=timeout_s)

    def resource_name(self, kind: str, resource_id: str) -> str:
        """Build a resource's full name, `accounts/<account>/<kind>/<id>`."""
        return self._run(self._async.resource_name, kind, resource_id)

    def tokenizer_files(self, model: str) -> dict[str, Any]:
        """Fetch the tokenizer of a model, where the platform serves it.

        Raises:
            NotFound: the platform does not serve it.
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
