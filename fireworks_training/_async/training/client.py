"""The training client: one model in one trainer, and the operations on it.

Every operation takes its place in the model's line when it is called, and returns an `APIFuture`;
call order is execution order, whatever is awaited first. The way of `forward_backward(data)`:

1. Here its arguments go to `pass_operations`, which captures the datums and has `passes` and
   `encoding` write them; `queue` gives it its place in the line (the rules: `_core.operations`).
2. When its turn comes, `queue` runs it with a `context`, by which `passes` sends its chunks.
3. `requests` gives each chunk its id and completes its body (`_wire.training` makes all bytes),
   `data_plane` submits it over `http.transport` until the trainer accepts it.
4. Its result is polled there, or comes in `batch_polls`; `passes` puts the chunks together.
5. `queue` settles the future when the outcomes before it are known.

Knows which operations there are, not how they are sent. `model` is what the factory keeps of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fireworks_training._async.training import operations
from fireworks_training._async.training.arguments import check_job, check_name
from fireworks_training._async.training.model import RemoteModel
from fireworks_training._async.training.official_names import OfficialTrainingNames
from fireworks_training._async.weights.publisher import DRIFT_BOUND, WeightPublisher
from fireworks_training._wire.training import bodies
from fireworks_training.errors import FireworksTrainingError, WrongLoop
from fireworks_training.futures import APIFuture
from fireworks_training.models import SaveSamplerResult, WeightSyncResult
from fireworks_training.options import (
    CheckpointType,
    GradNorms,
    LossConfig,
    LossName,
    Normalization,
    OnDrift,
)

if TYPE_CHECKING:
    import tinker
    from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

    from fireworks_training._async.training.pass_operations import Datums, PassFuture
    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse
    from fireworks_training.options import LossFunction, Output, Pooling


class AsyncFiretitanTrainingClient(OfficialTrainingNames):
    """Trains one model. Made by `create_training_client` of a service.

    Operations may be called from any thread and any loop, and return at once. `await` an operation,
    or call `.result()` on it.

    Raises, at the call, for every operation:
        InvalidArgument, TypeError: wrong kinds of arguments; nothing takes a place in the line.
        ClientClosed: the service was closed.
        SessionLost, TrainerLost: the session has ended before.
    """

    def __init__(self, model: RemoteModel, publisher: WeightPublisher) -> None:
        # Imported here, since it loads numpy, which a service that only samples does without.
        from fireworks_training._async.training.pass_operations import PassOperations

        self._model = model
        self._queue = model.queue
        self._passes = PassOperations(model.passes)
        self._publisher = publisher
        if not model.forward_only:
            line = model.queue.line
            publisher.chain.follow(lambda: line.steps)

    # -- passes ------------------------------------------------------------------------------------

    def forward(
        self, data: Datums, loss_fn: LossName = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """Compute the logprobs of the targets, without gradients.

        Args:
            data: the datums; entry t of each loss input belongs to predicting target t from the
                input tokens up to t, so all have as many entries as the model input has tokens.
            loss_fn: name of a built-in loss.
            loss_fn_config: its options.

        Returns:
            `loss_fn_outputs[i]["logprobs"]`, float32 `[T_i]`, natural log; and metrics.
        """
        return self._queue.submit(self._passes.built_in("forward", data, loss_fn, loss_fn_config))

    def forward_backward(
        self, data: Datums, loss_fn: LossName, loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """Add the gradients of a built-in loss to those held for the next `optim_step`.

        The loss is a plain sum over tokens and datums; normalising is the caller's, or
        `optim_step`'s.

        Args:
            data: as for `forward`.
            loss_fn: "cross_entropy" (inputs target_tokens, weights), "importance_sampling" or "ppo"
                (inputs target_tokens, logprobs, advantages; ppo takes the config keys
                clip_low_threshold=0.8 and clip_high_threshold=1.2, bounds of the ratio).
            loss_fn_config: options of the loss.

        Returns:
            `loss_fn_outputs[i]["logprobs"]`, float32 `[T_i]`; metrics with `loss:sum`, and
            `response_tokens` (targets with a weight) for cross_entropy.
        """
        return self._queue.submit(
            self._passes.built_in("forward_backward", data, loss_fn, loss_fn_config)
        )

    def forward_backward_custom(
        self,
        data: Datums,
        loss_fn: LossFunction,
        *,
        loss_type_input: str = "logprobs",
        output: Output = "logprobs",
        pooling: Pooling = "mean",
        precomputed_forward: tinker.ForwardBackwardOutput | None = None,
    ) -> PassFuture:
        """Add the gradients of your own loss to those held for the next `optim_step`.

        The trainer computes the output of each datum, `loss_fn` runs here in a thread of its own
        and in the caller's context, and its gradient goes back. In it, waiting for this operation
        or for a later one of this client raises `WrongLoop`.

        Args:
            data: as for `forward`; only target_tokens and weights go to the trainer, `loss_fn` sees
                the datums whole.
            loss_fn: takes the datums and a list of float32 tensors, one a datum: the logprob of
                each target in the shape of its target_tokens, or the `output`. Returns a scalar
                tensor and a dict of numbers.
            loss_type_input: "logprobs".
            output: what `loss_fn` gets: "logprobs"; "embedding", `[H]`; "projection", `[T, D]`; or
                "cos_similarity_matrix", `[B]`, row i of the cosines between all embeddings.
            pooling: how hidden states become an embedding: their "mean", or the "last".
            precomputed_forward: result of a `forward` of the same datums and weights; spares one.

        Returns:
            As `forward_backward`; the metrics hold those of `loss_fn`, its value as `loss:sum`, and
            the trainer's `surrogate_loss:sum`.

        Raises, through the future:
            LossFailed: `loss_fn` raised, gave something else, or does not depend on its input.
        """
        return self._queue.submit(
            self._passes.custom(
                data,
                loss_fn,
                loss_type_input=loss_type_input,
                output=output,
                pooling=pooling,
                precomputed_forward=precomputed_forward,
            )
        )

    def forward_projection(self, data: Datums) -> PassFuture:
        """Compute the projection head's output, without gradients.

        For models with `projection_head_dim`.

        Returns:
            `loss_fn_outputs[i]["projection"]`, float32 `[T_i, D]`.
        """
        return self._queue.submit(self._passes.projection(data))

    def forward_backward_contrastive(
        self,
        data: Datums,
        *,
        num_queries: int,
        temperature: float,
        pooling: Pooling = "last",
        num_extra_negatives: int = 0,
    ) -> PassFuture:
        """Add the gradients of InfoNCE in both directions, computed by the trainer in one request.

        Args:
            data: the queries, as many documents in the same order, the extra negatives.
            num_queries: at least 1.
            temperature: by which cosines are divided; above 0.
            pooling: how hidden states become an embedding: their "mean", or the "last".
            num_extra_negatives: documents that belong to no query.

        The metrics hold the loss, as `loss`.
        """
        return self._queue.submit(
            self._passes.contrastive(
                data,
                num_queries=num_queries,
                temperature=temperature,
                pooling=pooling,
                num_extra_negatives=num_extra_negatives,
            )
        )

    # -- steps -------------------------------------------------------------------------------------

    def optim_step(
        self,
        adam_params: tinker.AdamParams,
        grad_accumulation_normalization: Normalization | None = None,
        emit_grad_norm_metrics: GradNorms | None = None,
        *,
        passes: int | None = None,
        accept_partial: bool = False,
    ) -> APIFuture[OptimStepResponse]:
        """Apply the gradients held, by AdamW with decoupled weight decay, and drop them.

        Args:
            adam_params: learning rate (default 1e-4), betas, eps, weight decay, and the bound of
                the global gradient norm (0: none).
            grad_accumulation_normalization: divide the gradients by "num_loss_tokens" or
                "num_sequences" held; None or "none" takes the plain sum.
            emit_grad_norm_metrics: "off", "basic" or "detailed"; None leaves it to the trainer.
            passes: how many passes the step must hold; with another number it is dropped, and
                nothing is applied. None takes any number.
            accept_partial: apply even where the server may hold part of a step that failed
                (`GradientsInDoubt`).

        Returns:
            Metrics of the step, such as `grad_norm`; `given_up_passes` where passes that had
            succeeded went with a failure before.

        Raises:
            InvalidArgument: a setting is not finite or out of range.

        Raises, through the future:
            PrecedingOperationFailed: an operation of this step failed; nothing was applied.
            InvalidArgument: the step does not hold as many `passes`; it is dropped.
            GradientsInDoubt: the server does not enforce steps, and one has failed.
        """
        return self._queue.submit(
            operations.optim_step(
                self._model,
                adam_params,
                grad_accumulation_normalization,
                emit_grad_norm_metrics,
                accept_partial=accept_partial,
                passes=passes,
            )
        )

    def discard_step(self) -> APIFuture[int]:
        """Drop the passes since the last `optim_step`: what comes after this opens a new step.

        Returns:
            How many passes had succeeded, and are dropped.

        Raises, through the future:
            GradientsInDoubt: the server offers no way to drop what it holds.
        """
        return self._queue.submit(operations.discard_step())

    # -- saving and loading ------------------------------------------------------------------------

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        *,
        timeout: float | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer, to be resumed from.

        States are the job's, so that a run that begins again, or another model of the job, may come
        to a name that is taken: such a save fails, unless it is asked to overwrite. Another trainer
        than the local platform's may keep both, under different paths; `path` is what loads it.

        Args:
            name: of the state; 1 to 200 characters of letters, digits, '.', '_' and '-'.
            ttl_seconds: seconds after which the platform may remove it; None keeps it.
            overwrite: take the place of a state of this name, in one step; a save that fails leaves
                the earlier state as it was.
            timeout: seconds; wait in this thread until the state is saved, and raise `TimeoutError`
                if it is not by then (the save goes on). None does not wait.

        Returns:
            `path`: the name to load; the trainer may have changed it.

        Raises:
            WrongLoop: `timeout` on the loop that has to do the work; nothing is saved.
            NotSupported: `ttl_seconds` or `overwrite`, and the trainer does not offer it.

        Raises, through the future:
            RequestFailed: there is a state of this name (`error_class` is "StateExists").
        """
        if timeout is not None and self._model.owner.is_current():
            raise WrongLoop(
                "save_state(timeout=...) waits in its thread, and this is the event loop that has "
                "to do the work: `await client.save_state(name).result_async(timeout)` there."
            )
        future = self._queue.submit(
            operations.save_state(self._model, name, ttl_seconds, overwrite)
        )
        if timeout is not None:
            future.result(timeout)
        return future

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load the weights of a saved state; the optimizer starts anew. Drops held gradients.

        Args:
            path: a name, `cross_job://<job>/<name>`, or what the trainer's save returned.
            weights_access_token: for states of others, where the server asks for one.

        Raises, through the future:
            RequestFailed: there is no such state; the message lists those there are.
        """
        return self._queue.submit(
            operations.load_state(self._model, path, weights_access_token, optimizer=False)
        )

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load weights and optimizer of a saved state: training goes on as if never stopped.

        Args and errors as for `load_state`.
        """
        return self._queue.submit(
            operations.load_state(self._model, path, weights_access_token, optimizer=True)
        )

    def load_adapter(self, adapter_path: str) -> APIFuture[LoadWeightsResponse]:
        """Start from the weights of an adapter; the optimizer starts anew. Drops held gradients.

        Args:
            adapter_path: a model resource (`accounts/<a>/models/<m>`), a `gs://` folder, or what
                else the trainer's platform lets you load, in the format of `peft`.

        Raises, through the future:
            RequestFailed: there is none, or it does not fit the model.
        """
        return self._queue.submit(operations.load_adapter(self._model, adapter_path))

    # -- snapshots ---------------------------------------------------------------------------------

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        *,
        checkpoint_type: CheckpointType | None = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save a snapshot that a deployment can load; training goes on while it is written.

        Args:
            name: 1 to 200 characters of letters, digits, '.', '_' and '-'; the session's suffix is
                added, so that runs do not meet.
            checkpoint_type: "base" saves all weights (or the whole adapter), "delta" the difference
                to the save before, if that is smaller than 0.7 of the whole: the trainer decides,
                and `snapshot.kind` says what it did. None chooses: first "base", then "delta".
                "merged_base" saves all weights with the adapter merged into them, for a LoRA model.
            export_precision: of "merged_base": "source" or "bf16" on the local platform.
            ttl_seconds: seconds after which the platform may remove it, unless it is served; None
                leaves it to the platform. Refused where the trainer does not offer it.
            metadata: refused.

        Returns:
            `path`: the snapshot's public identity, for `model_path=`; and `snapshot`, what was
            written.

        Raises, through the future:
            RequestFailed: it was not written, as with a full disk, which is seen before it starts.
        """
        return self._queue.submit(
            operations.save_weights_for_sampler(
                self._model,
                name,
                chain=self._publisher.chain,
                checkpoint_type=checkpoint_type,
                export_precision=export_precision,
                ttl_seconds=ttl_seconds,
                metadata=metadata,
            )
        )

    async def save_weights_for_sampler_ext(
        self,
        name: str,
        checkpoint_type: CheckpointType | None = None,
        ttl_seconds: int | None = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SaveSamplerResult:
        """Call `save_weights_for_sampler` and wait for it; gives the snapshot's path, and the name
        that was sent for it (the official SDK's method)."""
        saved = await self.save_weights_for_sampler(
            name,
            ttl_seconds,
            checkpoint_type=checkpoint_type,
            export_precision=export_precision,
            metadata=metadata,
        )
        return SaveSamplerResult(path=saved.path, snapshot_name=f"{name}-{self._model.suffix}")

    def weight_sync(
        self,
        name: str | None = None,
        *,
        on_drift: OnDrift | None = None,
        drift_bound: float = DRIFT_BOUND,
        probe_tokens: Sequence[int] | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Bring the weights, as they are at this place in the line, into the deployment.

        Returns at once; training goes on while the snapshot is written and loaded. The future ends
        when every replica serves it. Of syncs that wait for another one, only the newest is loaded,
        and the others end with it (`superseded`). Where a difference does not fit what a replica
        holds, a whole snapshot of the newest weights is saved and loaded in its place, with a
        warning that says why.

        Args:
            name: of the snapshot; None numbers them (`weight-sync-000001`).
            on_drift: compare the engine's logprobs of a few tokens with the trainer's once the
                snapshot is live, and beyond `drift_bound` "warn" or "raise"; None compares nothing.
            drift_bound: the most that the logprobs of a token may differ on average, in nats.
            probe_tokens: the token ids to compare on; default 32 fixed ones.

        Raises, through the future:
            RequestFailed: the snapshot could not be saved.
            HotLoadFailed: a replica refused it; the old weights keep serving.
            HotLoadTimeout: not every replica reported it within `hotload_timeout_s`.
            WeightsDrifted: with `on_drift="raise"`; the snapshot is live all the same.
        """
        save, forward = self.save_weights_for_sampler, self.forward
        return self._publisher.sync(save, forward, name, on_drift, drift_bound, probe_tokens)

    # -- the model ---------------------------------------------------------------------------------

    def unload_model(self) -> APIFuture[None]:
        """Free the trainer's memory once the operations before this one are done."""
        return self._queue.submit(operations.unload_model(self._model))

    async def get_info(self) -> dict[str, Any]:
        """Ask the trainer for `model_id`, `model_data`, `is_lora` and `lora_rank` of the model."""
        model = self._model
        return await model.owner.run(
            lambda: model.session.plane.call(
                "get_info", bodies.get_info(model.id), what="get_info"
            ),
            label="get_info",
        )

    async def list_checkpoints(self) -> list[str]:
        """List the names of the states that this trainer can load."""
        answer = await self._model.owner.run(
            lambda: self._model.session.plane.get("list_checkpoints", what="list_checkpoints"),
            label="list_checkpoints",
        )
        return [str(name) for name in answer.get("checkpoints", [])]

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """Make the path by which `load_state` finds a state of this trainer job, or of another one.

        Args:
            name: of the state.
            source_job_id: the job that saved it; None: this one.
        """
        check_name("name", name)
        if source_job_id is None:
            return name
        check_job("source_job_id", source_job_id)
        return f"cross_job://{source_job_id}/{name}"

    @property
    def model_id(self) -> str:
        """The trainer's name for the model."""
        return self._model.id

    @property
    def session_id(self) -> str:
        """The trainer's name for the session."""
        return self._model.session.session_id

    @property
    def run_id(self) -> str | None:
        """The training run that the model belongs to, where its id names one (`run-...`)."""
        run, _, rest = self.model_id.partition(":train:")
        return run if rest and run.startswith("run-") else None

    @property
    def dialect(self) -> str:
        """The dialect that passes are written in, "json" or "protobuf"."""
        return self._model.passes.dialect.name

    @property
    def comms(self) -> str:
        """The version of the JSON dialect, "v1" or "v2"."""
        return self._model.capabilities.comms

    @property
    def lora_rank(self) -> int:
        """Rank of the adapter that is trained; 0 for all parameters."""
        return self._model.config.lora_rank

    @property
    def last_saved_state(self) -> str | None:
        """Name of the newest state that this client saved, or else resumed from."""
        return self._model.states.newest

    @property
    def ended(self) -> FireworksTrainingError | None:
        """The error that ended the client; None while it takes operations."""
        return self._queue.ended

    # -- the trainer's features: None where it does not say ----------------------------------------

    @property
    def supports_router_replay(self) -> bool | None:
        """Whether the trainer can replay the routing of a mixture of experts; this client can't."""
        return self._model.capabilities.supports("router_replay")

    @property
    def supports_target_logprob_support(self) -> bool | None:
        """Whether the trainer takes the support of target logprobs."""
        return self._model.capabilities.supports("target_logprob_support")

    @property
    def supports_reinforce(self) -> bool | None:
        """Whether the trainer has the loss `reinforce`."""
        return self._model.capabilities.supports("reinforce")

    @property
    def supports_score_centering(self) -> bool | None:
        """Whether the trainer can center scores."""
        return self._model.capabilities.supports("score_centering")

    @property
    def supports_policy_importance_sampling(self) -> bool | None:
        """Whether the trainer can weight by the policy's importance."""
        return self._model.capabilities.supports("policy_importance_sampling")

    @property
    def supports_policy_diagnostics(self) -> bool | None:
        """Whether the trainer reports diagnostics of the policy."""
        return self._model.capabilities.supports("policy_diagnostics")

    @property
    def supports_rdma_weight_sync(self) -> bool:
        """Whether weights go live by RDMA: never, but through the deployment's hot load."""
        return False

    def __repr__(self) -> str:
        return f"<AsyncFiretitanTrainingClient {self.model_id}>"
