"""`FiretitanServiceClient` with the spellings of the official SDK beside this package's own.

It is the core's service, and adds twins (`..._async`), parameters that other servers take and this
package refuses with a reason, and results in the other SDK's shape: rows are dictionaries. Each
method calls the core's of the same name and wraps its result.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._async.sampling.concurrency import SamplingConcurrencyController
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
from fireworks_training._sync import service as blocking
from fireworks_training._sync.training.client import FiretitanTrainingClient as AnyTrainingClient
from fireworks_training.compat.training import FiretitanTrainingClient
from fireworks_training.errors import InvalidArgument, NotSupported
from fireworks_training.models import CheckpointInfo, ModelInfo

if TYPE_CHECKING:
    from fireworks_training.options import RetryConfig, Tokenizer

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
Row = dict[str, Any]


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work beside the caller's loop, which users' coroutines need meanwhile."""
    return await in_thread(work, *args, **kwargs)


def _awaited(
    method: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Make the `..._async` twin of a method: the same parameters, awaited.

    For twins that the core lacks: type checkers accept no assignment as an override of a method.
    """

    async def awaited(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        bound: Callable[P, T] = getattr(self, method.__name__)  # a subclass may have its own
        return await _in_thread(bound, *args, **kwargs)

    twin = update_wrapper(awaited, method)
    twin.__name__, twin.__qualname__ = f"{method.__name__}_async", f"{method.__qualname__}_async"
    twin.__doc__ = f"Call `{method.__name__}` without blocking the caller's loop."
    return twin


class FiretitanServiceClient(blocking.FiretitanServiceClient):
    """Manages a trainer and a deployment, by the official SDK's names; `from_firetitan_config`
    makes it."""

    _made_a_model = False

    @classmethod
    def from_firetitan_config(cls, **options: Any) -> Self:
        """Describe a trainer and a deployment, as the core's `from_firetitan_config` does.

        Args:
            options: the core's arguments; None stands for the default of any of them.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return super().from_firetitan_config(**given)

    # -- training clients --------------------------------------------------------------------------

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
        projection_head_dim: int | None = None,
        lora_init_method: str | None = None,
    ) -> FiretitanTrainingClient:
        """Make the training client, as the core's `create_training_client` does.

        Args:
            projection_head_dim, lora_init_method: refused, other than the default.
        """
        _check_model(projection_head_dim, lora_init_method)
        made = super().create_training_client(
            base_model,
            lora_rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            lora_alpha,
            user_metadata,
        )
        return self._noted(made)

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
        projection_head_dim: int | None = None,
        init_method: str | None = None,
    ) -> FiretitanTrainingClient:
        """Make the training client, by the names of the LoRA guide."""
        return self.create_training_client(
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            alpha,
            user_metadata,
            projection_head_dim,
            init_method,
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
        projection_head_dim: int | None = None,
        init_method: str | None = None,
    ) -> FiretitanTrainingClient:
        """Call `create_lora_training_client` without blocking the caller's loop."""
        return await _in_thread(
            self.create_lora_training_client,
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            alpha,
            user_metadata,
            projection_head_dim,
            init_method,
        )

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """Make a client of the base model on the service's trainer, with the adapter off."""
        return self._mine(super().create_base_training_client(base_model, user_metadata))

    def create_reference_client(
        self,
        base_model: str | None = None,
        *,
        lora_rank: int | None = None,
        policy_client: AnyTrainingClient | None = None,
        user_metadata: Mapping[str, str] | None = None,
        model_path: str | None = None,
    ) -> FiretitanTrainingClient:
        """Make a client of the model before training, or of a saved state; only for `forward`."""
        made = super().create_reference_client(
            base_model,
            lora_rank=lora_rank,
            policy_client=policy_client,
            user_metadata=user_metadata,
            model_path=model_path,
        )
        return self._mine(made)

    def create_training_client_from_state(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        projection_head_dim: int | None = None,
        *,
        lora_rank: int | None = None,
    ) -> FiretitanTrainingClient:
        """Make the training client with the weights of a saved state and a fresh optimizer.

        A service's one client that was made before is loaded with the state, and given back.

        Raises:
            RequestFailed: there is no such state; the message lists the present ones, and no
                client is made.
        """
        _check_model(projection_head_dim, None)
        if (one := self._one_client(lora_rank, user_metadata)) is not None:
            one.load_state(path, weights_access_token).result()
            return one
        make = super().create_training_client_from_state
        return self._noted(make(path, user_metadata, weights_access_token, lora_rank=lora_rank))

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        projection_head_dim: int | None = None,
        *,
        lora_rank: int | None = None,
    ) -> FiretitanTrainingClient:
        """Make the training client with the weights and the optimizer of a saved state.

        Otherwise as `create_training_client_from_state`.
        """
        _check_model(projection_head_dim, None)
        if (one := self._one_client(lora_rank, user_metadata)) is not None:
            one.load_state_with_optimizer(path, weights_access_token).result()
            return one
        make = super().create_training_client_from_state_with_optimizer
        return self._noted(make(path, user_metadata, weights_access_token, lora_rank=lora_rank))

    create_training_client_from_state_async = _awaited(create_training_client_from_state)
    create_training_client_from_state_with_optimizer_async = _awaited(
        create_training_client_from_state_with_optimizer
    )

    def _one_client(
        self, lora_rank: int | None, user_metadata: Mapping[str, str] | None
    ) -> FiretitanTrainingClient | None:
        """Find the client that was made before, in a service that makes only one."""
        if not self._made_a_model:
            return None
        try:
            super().create_training_client()
        except InvalidArgument:  # with `max_lora_rank` each model is another, and needs its rank
            return None
        return self.create_training_client(lora_rank=lora_rank, user_metadata=user_metadata)

    def _noted(self, made: AnyTrainingClient) -> FiretitanTrainingClient:
        self._made_a_model = True
        return self._mine(made)

    def _mine(self, client: AnyTrainingClient) -> FiretitanTrainingClient:
        return FiretitanTrainingClient.of(client, self)

    # -- sampling clients --------------------------------------------------------------------------

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: RetryConfig | None = None,
        deployment_sampler: DeploymentSampler | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        training_client: AnyTrainingClient | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
    ) -> FiretitanSamplingClient:
        """Make a Tinker-shaped client, with the snapshot `model_path` live on every replica.

        Args:
            retry_config: tinker's; see `AsyncFiretitanServiceClient.create_sampling_client`.
            deployment_sampler: samples in the place of one that the service would make; `close()`
                of the client closes it.

        Raises:
            InvalidArgument: beside a sampler, arguments are given from which one would be made.
        """
        if deployment_sampler is not None:
            others = (
                base_model,
                retry_config,
                tokenizer,
                training_client,
                concurrency_controller,
            )
            if any(other is not None for other in others):
                raise InvalidArgument(
                    "pass deployment_sampler, or base_model, retry_config, tokenizer, "
                    "training_client and concurrency_controller, from which one is made; not both"
                )
            if model_path is not None:
                self.hotload_sampler_snapshot(model_path)
            return FiretitanSamplingClient(deployment_sampler)
        return super().create_sampling_client(
            model_path,
            base_model,
            tokenizer=tokenizer,
            training_client=training_client,
            concurrency_controller=concurrency_controller,
            retry_config=retry_config,
        )

    create_sampling_client_async = _awaited(create_sampling_client)

    # -- snapshots and checkpoints -----------------------------------------------------------------

    def hotload_sampler_snapshot(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model_path: str
    ) -> None:
        """Load a snapshot into the deployment, and wait until every replica serves it."""
        super().hotload_sampler_snapshot(model_path)

    def list_checkpoints(  # type: ignore[override]
        self, job_id: str | None = None, *, page_size: int = 200
    ) -> list[Row]:
        """List a trainer job's checkpoints, oldest first; default the job of the service."""
        return [_checkpoint(info) for info in super().list_checkpoints(job_id, page_size=page_size)]

    def promote_checkpoint(  # type: ignore[override]
        self,
        job_id: str | None = None,
        checkpoint_id: str | None = None,
        output_model_id: str | None = None,
        base_model: str | None = None,
        *,
        name: str | None = None,
        hot_load_deployment_id: str | None = None,
    ) -> Row:
        """Promote a sampler checkpoint to a model, and wait until that is done; the model's row.

        Args:
            name: full name of the checkpoint, as `list_checkpoints` gives it.
            job_id, checkpoint_id: its two ids, in place of `name`.
            output_model_id: id of the new model.
            base_model: full name of the model that was trained; default the service's.
        """
        if output_model_id is None:
            raise InvalidArgument("output_model_id is needed")
        if name is None:
            ending = f"/rlorTrainerJobs/{job_id}/checkpoints/{checkpoint_id}"
            rows = super().list_checkpoints(job_id) if job_id and checkpoint_id else []
            found = [row.name for row in rows if row.name.endswith(ending)]
            if not found:
                raise InvalidArgument("give name=, as list_checkpoints has it")
            name = found[0]
        model = super().promote_checkpoint(
            name, output_model_id, base_model, hot_load_deployment_id=hot_load_deployment_id
        )
        return _model(model)

    # -- facts -------------------------------------------------------------------------------------

    def get_server_capabilities(self) -> Any:
        """Read what the trainer can do, as `tinker.types.GetServerCapabilitiesResponse`."""
        from tinker.types import GetServerCapabilitiesResponse

        return GetServerCapabilitiesResponse.model_validate(super().get_server_capabilities())

    async def get_server_capabilities_async(self) -> Any:
        """Call `get_server_capabilities` without blocking the caller's loop."""
        return await _in_thread(self.get_server_capabilities)


def _check_model(projection_head_dim: int | None, init_method: str | None) -> None:
    if projection_head_dim:
        raise NotSupported("projection heads are not supported yet; leave projection_head_dim out")
    if init_method not in (None, "kaiming"):
        raise NotSupported(f"init_method={init_method!r}: there is 'kaiming'")


def _checkpoint(info: CheckpointInfo) -> Row:
    return {
        "name": info.name,
        "createTime": info.create_time,
        "updateTime": info.update_time,
        "checkpointType": info.checkpoint_type,
        "promotable": info.promotable,
    }


def _model(info: ModelInfo) -> Row:
    return {"name": info.name, "state": info.state, "kind": info.kind}
