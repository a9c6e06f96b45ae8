"""The service client: one trainer, one deployment, and everything that belongs to them.

It provisions at the first call that needs it, hands out the training client and samplers, brings
snapshots into the deployment, and gives back at `close()` what it made. All of its I/O runs on its
owner loop, over one connection pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from fireworks_training._async.connection import Connection
from fireworks_training._async.gate import SamplingConcurrencyController
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.provisioner import Provisioner
from fireworks_training._async.sampler import DeploymentSampler
from fireworks_training._async.samplers import Samplers
from fireworks_training._async.trainer import AsyncFiretitanTrainingClient
from fireworks_training._async.trainers import Trainers
from fireworks_training.config import (
    Endpoint,
    FiretitanProvisioningConfig,
    ProvisioningOptions,
    cast_options,
    resolve_endpoint,
)
from fireworks_training.errors import ClientClosed, InvalidArgument, NotSupported
from fireworks_training.futures import mark_retrieved, was_retrieved
from fireworks_training.models import TrainingProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fireworks_training.service")

T = TypeVar("T")


class AsyncFiretitanServiceClient:
    """A trainer and a deployment, managed together.

    Make one with `from_firetitan_config`; use it as a context manager, or `close()` it. Lazy:
    nothing is provisioned before the first client or sampler is asked for.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        config: FiretitanProvisioningConfig,
        *,
        additional_headers: Mapping[str, str] | None,
        verify_ssl: bool,
        user_metadata: Mapping[str, str] | None,
        pipeline_steps: bool,
    ) -> None:
        self._config = config
        self._owner = OwnerLoop()
        self._connection = Connection(
            endpoint,
            owner=self._owner,
            additional_headers=additional_headers or {},
            verify_ssl=verify_ssl,
        )
        self._provisioner = Provisioner(self._connection, config)
        self._trainers = Trainers(
            self._connection,
            config,
            self._provisioner,
            owner=self._owner,
            user_metadata=user_metadata or {},
            pipeline_steps=pipeline_steps,
        )
        self._samplers = Samplers(self._connection, config, self._provisioner)
        self._closed = False
        self._closing: asyncio.Task[BaseException | None] | None = None

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
        if project_id is not None:
            raise NotSupported("project_id is not supported; leave it out")
        if managed_config is not None and options:
            raise InvalidArgument(
                f"give managed_config or keywords, not both: {', '.join(sorted(options))}"
            )
        config = managed_config or FiretitanProvisioningConfig.from_options(cast_options(options))
        endpoint = resolve_endpoint(
            base_url=base_url,
            api_key=api_key,
            inference_url=inference_url,
            hotload_api_url=hotload_api_url,
        )
        return cls(
            endpoint,
            config,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            user_metadata=user_metadata,
            pipeline_steps=pipeline_steps,
        )

    # -- clients -----------------------------------------------------------------------------------

    async def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        *,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """The training client, provisioning what it needs; the same one at every call.

        Args:
            base_model, lora_rank: if given, must be those of the service.
            user_metadata: noted with the trainer session, if this call opens it.

        Raises:
            InvalidArgument: another model or rank than the service was made for.
            ProvisioningError: the trainer or the deployment did not come up.
        """
        for name, value in (("base_model", base_model), ("lora_rank", lora_rank)):
            mine = getattr(self._config, name)
            if value is not None and value != mine:
                raise InvalidArgument(
                    f"{name}={value!r}, but the service was made for {mine!r}: make another "
                    "service for another model"
                )
        return await self._on_owner(
            lambda: self._trainers.policy(user_metadata), "create_training_client"
        )

    async def create_deployment_sampler(
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
        return await self._on_owner(
            lambda: self._samplers.of_deployment(model_path, tokenizer, concurrency_controller),
            "create_deployment_sampler",
        )

    async def hotload_sampler_snapshot(self, path: str) -> None:
        """Load a snapshot into the deployment, and wait until every replica serves it.

        Raises:
            HotLoadFailed, HotLoadTimeout: it did not become live.
        """
        await self._on_owner(lambda: self._samplers.load(path), "hotload_sampler_snapshot")

    async def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model: the platform's own where it serves one, else
        `tokenizer_model` by name."""
        return await self._on_owner(self._samplers.tokenizer, "get_tokenizer")

    # -- what there is -----------------------------------------------------------------------------

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

    # -- the end -----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Finish accepted operations, clean up as the policies say, close every connection.

        Idempotent, bounded in time, and goes on to the end when its waiter is cancelled.

        Raises:
            FireworksTrainingError: the first failure of an operation that nobody asked about, or
                else of the clean-up; after everything is closed.
        """
        await self._close(quiet=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self._close(quiet=exc is not None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else (self.trainer_job_id or "not provisioned")
        return f"<AsyncFiretitanServiceClient {self.base_url} {state}>"

    # -- on the owner loop -------------------------------------------------------------------------

    def _bind_to_portal(self) -> None:
        self._owner.use_portal()

    async def _on_owner(self, factory: Callable[[], Coroutine[Any, Any, T]], label: str) -> T:
        if self._closed:
            raise ClientClosed("the service was closed; make a new one")
        return await self._owner.run(factory, label=label)

    # -- closing -----------------------------------------------------------------------------------

    async def _close(self, *, quiet: bool) -> None:
        self._closed = True
        if self._owner.bound is None or (self._closing is not None and self._closing.done()):
            return  # nothing was ever asked of it, or everything has been given back
        await self._owner.run(lambda: self._close_once(quiet), label="close")

    async def _close_once(self, quiet: bool) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._give_everything_back(drain=not quiet))
        error = await asyncio.shield(self._closing)
        if error is not None and not quiet and not was_retrieved(error):
            mark_retrieved(error)  # raised once: a second close is quiet
            raise error

    async def _give_everything_back(self, *, drain: bool) -> BaseException | None:
        """Close in order, whatever fails on the way; the error worth raising."""
        errors = list[BaseException]()

        async def clean_up() -> None:
            errors.extend(await self._provisioner.clean_up())

        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._owner.release)
            stack.push_async_callback(self._connection.close)
            stack.push_async_callback(clean_up)
            unseen = await self._trainers.close(drain=drain)
            errors.extend([unseen] if unseen is not None else [])
            if self._connection.temporary and self._trainers.saved_a_state:
                logger.info(
                    "the saved states go away with the embedded platform; "
                    "base_url='local:/path' keeps them"
                )
        return errors[0] if errors else None
