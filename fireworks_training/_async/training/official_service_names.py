"""The official SDK's names for what the service client has under shorter ones.

Needs nothing of the service but the public members that it declares. It stands in this room since
what it makes are training clients, and since the service, which inherits it, stands above.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training.errors import NotSupported
from fireworks_training.futures import APIFuture
from fireworks_training.models import TrainingProfile, WeightSyncResult
from fireworks_training.options import OnDrift


class OfficialServiceNames:
    """Members of a service client, by further names of the official SDK."""

    create_training_client: Callable[..., Awaitable[AsyncFiretitanTrainingClient]]
    get_server_capabilities: Callable[[], Awaitable[dict[str, Any]]]
    weight_sync: Callable[..., APIFuture[WeightSyncResult]]

    @property
    @abstractmethod
    def trainer_job_id(self) -> str | None: ...

    @property
    @abstractmethod
    def deployment_id(self) -> str | None: ...

    @property
    @abstractmethod
    def deployment_shape(self) -> str | None: ...

    @property
    @abstractmethod
    def max_context_length(self) -> int | None: ...

    @property
    @abstractmethod
    def training_profile(self) -> TrainingProfile | None: ...

    @property
    @abstractmethod
    def accelerator_type(self) -> str | None: ...

    @property
    @abstractmethod
    def accelerator_count(self) -> int | None: ...

    @property
    @abstractmethod
    def training_session_id(self) -> str | None: ...

    @property
    @abstractmethod
    def reference_job_id(self) -> str | None: ...

    async def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """`create_training_client` by the names of the LoRA guide; needs a service made with
        `lora_rank=` or `max_lora_rank=`."""
        return await self.create_training_client(
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            alpha,
            user_metadata,
        )

    async def create_lora_training_client_async(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """Call `create_lora_training_client`."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, alpha, user_metadata
        )

    async def weight_sync_async(
        self,
        name: str | None = None,
        *,
        training_client: AsyncFiretitanTrainingClient | None = None,
        on_drift: OnDrift | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Call `weight_sync` and return its future."""
        return self.weight_sync(name, training_client=training_client, on_drift=on_drift)

    async def get_server_capabilities_async(self) -> dict[str, Any]:
        """Call `get_server_capabilities`."""
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

    @property
    def reference_trainer_job_id(self) -> str | None:
        """`reference_job_id`."""
        return self.reference_job_id

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
