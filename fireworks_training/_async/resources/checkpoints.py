"""What a service client does with checkpoints: list, keep, delete and promote them.

Knows which job is meant, and the control plane. Nothing here provisions anything. Which checkpoints
may go is decided in `_core.kept_checkpoints`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection
from typing import Literal, TypeVar

from fireworks_training._async.control_plane.account import PAGE_SIZE
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._checks import integer, one_of
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import CheckpointInfo, ModelInfo

T = TypeVar("T")

KINDS: tuple[Literal["state", "snapshot"], ...] = ("state", "snapshot")


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

    async def delete_checkpoint(self, name: str) -> None:
        """Delete a saved state or a snapshot for good; it is no error if it is gone.

        Args:
            name: its id in the service's own job (the name of a state, the `path` of a snapshot),
                or its full name, as `list_checkpoints` gives it.

        Raises:
            Conflict: a deployment serves the snapshot, or a later one is a difference to it.
            NotFound: the platform does not delete checkpoints, or there is no such job.
        """
        full = name if name.startswith("accounts/") else None
        job = None if full else self._job(None)

        async def work(plane: AsyncControlPlane) -> None:
            await plane.delete_checkpoint(full or await plane.checkpoint_name(job or "", name))

        await self._on_plane(work, "delete_checkpoint")

    async def keep_checkpoints(
        self,
        last: int,
        *,
        keep: Collection[str] = (),
        kind: Literal["state", "snapshot"] | None = None,
        job_id: str | None = None,
        dry_run: bool = False,
    ) -> list[CheckpointInfo]:
        """Keep the newest checkpoints of a job, and those that are named; delete the rest.

        What a kept snapshot is a difference to stays, and so does what a deployment serves.

        Args:
            last: how many of the newest states, and of the newest snapshots, are kept; from 0.
            keep: ids or full names to keep besides, such as the best one's.
            kind: "state" or "snapshot" cleans up only those; None both.
            job_id: default the service's own job.
            dry_run: only list what would be deleted.

        Returns:
            What was deleted, newest first.

        Raises:
            InvalidArgument: a name to keep that the job does not have: nothing is deleted.
            NotFound: the platform does not delete checkpoints, or there is no such job.
        """
        integer("last", last, 0)
        if isinstance(keep, str):
            raise InvalidArgument(f"keep={keep!r}: a list of names is needed")
        one_of("kind", kind, (None, "state", "snapshot"))
        job = self._job(job_id)
        kinds: tuple[Literal["state", "snapshot"], ...] = (
            ("state", "snapshot") if kind is None else (kind,)
        )
        return await self._on_plane(
            lambda plane: plane.keep_checkpoints(job, last, keep, kinds, dry_run=dry_run),
            "keep_checkpoints",
        )
