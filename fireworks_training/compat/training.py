"""`FiretitanTrainingClient` with the spellings of the official SDK beside this package's own.

The same client; what is added are twins (`..._async`), parameters that other servers take and this
package refuses with a reason, and clients that are made from a client. A service of
`compat.service` hands these out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Self

from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._sync.training import client as blocking
from fireworks_training.models import SaveSamplerResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fireworks_training._async.sampling.retry_config import RetryConfig
    from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
    from fireworks_training.compat.service import FiretitanServiceClient
    from fireworks_training.futures import APIFuture

ExportPrecision = Literal["source", "bf16", "nvfp4", "mxfp8", "fp8_block128"]
DEFAULT_MERGED_BASE_EXPORT_PRECISION: ExportPrecision = "source"


class GradAccNormalization(StrEnum):
    """By what `optim_step` divides the gradients; a text, as the trainer takes it."""

    NUM_LOSS_TOKENS = "num_loss_tokens"
    NUM_SEQUENCES = "num_sequences"
    NONE = "none"


class GradNormMetricsMode(StrEnum):
    """Which gradient norms `optim_step` reports; a text, as the trainer takes it."""

    OFF = "off"
    BASIC = "basic"
    DETAILED = "detailed"


class FiretitanTrainingClient(blocking.FiretitanTrainingClient):
    """See the module; made by a service's `create_training_client`."""

    _service: FiretitanServiceClient

    @classmethod
    def _of(cls, client: AsyncFiretitanTrainingClient, service: FiretitanServiceClient) -> Self:
        twin = cls._wrap(client)
        twin._service = service
        return twin

    # -- snapshots ---------------------------------------------------------------------------------

    async def save_weights_for_sampler_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        *,
        checkpoint_type: Any = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> APIFuture[Any]:
        """`save_weights_for_sampler`, once it has its place in the line."""
        return self.save_weights_for_sampler(
            name,
            ttl_seconds,
            checkpoint_type=checkpoint_type,
            export_precision=export_precision,
            metadata=metadata,
        )

    def save_weights_for_sampler_ext(
        self,
        name: str,
        checkpoint_type: Any = None,
        ttl_seconds: int | None = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SaveSamplerResult:
        """`save_weights_for_sampler`, waited for: the snapshot's path and name."""
        saved = self.save_weights_for_sampler(
            name,
            ttl_seconds,
            checkpoint_type=checkpoint_type,
            export_precision=export_precision,
            metadata=metadata,
        ).result()
        return SaveSamplerResult(path=saved.path, snapshot_name=saved.path)

    def resolve_checkpoint_path(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, checkpoint_name: str, source_job_id: str | None = None
    ) -> str:
        """What `load_state` takes for a state of this trainer job, or of `source_job_id`."""
        return super().resolve_checkpoint_path(checkpoint_name, source_job_id)

    # -- what it is, and clients of it -------------------------------------------------------------

    def get_info(self) -> Any:
        """What the trainer says of the model, as `tinker.types.GetInfoResponse`."""
        from tinker.types import GetInfoResponse

        return GetInfoResponse.model_validate(super().get_info())

    async def get_info_async(self) -> Any:
        """`get_info`, awaited."""
        return await asyncio.to_thread(self.get_info)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the service's model."""
        return self._service.get_tokenizer()

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> FiretitanSamplingClient:
        """A Tinker-shaped client of the service's deployment, with a snapshot of this client live.

        Args:
            model_path: what `save_weights_for_sampler(...)` returned as `path`.
            retry_config: tinker's; see `AsyncFiretitanServiceClient.create_sampling_client`.
        """
        return self._service.create_sampling_client(model_path, retry_config=retry_config)

    async def create_sampling_client_async(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> FiretitanSamplingClient:
        """`create_sampling_client`, awaited."""
        return await asyncio.to_thread(self.create_sampling_client, model_path, retry_config)

    def create_base_training_client(
        self, base_model: str, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client of the base model on the same trainer, with the adapter off."""
        return self._service.create_base_training_client(base_model, user_metadata)
