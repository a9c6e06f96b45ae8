"""The service client: one trainer, one deployment, and everything that belongs to them.

It provisions at the first call that needs it, hands out the training client and samplers, brings
snapshots into the deployment, and releases at `close()` what it made. All of its I/O runs on its
owner loop, over one connection pool.

It only puts together what has a room of its own: the platform (`platform`), what is provisioned
(`resources`), the training clients of a job (`training`), the deployment and the way of new weights
into it (`weights`), samplers (`sampling`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.platform.platform import Platform
from fireworks_training._async.resources.checkpoints import ServiceCheckpoints
from fireworks_training._async.resources.plans import separate_reference
from fireworks_training._async.resources.provisioner import Provisioner
from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.sampling.concurrency import SamplingConcurrencyController
from fireworks_training._async.sampling.retry_config import retries_of, window_of
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._async.training.factory import ReferenceClients, TrainingClients
from fireworks_training._async.training.model import ModelOptions
from fireworks_training._async.training.official_service_names import OfficialServiceNames
from fireworks_training._async.weights.deployment import ServedDeployment
from fireworks_training._async.weights.publisher import WeightPublisher
from fireworks_training._outcome import mark_retrieved
from fireworks_training.config import (
    CleanUp,
    Endpoint,
    FiretitanProvisioningConfig,
    ProvisioningOptions,
    WireDialect,
    cast_options,
    resolve_endpoint,
    resolve_tinker_server,
    show_options,
)
from fireworks_training.errors import ClientClosed, InvalidArgument, NotSupported
from fireworks_training.events import OnEvent
from fireworks_training.futures import APIFuture, was_retrieved
from fireworks_training.models import TrainingProfile, WeightSyncResult
from fireworks_training.options import DeploymentConfig, OnDrift, RetryConfig, Tokenizer
from fireworks_training.usage import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

logger = logging.getLogger("fireworks_training.service")


class AsyncFiretitanServiceClient(OfficialServiceNames, ServiceCheckpoints):
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
        accept_partial: bool = False,
        on_event: OnEvent | None = None,
    ) -> None:
        self._config = config
        events = EventHook.of(on_event)
        self._owner = OwnerLoop(on_blocked=None if events is None else events.blocked)
        self._platform = Platform(
            endpoint,
            owner=self._owner,
            additional_headers=additional_headers or {},
            verify_ssl=verify_ssl,
            events=events,
        )
        self._provisioner = Provisioner(self._platform, config)
        self._deployment = ServedDeployment(self._platform, config, self._provisioner)
        self._publisher = WeightPublisher(self._owner, self._deployment, events)
        self._trainers = TrainingClients(
            self._platform,
            config,
            resources=self._provisioner.provisioned,
            revive=self._provisioner.revive,
            owner=self._owner,
            publisher=self._publisher,
            user_metadata=user_metadata or {},
            pipeline_steps=pipeline_steps,
            accept_partial=accept_partial,
        )
        self._references = ReferenceClients(config, self._trainers, self._provisioner)
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
        accept_partial: bool = False,
        on_event: OnEvent | None = None,
        **options: Unpack[ProvisioningOptions],
    ) -> Self:
        """Describe a trainer and a deployment; nothing is sent yet.

        Args:
            api_key: default `FIREWORKS_API_KEY`. An embedded platform needs none.
            base_url: default `FIREWORKS_BASE_URL`, else the Fireworks cloud. "local" embeds a
                platform with temporary state, "local:/path" one that keeps its state there.
            managed_config: the whole description as one object, instead of `options`.
            inference_url, hotload_api_url: where to sample, and to hot load; default `base_url`.
            additional_headers: sent with every request; they win over the SDK's own.
            verify_ssl: False accepts any TLS certificate.
            user_metadata: noted with the trainer session and with each model.
            project_id: not supported.
            pipeline_steps: send an `optim_step` before the results of its step are in, also to a
                server that does not enforce atomic steps: such a server may then apply a part of a
                step that failed.
            accept_partial: have every `optim_step` apply what the server holds, even where that is
                a part of a step that failed (`GradientsInDoubt`).
            on_event: a plain, quick function that is told what happens (see `Event`), on the
                service's loop; an exception in it is logged once. None: no events are made.
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
            accept_partial=accept_partial,
            on_event=on_event,
        )

    @classmethod
    def from_tinker_server(
        cls,
        base_model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        lora_rank: int | None = None,
        max_lora_rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        tokenizer_model: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        pipeline_steps: bool = False,
        dialect: WireDialect = "protobuf",
        accept_partial: bool = False,
        on_event: OnEvent | None = None,
    ) -> Self:
        """Train on a server that has the Tinker API and nothing else; nothing is sent yet.

        What is saved stays on the server. There is no job and no deployment: samplers,
        `weight_sync`, references and promotion raise `NotSupported` or `InvalidArgument`.

        Args:
            base_model: as the server names it.
            base_url, api_key: default `TINKER_BASE_URL` (without `/api/v1`) and `TINKER_API_KEY`.
            lora_rank: of the adapter; default 32, or with `max_lora_rank` each client's own.
            max_lora_rank: make a model at every `create_training_client(lora_rank=...)`, of a rank
                up to this; None makes one.
            seed: of the adapter's initialisation; None lets the server choose.
            train_mlp, train_attn, train_unembed: which layers an adapter covers.
            tokenizer_model: name or folder of the tokenizer; default `base_model`.
            additional_headers, verify_ssl, user_metadata, pipeline_steps, accept_partial,
                on_event: as for `from_firetitan_config`.
            dialect: how passes are written, "protobuf" or "json"; SkyRL's server reads JSON alone.

        Raises:
            InvalidArgument: no URL or key, or a rank below 1.
        """
        config = FiretitanProvisioningConfig.for_tinker_server(
            base_model=base_model,
            dialect=dialect,
            tokenizer_model=tokenizer_model,
            lora_rank=lora_rank,
            max_lora_rank=max_lora_rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
        )
        return cls(
            resolve_tinker_server(base_url=base_url, api_key=api_key),
            config,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            user_metadata=user_metadata,
            pipeline_steps=pipeline_steps,
            accept_partial=accept_partial,
            on_event=on_event,
        )

    # -- training clients --------------------------------------------------------------------------

    async def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        lora_alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """The training client, provisioning what it needs.

        The same one at every call; with `max_lora_rank` a new model at every call.

        Args:
            base_model, lora_rank, seed, train_mlp, train_attn, train_unembed, lora_alpha: if given,
                must be those of the service. With `max_lora_rank` they are the new model's, and
                `lora_rank` is required.
            user_metadata: noted with the model.

        Raises:
            InvalidArgument: another model than the service was made for, or a rank out of range.
            ProvisioningError: the trainer or the deployment did not come up.
        """
        options = ModelOptions(
            base_model, lora_rank, lora_alpha, seed, train_mlp, train_attn, train_unembed
        )
        return await self._on_owner(
            lambda: self._trainers.policy(options, user_metadata), "create_training_client"
        )

    async def create_training_client_from_state(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        lora_rank: int | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """A training client whose weights are those of a saved state; the optimizer starts anew.

        Args:
            path: a name, `cross_job://<job>/<name>`, or what `save_state` returned.
            user_metadata: noted with the model.
            weights_access_token: for states of others, where the server asks for one.
            lora_rank: of the state's adapter; required with `max_lora_rank`.

        Raises:
            RequestFailed: there is no such state, or it does not fit; no client is made.
            InvalidArgument: the service has its one training client already.
            ProvisioningError: the trainer or the deployment did not come up.
        """
        return await self._on_owner(
            lambda: self._trainers.from_state(
                path, user_metadata, weights_access_token, lora_rank, optimizer=False
            ),
            "create_training_client_from_state",
        )

    async def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        lora_rank: int | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """A training client that goes on where a saved state stopped: weights and optimizer.

        Args and errors as for `create_training_client_from_state`.
        """
        return await self._on_owner(
            lambda: self._trainers.from_state(
                path, user_metadata, weights_access_token, lora_rank, optimizer=True
            ),
            "create_training_client_from_state_with_optimizer",
        )

    async def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> AsyncFiretitanTrainingClient:
        """A client of the base model on the service's trainer, with the adapter off; only for LoRA.

        It computes logprobs (`forward`) and trains nothing. The same one until
        `release_references()`.

        Raises:
            InvalidArgument: another model, or a full-parameter service, whose trainer no longer
                holds the base weights: use `create_reference_client`.
        """
        return await self._on_owner(
            lambda: self._references.base(base_model, user_metadata), "create_base_training_client"
        )

    async def create_reference_client(
        self,
        base_model: str | None = None,
        *,
        lora_rank: int | None = None,
        policy_client: AsyncFiretitanTrainingClient | None = None,
        user_metadata: Mapping[str, str] | None = None,
        model_path: str | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """A client of a model that stays as it is, for KL penalties and DPO; only for `forward`.

        It is the model before training, or with `model_path` the one of a saved state, such as the
        one that fine-tuning ended with.

        A LoRA policy's reference is its own trainer with the adapter off. A full-parameter policy,
        or an explicit `reference_training_shape_id` or `reference_trainer_job_id`, gets a separate
        forward-only trainer, which the service owns: `cleanup_reference_trainer_on_close` says
        whether it is deleted at the end. The same client until `release_references()`; one whose
        separate trainer was lost is replaced, in the job started again.

        Args:
            base_model, lora_rank: if given, must be those of the service.
            policy_client: whose reference it is; required with `max_lora_rank`.
            user_metadata: noted with the model.
            model_path: a state, by a name that the policy's job saved, `cross_job://<job>/<name>`,
                or what `save_state` returned; None is the model before training. One client for
                each, beside the policy for LoRA, on the separate trainer otherwise.

        Raises:
            InvalidArgument: as said above; or `model_path` of an adapter, and a trainer of its own.
            RequestFailed: there is no such state, or it does not fit; no client is made.
            ProvisioningError: the reference trainer did not come up.
        """
        return await self._on_owner(
            lambda: self._references.client(
                base_model, lora_rank, policy_client, user_metadata, model_path
            ),
            "create_reference_client",
        )

    async def release_references(self) -> None:
        """Free the reference model now, and release a separate reference trainer by its policy.

        Raises:
            FireworksTrainingError: the first failure on the way.
        """
        await self._on_owner(self._references.release, "release_references")

    async def recover_training_client(
        self, lost: AsyncFiretitanTrainingClient | None = None
    ) -> AsyncFiretitanTrainingClient:
        """After `TrainerLost`: start the job again, and go on from the newest saved state.

        The job gets a new process; a new model in it loads, with its optimizer, the newest state
        that the lost client saved. What was done after that save is to be done again.

        Args:
            lost: the client that ended with `TrainerLost`; required with `max_lora_rank`, where
                each lost client is recovered by a call of its own, and the first of them starts
                the job again.

        Raises:
            TrainerLost: the lost client had saved no state; there is nothing to go on from.
            InvalidArgument: the trainer is not lost, or this client was recovered already.
            ProvisioningError: the job could not be started again.
        """
        return await self._on_owner(
            lambda: self._trainers.recovered(lost), "recover_training_client"
        )

    # -- samplers, and the weights they sample -----------------------------------------------------

    async def create_deployment_sampler(
        self,
        model_path: str | None = None,
        *,
        tokenizer: Tokenizer | None = None,
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
        self._trainers.check_owns("training_client", training_client)
        return await self._on_owner(
            lambda: self._deployment.of_deployment(model_path, tokenizer, concurrency_controller),
            "create_deployment_sampler",
        )

    async def create_deployment_sampler_for_model(
        self,
        model: str,
        *,
        tokenizer: Tokenizer | None = None,
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
            lambda: self._deployment.of_model(
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
        tokenizer: Tokenizer | None = None,
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
            lambda: self._deployment.of_inference(
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
        tokenizer: Tokenizer | None = None,
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
        await self._on_owner(lambda: self._deployment.load(path), "hotload_sampler_snapshot")

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
        return self._trainers.to_sync(training_client).weight_sync(name, on_drift=on_drift)

    async def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model: the platform's own where it serves one, else
        `tokenizer_model` by name."""
        return await self._on_owner(self._deployment.tokenizer, "get_tokenizer")

    # -- usage, capabilities -----------------------------------------------------------------------

    def usage(self) -> Usage:
        """What this service has used so far: tokens trained and sampled, replica-seconds.

        Counted here, as answers come back; `Usage.cost(prices)` turns it into money. The record of
        a service that was closed stays: `fireworks-training usage RUN`.
        """
        return self._platform.usage

    async def get_server_capabilities(self) -> dict[str, Any]:
        """What the trainer says that it can do, as it says it; provisions the trainer."""
        return await self._on_owner(self._trainers.server_capabilities, "get_server_capabilities")

    # -- what it has -------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """URL of the platform; of an embedded one once it runs."""
        return self._platform.base_url

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
    def reference_client_job_id(self) -> str | None:
        """Id of the job that the reference client runs on: its own, or the policy's."""
        return self.reference_job_id if separate_reference(self._config) else self.trainer_job_id

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
        return self._provisioner.resources.max_context_length(self._config.max_context_length)

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

    async def __aexit__(self, kind: object, error: object, traceback: object) -> None:
        await self._close(quiet=error is not None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else (self.trainer_job_id or "not provisioned")
        return f"<AsyncFiretitanServiceClient {self.base_url} {state}>"

    async def _close(self, *, quiet: bool) -> None:
        self._closed = True
        if self._owner.bound is None or (self._closing is not None and self._closing.done()):
            return  # nothing was ever asked of it, or everything has been released
        await self._owner.run(lambda: self._close_once(quiet), label="close")

    async def _close_once(self, quiet: bool) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._release_everything(drain=not quiet))
        error = await asyncio.shield(self._closing)
        if error is not None and not quiet and not was_retrieved(error):
            mark_retrieved(error)  # raised once: a second close is quiet
            raise error

    async def _release_everything(self, *, drain: bool) -> BaseException | None:
        """Close in order, whatever fails on the way; the error worth raising."""
        errors = list[BaseException]()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._owner.release)
            stack.push_async_callback(self._platform.close)
            stack.push_async_callback(self._provisioner.clean_up, errors)
            stack.push_async_callback(self._provisioner.record_usage)
            stack.push_async_callback(self._publisher.close)
            stack.push_async_callback(self._deployment.close)
            for clients in (self._references, self._trainers):
                if (unseen := await clients.close(drain=drain)) is not None:
                    errors.append(unseen)
            if self._platform.temporary and self._trainers.saved_a_state:
                keep = "base_url='local:/path' keeps them"
                logger.info("the saved states go away with the embedded platform; %s", keep)
        return errors[0] if errors else None

    # -- inside ------------------------------------------------------------------------------------

    async def _on_owner(self, factory: Callable[[], Coroutine[Any, Any, T]], label: str) -> T:
        if self._closed:
            raise ClientClosed.of("service")
        return await self._owner.run(factory, label=label)

    async def _on_plane(self, work: Callable[[AsyncControlPlane], Awaitable[T]], label: str) -> T:
        async def ask() -> T:
            return await work(await self._platform.open())

        return await self._on_owner(ask, label)

    @property
    def _model_and_job(self) -> tuple[str, str | None]:
        return self._config.base_model, self.trainer_job_id or self._config.trainer_job_id

    def _bind_to_portal(self) -> None:
        self._owner.use_portal()


show_options(AsyncFiretitanServiceClient)
