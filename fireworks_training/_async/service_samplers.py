"""The part of the service client that loads snapshots and makes samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fireworks_training._async.control_plane.deployment_config import DeploymentConfig
from fireworks_training._async.sampling.concurrency import SamplingConcurrencyController
from fireworks_training._async.sampling.retry_config import RetryConfig, retries_of, window_of
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
from fireworks_training._async.service_core import ServiceCore
from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._async.weights.publisher import OnDrift
from fireworks_training.config import CleanUp
from fireworks_training.errors import InvalidArgument
from fireworks_training.futures import APIFuture
from fireworks_training.models import WeightSyncResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ServiceSamplers(ServiceCore):
    """Samplers of a service, and the weights they sample."""

    async def create_deployment_sampler(
        self,
        model_path: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        training_client: AsyncFiretitanTrainingClient | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
    ) -> DeploymentSampler:
        """A sampler of the deployment, with the snapshot `model_path` live on every replica.

        All samplers of a service share its connections, and its controller unless one is given.

        Args:
            model_path: what `save_weights_for_sampler(...)` returned as `path`; None samples what
                the deployment serves.
            tokenizer: for chat templates and text; default `get_tokenizer()`.
            training_client: whose snapshot it is; must be of this service.
            concurrency_controller: bounds the requests in flight; default one
                `AdaptiveConcurrencyController` for the service.

        Raises:
            HotLoadFailed, HotLoadTimeout: the snapshot did not become live.
        """
        self._check_client("training_client", training_client)
        return await self._on_owner(
            lambda: self._samplers.of_deployment(model_path, tokenizer, concurrency_controller),
            "create_deployment_sampler",
        )

    async def create_deployment_sampler_for_model(
        self,
        model: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
        inference_url: str | None = None,
    ) -> DeploymentSampler:
        """A sampler of any model string, over the service's connections; provisions nothing.

        Args:
            model: such as `accounts/<account>/deployments/<deployment>` or
                `accounts/<account>/models/<model>`.
            tokenizer: default `get_tokenizer()`, which is the one of the service's own model.
            concurrency_controller: default one of the sampler's own.
            inference_url: where to sample; default the service's.
        """
        return await self._on_owner(
            lambda: self._samplers.of_model(
                model, tokenizer, concurrency_controller, inference_url
            ),
            "create_deployment_sampler_for_model",
        )

    async def create_inference_deployment_sampler(
        self,
        config: DeploymentConfig,
        *,
        timeout_s: float = 5400.0,
        cleanup_on_close: CleanUp | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
    ) -> DeploymentSampler:
        """A sampler of another deployment, such as a judge's or a teacher's, made if there is none.

        Args:
            config: what is to be served. Where it is the service's own model, its shape is taken
                unless one is given; so is its region.
            timeout_s: seconds for the deployment to become ready.
            cleanup_on_close: "delete" or "scale_to_zero" what this call made when the service
                closes; None keeps it. One that was found is never touched.
            tokenizer: default `get_tokenizer()`, which is the one of the service's own model.
            concurrency_controller: default one of the sampler's own.

        Raises:
            InvalidArgument: the configuration contradicts itself.
            ProvisioningError: the deployment did not come up; what this call made is deleted.
        """
        return await self._on_owner(
            lambda: self._samplers.of_inference(
                config, timeout_s, cleanup_on_close, tokenizer, concurrency_controller
            ),
            "create_inference_deployment_sampler",
        )

    async def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        training_client: AsyncFiretitanTrainingClient | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
    ) -> FiretitanSamplingClient:
        """A Tinker-shaped client, with the snapshot `model_path` live on every replica.

        Args:
            model_path: what `save_weights_for_sampler(...)` returned as `path`; None samples what
                the deployment serves.
            base_model: a model string to sample instead of the deployment.
            retry_config: tinker's. `enable_retry_logic=False` makes one attempt. Delays double
                from `retry_delay_base` to `retry_delay_max`, each shortened by up to
                `jitter_factor`; a server's Retry-After is a floor. A request is tried again for
                `progress_timeout` seconds; when no call has ended for so long, all fail. A
                `max_connections` that is not tinker's default bounds the requests in flight. What
                is retried stays the sampler's: 408, 429, 500, 502, 503, 504, and the network.
            tokenizer: default `get_tokenizer()`.
            training_client: whose snapshot it is; must be of this service.
            concurrency_controller: bounds the requests in flight; default the service's.

        Raises:
            InvalidArgument: both a snapshot and a model are named; both `max_connections` and a
                controller; `retry_config` is something else.
            NotSupported: `retry_config` has other `retryable_exceptions`, or
                `enable_stuck_detection=False`.
            HotLoadFailed, HotLoadTimeout: the snapshot did not become live.
        """
        if base_model is not None and model_path is not None:
            raise InvalidArgument("pass model_path or base_model, not both")
        retries = retries_of(retry_config)
        controller = window_of(retries, concurrency_controller) or concurrency_controller
        if base_model is not None:
            sampler = await self.create_deployment_sampler_for_model(
                base_model, tokenizer=tokenizer, concurrency_controller=controller
            )
        else:
            sampler = await self.create_deployment_sampler(
                model_path,
                tokenizer=tokenizer,
                training_client=training_client,
                concurrency_controller=controller,
            )
        return FiretitanSamplingClient(sampler, retries=retries)

    async def hotload_sampler_snapshot(self, path: str) -> None:
        """Load a snapshot into the deployment, and wait until every replica serves it.

        Raises:
            HotLoadFailed, HotLoadTimeout: it did not become live.
        """
        await self._on_owner(lambda: self._samplers.load(path), "hotload_sampler_snapshot")

    def weight_sync(
        self,
        name: str | None = None,
        *,
        training_client: AsyncFiretitanTrainingClient | None = None,
        on_drift: OnDrift | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Bring the newest weights into the deployment; returns at once.

        See `weight_sync` of the training client, which offers more.

        Args:
            training_client: whose weights; default the service's, which must have been made.

        Raises:
            InvalidArgument: no training client was made, or it is of another service.
        """
        self._check_client("training_client", training_client)
        client = training_client or self._trainers.made
        if client is None:
            raise InvalidArgument(
                "there is nothing to sync: call create_training_client() first, or name the "
                "training_client"
            )
        return client.weight_sync(name, on_drift=on_drift)

    async def weight_sync_async(
        self, name: str | None = None, *, on_drift: OnDrift | None = None
    ) -> APIFuture[WeightSyncResult]:
        """`weight_sync`, awaited for its future."""
        return self.weight_sync(name, on_drift=on_drift)

    async def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model: the platform's own where it serves one, else
        `tokenizer_model` by name."""
        return await self._on_owner(self._samplers.tokenizer, "get_tokenizer")
