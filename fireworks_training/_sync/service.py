"""The blocking twins of `fireworks_training._async.service`.

Written by `python -m fireworks_training._generate_sync`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from fireworks_training._async.gate import SamplingConcurrencyController
from fireworks_training._async.sampler import DeploymentSampler
from fireworks_training._async.service import AsyncFiretitanServiceClient
from fireworks_training._portal import Blocking
from fireworks_training._sync.trainer import FiretitanTrainingClient
from fireworks_training.config import FiretitanProvisioningConfig, ProvisioningOptions
from fireworks_training.models import TrainingProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FiretitanServiceClient(Blocking[AsyncFiretitanServiceClient]):
    """A trainer and a deployment, managed together.

    Make one with `from_firetitan_config`; use it as a context manager, or `close()` it. Lazy:
    nothing is provisioned before the first client or sampler is asked for.
    """

    @classmethod
    def from_firetitan_config(
        cls,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        managed_config: FiretitanProvisioningConfig | None = None,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        pipeline_steps: bool = False,
        **options: Unpack[ProvisioningOptions],
    ) -> Self:
        """Describe a trainer and a deployment; nothing is sent yet.

        Args:
            api_key: default `FIREWORKS_API_KEY`. An embedded platform needs none.
            base_url: default `FIREWORKS_BASE_URL`, else the Fireworks cloud. "local" embeds a
                platform with temporary state, "local:/path" one that keeps its state there.
            managed_config: the whole description as one object, instead of `options`.
            inference_url: where to sample; default `base_url`.
            hotload_api_url: where to hot load; default `base_url`.
            additional_headers: sent with every request; they win over the SDK's own.
            verify_ssl: False accepts any TLS certificate.
            user_metadata: noted with the trainer session.
            project_id: not supported.
            pipeline_steps: send an `optim_step` before the results of its step are in, also to a
                server that does not enforce atomic steps: such a server may then apply a part of a
                step that failed.
            **options: see `FiretitanProvisioningConfig`.

        Raises:
            UnknownOption, InvalidArgument, NotSupported: see `FiretitanProvisioningConfig`.
        """
        instance = AsyncFiretitanServiceClient.from_firetitan_config(
            api_key=api_key,
            base_url=base_url,
            managed_config=managed_config,
            inference_url=inference_url,
            hotload_api_url=hotload_api_url,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            user_metadata=user_metadata,
            project_id=project_id,
            pipeline_steps=pipeline_steps,
            **options,
        )
        return cls._wrap(instance)._bind()

    def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        *,
        user_metadata: Mapping[str, str] | None = None,
    ) -> FiretitanTrainingClient:
        """The training client, provisioning what it needs; the same one at every call.

        Args:
            base_model, lora_rank: if given, must be those of the service.
            user_metadata: noted with the trainer session, if this call opens it.

        Raises:
            InvalidArgument: another model or rank than the service was made for.
            ProvisioningError: the trainer or the deployment did not come up.
        """
        instance = self._run(
            self._async.create_training_client,
            base_model,
            lora_rank,
            user_metadata=user_metadata,
        )
        return FiretitanTrainingClient._wrap(instance)

    def create_deployment_sampler(
        self,
        model_path: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
    ) -> DeploymentSampler:
        """A sampler of the deployment, with the snapshot `model_path` live on every replica.

        All samplers of a service share its connections, and its controller unless one is given.

        Args:
            model_path: what `save_weights_for_sampler(...)` returned as `path`; None samples what
                the deployment serves.
            tokenizer: for chat templates and text; default `get_tokenizer()`.
            concurrency_controller: bounds the requests in flight; default one
                `AdaptiveConcurrencyController` for the service.

        Raises:
            HotLoadFailed, HotLoadTimeout: the snapshot did not become live.
        """
        return self._run(
            self._async.create_deployment_sampler,
            model_path,
            tokenizer=tokenizer,
            concurrency_controller=concurrency_controller,
        )

    def hotload_sampler_snapshot(self, path: str) -> None:
        """Load a snapshot into the deployment, and wait until every replica serves it.

        Raises:
            HotLoadFailed, HotLoadTimeout: it did not become live.
        """
        self._run(self._async.hotload_sampler_snapshot, path)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model: the platform's own where it serves one, else
        `tokenizer_model` by name."""
        return self._run(self._async.get_tokenizer)

    @property
    def base_url(self) -> str:
        """URL of the platform; of an embedded one once it runs."""
        return self._async.base_url

    @property
    def trainer_job_id(self) -> str | None:
        """Id of the trainer job; None before it is provisioned."""
        return self._async.trainer_job_id

    @property
    def deployment_id(self) -> str | None:
        """Id of the deployment; None before it is provisioned, or without one."""
        return self._async.deployment_id

    @property
    def training_profile(self) -> TrainingProfile | None:
        """The training shape, resolved; None before provisioning, or without a shape."""
        return self._async.training_profile

    @property
    def deployment_shape(self) -> str | None:
        """Name of the deployment's shape, or None."""
        return self._async.deployment_shape

    @property
    def max_context_length(self) -> int | None:
        """Tokens of a sequence that the trainer takes at most; None where it does not say."""
        return self._async.max_context_length

    def requires_initial_sampler_sync(self) -> bool:
        """Whether the deployment was found, so that it may serve another run's weights until a
        snapshot of this one is loaded."""
        return self._async.requires_initial_sampler_sync()

    def close(self) -> None:
        """Finish accepted operations, clean up as the policies say, close every connection.

        Idempotent, bounded in time, and goes on to the end when its waiter is cancelled.

        Raises:
            FireworksTrainingError: the first failure of an operation that nobody asked about, or
                else of the clean-up; after everything is closed.
        """
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
