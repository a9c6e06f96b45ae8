"""What a service client does with checkpoints: list, keep, delete and promote them.

Knows which job is meant, and the control plane. Nothing here provisions anything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fireworks_training._async.control_plane.account import PAGE_SIZE
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import CheckpointInfo, ModelInfo

T = TypeVar("T")


class ServiceCheckpoints:
    """Members of a service client that act on the checkpoints of its trainer job."""

    @abstractmethod
    async def _on_plane(
        self, work: Callable[[AsyncControlPlane], Awaitable[T]], label: str
    ) -> T: ...

    @property
    @abstractmethod
    def _model_and_job(self) -> tuple[str, str | None]: ...

    def _job(self, job_id: str | None) -> str:
        job = job_id or self._model_and_job[1]
        if job is None:
            raise InvalidArgument("no trainer job yet: pass job_id=")
        return job

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
        job = self._job(job_id)
        return await self._on_plane(
            lambda plane: plane.list_checkpoints(job, page_size=page_size), "list_checkpoints"
        )

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
        return await self._on_plane(
            lambda plane: plane.promote_checkpoint(
                name,
                output_model_id,
                base_model or self._model_and_job[0],
                hot_load_deployment_id=hot_load_deployment_id,
            ),
            "promote_checkpoint",
        )
