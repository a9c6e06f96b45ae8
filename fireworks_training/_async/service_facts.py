"""The part of the service client that says what it has: resources, shapes, checkpoints."""

from __future__ import annotations

from typing import Any

from fireworks_training._async.control_plane.account import PAGE_SIZE
from fireworks_training._async.resources.plans import separate_reference
from fireworks_training._async.service_core import ServiceCore
from fireworks_training._async.training.data_plane import DataPlane
from fireworks_training.errors import InvalidArgument, NotSupported
from fireworks_training.models import CheckpointInfo, ModelInfo, TrainingProfile
from fireworks_training.usage import Usage


class ServiceFacts(ServiceCore):
    """What a service has."""

    @property
    def base_url(self) -> str:
        """URL of the platform; of an embedded one once it runs."""
        return self._connection.base_url

    @property
    def trainer_job_id(self) -> str | None:
        """Id of the trainer job; None before it is provisioned."""
        return self._provisioner.resources.job_id

    @property
    def deployment_id(self) -> str | None:
        """Id of the deployment; None before it is provisioned, or without one."""
        return self._provisioner.resources.deployment_id

    @property
    def training_profile(self) -> TrainingProfile | None:
        """The training shape, resolved; None before provisioning, or without a shape."""
        return self._provisioner.resources.profile

    @property
    def reference_job_id(self) -> str | None:
        """Id of the separate reference trainer; None where there is none, or it is shared."""
        reference = self._provisioner.resources.reference
        return None if reference is None else reference.job_id

    @property
    def reference_trainer_job_id(self) -> str | None:
        """The same."""
        return self.reference_job_id

    @property
    def reference_client_job_id(self) -> str | None:
        """Id of the job that the reference client runs on: its own, or the policy's."""
        shared = not separate_reference(self._config)
        return self.trainer_job_id if shared else self.reference_job_id

    @property
    def training_session_id(self) -> str | None:
        """The trainer's name for the session; None before the first training client."""
        return self._trainers.session_id

    @property
    def accelerator_type(self) -> str | None:
        """Kind of accelerator of the training shape; None where it is not known."""
        profile = self.training_profile
        return None if profile is None else profile.accelerator_type

    @property
    def accelerator_count(self) -> int | None:
        """Accelerators of a machine of the training shape; None where it is not known."""
        profile = self.training_profile
        return None if profile is None else profile.accelerator_count

    @property
    def deployment_shape(self) -> str | None:
        """Name of the deployment's shape, or None."""
        deployment = self._provisioner.resources.deployment
        return deployment.deployment_shape if deployment else self._config.deployment_shape

    @property
    def max_context_length(self) -> int | None:
        """Tokens of a sequence that the trainer takes at most; None where it does not say."""
        resources = self._provisioner.resources
        job, profile = resources.job, resources.profile
        told = [
            job.max_context_length if job else None,
            self._config.max_context_length,
            profile.max_context_length if profile else None,
        ]
        return next((length for length in told if length is not None), None)

    def requires_initial_sampler_sync(self) -> bool:
        """Whether the deployment was found, so that it may serve another run's weights until a
        snapshot of this one is loaded."""
        return self._provisioner.resources.stale

    # -- the same, by the names of the official SDK ------------------------------------------------

    @property
    def managed_trainer_job_id(self) -> str | None:
        """`trainer_job_id`."""
        return self.trainer_job_id

    @property
    def managed_deployment_id(self) -> str | None:
        """`deployment_id`."""
        return self.deployment_id

    @property
    def managed_max_context_length(self) -> int | None:
        """`max_context_length`."""
        return self.max_context_length

    @property
    def managed_deployment_shape(self) -> str | None:
        """`deployment_shape`."""
        return self.deployment_shape

    @property
    def managed_training_profile(self) -> TrainingProfile | None:
        """`training_profile`."""
        return self.training_profile

    @property
    def managed_accelerator_type(self) -> str | None:
        """`accelerator_type`."""
        return self.accelerator_type

    @property
    def managed_accelerator_count(self) -> int | None:
        """`accelerator_count`."""
        return self.accelerator_count

    @property
    def training_session_name(self) -> str | None:
        """`training_session_id`: a dedicated trainer's session has no resource name of its own."""
        return self.training_session_id

    # -- checkpoints -------------------------------------------------------------------------------

    async def list_checkpoints(
        self, job_id: str | None = None, page_size: int = PAGE_SIZE
    ) -> list[CheckpointInfo]:
        """The saved states and snapshots of a trainer job, oldest first; provisions nothing.

        Args:
            job_id: default the service's own job, or the `trainer_job_id` it was made for.
            page_size: rows of one exchange.

        Raises:
            InvalidArgument: no job is named, and there is none yet.
            NotFound: there is no such job.
        """
        job = job_id or self.trainer_job_id or self._config.trainer_job_id
        if job is None:
            raise InvalidArgument("no trainer job yet: pass job_id=")

        async def fetch() -> list[CheckpointInfo]:
            plane = await self._connection.open()
            return await plane.list_checkpoints(job, page_size=page_size)

        return await self._on_owner(fetch, "list_checkpoints")

    async def promote_checkpoint(
        self,
        name: str,
        output_model_id: str,
        base_model: str | None = None,
        *,
        hot_load_deployment_id: str | None = None,
    ) -> ModelInfo:
        """Make a model of a checkpoint, and wait until it is one.

        Args:
            name: full name of the checkpoint, as `list_checkpoints` gives it.
            output_model_id: of the new model: 1 to 63 characters of a-z, 0-9 and '-'.
            base_model: default the service's.
            hot_load_deployment_id: a deployment whose bucket holds it, where that differs.

        Raises:
            InvalidArgument: an id that is not allowed, before anything is sent.
            ProvisioningError: the promotion failed.
        """

        async def promote() -> ModelInfo:
            plane = await self._connection.open()
            return await plane.promote_checkpoint(
                name,
                output_model_id,
                base_model or self._config.base_model,
                hot_load_deployment_id=hot_load_deployment_id,
            )

        return await self._on_owner(promote, "promote_checkpoint")

    def usage(self) -> Usage:
        """What this service has used so far: tokens trained and sampled, replica-seconds.

        Counted here, as answers come back; `Usage.cost(prices)` turns it into money. The record of
        a service that was closed stays: `fireworks-training usage RUN`.
        """
        return self._connection.usage

    async def get_server_capabilities(self) -> dict[str, Any]:
        """What the trainer says that it can do, as it says it; provisions the trainer."""

        async def ask() -> dict[str, Any]:
            resources = await self._provisioner.provisioned()
            url = await self._connection.trainer_url(resources.job_id)
            return await DataPlane(self._connection.transport, url).get(
                "get_server_capabilities", what="get_server_capabilities"
            )

        return await self._on_owner(ask, "get_server_capabilities")

    async def get_server_capabilities_async(self) -> dict[str, Any]:
        """`get_server_capabilities`."""
        return await self.get_server_capabilities()

    async def delete_training_session(self) -> None:
        """Not supported: only serverless training has sessions of its own to delete.

        Raises:
            NotSupported: always; `close()` ends a dedicated trainer's session.
        """
        raise NotSupported(
            "delete_training_session belongs to serverless training, which is not supported; "
            "close() ends the session of a dedicated trainer"
        )
