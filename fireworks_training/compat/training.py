"""`FiretitanTrainingClient` with the spellings of the official SDK beside this package's own.

It is the core's training client, and adds twins (`..._async`), parameters that other servers take
and this package refuses with a reason, and clients that are made from a client. The service of
`service.py` makes it; it knows that service only as an `OwningService`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._sync.training import client as blocking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
    from fireworks_training.options import RetryConfig

ExportPrecision = Literal["source", "bf16", "nvfp4", "mxfp8", "fp8_block128"]
DEFAULT_MERGED_BASE_EXPORT_PRECISION: ExportPrecision = "source"


class GradAccNormalization(StrEnum):
    """Names what `optim_step` divides the gradients by, as the trainer spells it."""

    NUM_LOSS_TOKENS = "num_loss_tokens"
    NUM_SEQUENCES = "num_sequences"
    NONE = "none"


class GradNormMetricsMode(StrEnum):
    """Names the gradient norms that `optim_step` reports, as the trainer spells them."""

    OFF = "off"
    BASIC = "basic"
    DETAILED = "detailed"


class OwningService(Protocol):
    """The service that made a training client, as far as the client calls it."""

    def get_tokenizer(self) -> PreTrainedTokenizerBase: ...

    def create_sampling_client(
        self, model_path: str | None = None, *, retry_config: RetryConfig | None = None
    ) -> FiretitanSamplingClient: ...

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient: ...


class FiretitanTrainingClient(blocking.FiretitanTrainingClient):
    """Trains a model, by the official SDK's names; `create_training_client` makes it."""

    _service: OwningService

    @classmethod
    def of(cls, client: blocking.FiretitanTrainingClient, service: OwningService) -> Self:
        """Give a client of the core these names; for the service that made it."""
        named = cls._wrap(client._async)
        named._service = service
        return named

    def resolve_checkpoint_path(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, checkpoint_name: str, source_job_id: str | None = None
    ) -> str:
        """Build the path by which `load_state` finds a state of this job, or of `source_job_id`."""
        return super().resolve_checkpoint_path(checkpoint_name, source_job_id)

    @property
    def run_name(self) -> str | None:
        """Name of the serverless run that made the model: None, since a trainer of its own did."""
        return None

    # -- facts, and clients made from it -----------------------------------------------------------

    def get_info(self) -> Any:
        """Read the trainer's facts of the model, as `tinker.types.GetInfoResponse`."""
        from tinker.types import GetInfoResponse

        return GetInfoResponse.model_validate(super().get_info())

    async def get_info_async(self) -> Any:
        """Call `get_info` without blocking the caller's loop."""
        return await in_thread(self.get_info)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the service's model."""
        return self._service.get_tokenizer()

    def create_sampling_client(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> FiretitanSamplingClient:
        """Make a Tinker-shaped client of the service's deployment, with a snapshot of this client
        live.

        Args:
            model_path: the `path` that `save_weights_for_sampler(...)` returned.
            retry_config: tinker's; see `AsyncFiretitanServiceClient.create_sampling_client`.
        """
        return self._service.create_sampling_client(model_path, retry_config=retry_config)

    async def create_sampling_client_async(
        self, model_path: str, retry_config: RetryConfig | None = None
    ) -> FiretitanSamplingClient:
        """Call `create_sampling_client` without blocking the caller's loop."""
        return await in_thread(self.create_sampling_client, model_path, retry_config)

    def create_base_training_client(
        self, base_model: str, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """Make a client of the base model on the same trainer, with the adapter off."""
        return self._service.create_base_training_client(base_model, user_metadata)
