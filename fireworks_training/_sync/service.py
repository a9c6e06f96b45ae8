"""The blocking twins of `fireworks_training._async.service`.

Written by `python -m fireworks_training._generate_sync`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

from fireworks_training._async.control_plane.account import PAGE_SIZE
from fireworks_training._async.sampling.concurrency import SamplingConcurrencyController
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
from fireworks_training._async.service import AsyncFiretitanServiceClient
from fireworks_training._portal import Blocking
from fireworks_training._sync.training.client import FiretitanTrainingClient
from fireworks_training.config import (
    CleanUp,
    FiretitanProvisioningConfig,
    ProvisioningOptions,
    WireDialect,
)
from fireworks_training.events import OnEvent
from fireworks_training.futures import APIFuture
from fireworks_training.models import CheckpointInfo, ModelInfo, TrainingProfile, WeightSyncResult
from fireworks_training.options import DeploymentConfig, OnDrift, RetryConfig, Tokenizer
from fireworks_training.usage import Usage

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
            accept_partial=accept_partial,
            on_event=on_event,
            **options,
        )
        return cls._wrap(instance)._bind()

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
        instance = AsyncFiretitanServiceClient.from_tinker_server(
            base_model,
            base_url=base_url,
            api_key=api_key,
            lora_rank=lora_rank,
            max_lora_rank=max_lora_rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            tokenizer_model=tokenizer_model,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            user_metadata=user_metadata,
            pipeline_steps=pipeline_steps,
            dialect=dialect,
            accept_partial=accept_partial,
            on_event=on_event,
        )
        return cls._wrap(instance)._bind()

    def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        lora_alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> FiretitanTrainingClient:
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
        instance = self._run(
            self._async.create_training_client,
            base_model,
            lora_rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            lora_alpha,
            user_metadata,
        )
        return FiretitanTrainingClient._wrap(instance)

    def create_training_client_from_state(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        lora_rank: int | None = None,
    ) -> FiretitanTrainingClient:
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
        instance = self._run(
            self._async.create_training_client_from_state,
            path,
            user_metadata,
            weights_access_token,
            lora_rank=lora_rank,
        )
        return FiretitanTrainingClient._wrap(instance)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        lora_rank: int | None = None,
    ) -> FiretitanTrainingClient:
        """A training client that goes on where a saved state stopped: weights and optimizer.

        Args and errors as for `create_training_client_from_state`.
        """
        instance = self._run(
            self._async.create_training_client_from_state_with_optimizer,
            path,
            user_metadata,
            weights_access_token,
            lora_rank=lora_rank,
        )
        return FiretitanTrainingClient._wrap(instance)

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client of the base model on the service's trainer, with the adapter off; only for LoRA.

        It computes logprobs (`forward`) and trains nothing. The same one until
        `release_references()`.

        Raises:
            InvalidArgument: another model, or a full-parameter service, whose trainer no longer
                holds the base weights: use `create_reference_client`.
        """
        instance = self._run(self._async.create_base_training_client, base_model, user_metadata)
        return FiretitanTrainingClient._wrap(instance)

    def create_reference_client(
        self,
        base_model: str | None = None,
        *,
        lora_rank: int | None = None,
        policy_client: FiretitanTrainingClient | None = None,
        user_metadata: Mapping[str, str] | None = None,
        model_path: str | None = None,
    ) -> FiretitanTrainingClient:
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
        instance = self._run(
            self._async.create_reference_client,
            base_model,
            lora_rank=lora_rank,
            policy_client=policy_client._async if policy_client else None,
            user_metadata=user_metadata,
            model_path=model_path,
        )
        return FiretitanTrainingClient._wrap(instance)

    def release_references(self) -> None:
        """Free the reference model now, and release a separate reference trainer by its policy.

        Raises:
            FireworksTrainingError: the first failure on the way.
        """
        self._run(self._async.release_references)

    def recover_training_client(
        self, lost: FiretitanTrainingClient | None = None
    ) -> FiretitanTrainingClient:
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
        instance = self._run(self._async.recover_training_client, lost._async if lost else None)
        return FiretitanTrainingClient._wrap(instance)

    def create_deployment_sampler(
        self,
        model_path: str | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        training_client: FiretitanTrainingClient | None = None,
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
        return self._run(
            self._async.create_deployment_sampler,
            model_path,
            tokenizer=tokenizer,
            training_client=training_client._async if training_client else None,
            concurrency_controller=concurrency_controller,
        )

    def create_deployment_sampler_for_model(
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
        return self._run(
            self._async.create_deployment_sampler_for_model,
            model,
            tokenizer=tokenizer,
            concurrency_controller=concurrency_controller,
            inference_url=inference_url,
        )

    def create_inference_deployment_sampler(
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
        return self._run(
            self._async.create_inference_deployment_sampler,
            config,
            timeout_s=timeout_s,
            cleanup_on_close=cleanup_on_close,
            tokenizer=tokenizer,
            concurrency_controller=concurrency_controller,
        )

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        training_client: FiretitanTrainingClient | None = None,
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
        return self._run(
            self._async.create_sampling_client,
            model_path,
            base_model,
            retry_config,
            tokenizer=tokenizer,
            training_client=training_client._async if training_client else None,
            concurrency_controller=concurrency_controller,
        )

    def hotload_sampler_snapshot(self, path: str) -> None:
        """Load a snapshot into the deployment, and wait until every replica serves it.

        Raises:
            HotLoadFailed, HotLoadTimeout: it did not become live.
        """
        self._run(self._async.hotload_sampler_snapshot, path)

    def weight_sync(
        self,
        name: str | None = None,
        *,
        training_client: FiretitanTrainingClient | None = None,
        on_drift: OnDrift | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Bring the newest weights into the deployment; returns at once.

        See `weight_sync` of the training client, which offers more.

        Args:
            training_client: whose weights; default the service's, which must have been made.

        Raises:
            InvalidArgument: no training client was made, or it is of another service.
        """
        return self._async.weight_sync(
            name,
            training_client=training_client._async if training_client else None,
            on_drift=on_drift,
        )

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model: the platform's own where it serves one, else
        `tokenizer_model` by name."""
        return self._run(self._async.get_tokenizer)

    def usage(self) -> Usage:
        """What this service has used so far: tokens trained and sampled, replica-seconds.

        Counted here, as answers come back; `Usage.cost(prices)` turns it into money. The record of
        a service that was closed stays: `fireworks-training usage RUN`.
        """
        return self._async.usage()

    def get_server_capabilities(self) -> dict[str, Any]:
        """What the trainer says that it can do, as it says it; provisions the trainer."""
        return self._run(self._async.get_server_capabilities)

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
    def reference_job_id(self) -> str | None:
        """Id of the separate reference trainer; None where there is none, or it is shared."""
        return self._async.reference_job_id

    @property
    def reference_client_job_id(self) -> str | None:
        """Id of the job that the reference client runs on: its own, or the policy's."""
        return self._async.reference_client_job_id

    @property
    def training_session_id(self) -> str | None:
        """The trainer's name for the session; None before the first training client."""
        return self._async.training_session_id

    @property
    def accelerator_type(self) -> str | None:
        """Kind of accelerator of the training shape; None where it is not known."""
        return self._async.accelerator_type

    @property
    def accelerator_count(self) -> int | None:
        """Accelerators of a machine of the training shape; None where it is not known."""
        return self._async.accelerator_count

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

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._run(self._async.__aexit__, kind, error, traceback)

    def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> FiretitanTrainingClient:
        """`create_training_client` by the names of the LoRA guide; needs a service made with
        `lora_rank=` or `max_lora_rank=`."""
        instance = self._run(
            self._async.create_lora_training_client,
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            alpha,
            user_metadata,
        )
        return FiretitanTrainingClient._wrap(instance)

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
    ) -> FiretitanTrainingClient:
        """Call `create_lora_training_client`."""
        instance = await self._hop(
            self._async.create_lora_training_client_async,
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            alpha,
            user_metadata,
        )
        return FiretitanTrainingClient._wrap(instance)

    async def weight_sync_async(
        self,
        name: str | None = None,
        *,
        training_client: FiretitanTrainingClient | None = None,
        on_drift: OnDrift | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Call `weight_sync` and return its future."""
        return await self._async.weight_sync_async(
            name,
            training_client=training_client._async if training_client else None,
            on_drift=on_drift,
        )

    async def get_server_capabilities_async(self) -> dict[str, Any]:
        """Call `get_server_capabilities`."""
        return await self._hop(self._async.get_server_capabilities_async)

    def delete_training_session(self) -> None:
        """Not supported: only serverless training has sessions of its own to delete.

        Raises:
            NotSupported: always; `close()` ends a dedicated trainer's session.
        """
        self._run(self._async.delete_training_session)

    @property
    def reference_trainer_job_id(self) -> str | None:
        """`reference_job_id`."""
        return self._async.reference_trainer_job_id

    @property
    def managed_trainer_job_id(self) -> str | None:
        """`trainer_job_id`."""
        return self._async.managed_trainer_job_id

    @property
    def managed_deployment_id(self) -> str | None:
        """`deployment_id`."""
        return self._async.managed_deployment_id

    @property
    def managed_max_context_length(self) -> int | None:
        """`max_context_length`."""
        return self._async.managed_max_context_length

    @property
    def managed_deployment_shape(self) -> str | None:
        """`deployment_shape`."""
        return self._async.managed_deployment_shape

    @property
    def managed_training_profile(self) -> TrainingProfile | None:
        """`training_profile`."""
        return self._async.managed_training_profile

    @property
    def managed_accelerator_type(self) -> str | None:
        """`accelerator_type`."""
        return self._async.managed_accelerator_type

    @property
    def managed_accelerator_count(self) -> int | None:
        """`accelerator_count`."""
        return self._async.managed_accelerator_count

    @property
    def training_session_name(self) -> str | None:
        """`training_session_id`: a dedicated trainer's session has no resource name of its own."""
        return self._async.training_session_name

    def list_checkpoints(
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
        return self._run(self._async.list_checkpoints, job_id, page_size)

    def promote_checkpoint(
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
        return self._run(
            self._async.promote_checkpoint,
            name,
            output_model_id,
            base_model,
            hot_load_deployment_id=hot_load_deployment_id,
        )

    def delete_checkpoint(self, name: str) -> None:
        """Delete a saved state or a snapshot for good; it is no error if it is gone.

        Args:
            name: its id in the service's own job (the name of a state, the `path` of a snapshot),
                or its full name, as `list_checkpoints` gives it.

        Raises:
            Conflict: a deployment serves the snapshot, or a later one is a difference to it.
            NotFound: the platform does not delete checkpoints, or there is no such job.
        """
        self._run(self._async.delete_checkpoint, name)

    def keep_checkpoints(
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
        return self._run(
            self._async.keep_checkpoints,
            last,
            keep=keep,
            kind=kind,
            job_id=job_id,
            dry_run=dry_run,
        )
