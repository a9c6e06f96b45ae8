"""The training client: one model in one trainer, and the operations on it.

Every operation takes its place in the model's line when it is called, and returns an `APIFuture`;
call order is execution order, whatever is awaited first. What an operation sends is in `calls` and
`pass_calls`; the rules of the line are in `_core.operations`, its execution in `_async.operations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training import operations
from fireworks_training._async.training.arguments import check_job, check_name
from fireworks_training._async.training.operations import GradNorms, LossConfig, Normalization
from fireworks_training._async.training.queue import OperationQueue
from fireworks_training._async.training.session import Capabilities, TrainerSession
from fireworks_training._async.training.trainer_facts import TrainerFacts
from fireworks_training._async.training.trainer_weights import TrainerWeights
from fireworks_training._async.weights.publisher import WeightPublisher
from fireworks_training._core.operations import OperationLine
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import FireworksTrainingError, WrongLoop
from fireworks_training.futures import APIFuture

if TYPE_CHECKING:
    import tinker
    from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

    from fireworks_training._async.training.custom_loss import LossFunction
    from fireworks_training._async.training.pass_operations import (
        Datums,
        Output,
        PassFuture,
        Pooling,
    )


class AsyncFiretitanTrainingClient(TrainerFacts, TrainerWeights):
    """Trains one model. Made by `create_training_client` of a service.

    Operations may be called from any thread and any loop, and return at once. `await` an operation,
    or call `.result()` on it.

    Raises, at the call, for every operation:
        InvalidArgument, TypeError: wrong kinds of arguments; nothing takes a place in the line.
        ClientClosed: the service was closed.
        SessionLost, TrainerLost: the session has ended before.
    """

    def __init__(
        self,
        session: TrainerSession,
        capabilities: Capabilities,
        config: FiretitanProvisioningConfig,
        *,
        owner: OwnerLoop,
        publishing: WeightPublisher,
        pipeline_steps: bool = False,
        forward_only: bool = False,
    ) -> None:
        # Here, since they load numpy, which a service that only samples does without.
        from fireworks_training._async.training.pass_operations import PassOperations
        from fireworks_training._async.training.passes import Passes
        from fireworks_training._wire.training.dialects import choose

        self._session = session
        self._capabilities = capabilities
        self._config = config
        self._owner = owner
        self._model = capabilities.model_id
        self._suffix = uuid4().hex[:8]
        self._publishing = publishing
        self._passes = Passes(
            capabilities.model_id,
            choose(
                config.dialect,
                wire=capabilities.wire,
                comms=capabilities.comms,
                zstd=session.client_config.compress,
            ),
            backward=capabilities.backward,
            usage=session.plane.usage,
            limits=session.client_config,
        )
        self._pass_calls = PassOperations(self._passes)
        self._runner = OperationQueue(
            session.plane,
            owner=owner,
            model_id=capabilities.model_id,
            line=OperationLine(
                step_protocol=capabilities.step_protocol, pipeline_steps=pipeline_steps
            ),
            filler=self._passes.filler,
            failing=self._passes.failing,
            forward_only=forward_only,
            batch_polls=capabilities.batch_polls,
            parallel=session.client_config.parallel_chunks,
        )
        self._submit = self._runner.submit
        if not forward_only:
            line = self._runner.line
            publishing.chain.follow(lambda: line.steps)

    # -- passes ------------------------------------------------------------------------------------

    def forward(
        self, data: Datums, loss_fn: str = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """Logprobs of the targets, without gradients.

        Args:
            data: datums; entry t of each loss input belongs to predicting target t from the input
                tokens up to t, so all have as many entries as the model input has tokens.
            loss_fn: name of a built-in loss.
            loss_fn_config: its options.

        Returns:
            `loss_fn_outputs[i]["logprobs"]`, float32 `[T_i]`, natural log; and metrics.
        """
        return self._submit(self._pass_calls.built_in("forward", data, loss_fn, loss_fn_config))

    def forward_backward(
        self, data: Datums, loss_fn: str, loss_fn_config: LossConfig = None
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
        return self._submit(
            self._pass_calls.built_in("forward_backward", data, loss_fn, loss_fn_config)
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
        return self._submit(
            self._pass_calls.custom(
                data,
                loss_fn,
                loss_type_input=loss_type_input,
                output=output,
                pooling=pooling,
                precomputed_forward=precomputed_forward,
            )
        )

    def forward_projection(self, data: Datums) -> PassFuture:
        """The projection head's output, without gradients; for models with `projection_head_dim`.

        Returns:
            `loss_fn_outputs[i]["projection"]`, float32 `[T_i, D]`.
        """
        return self._submit(self._pass_calls.projection(data))

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
        return self._submit(
            self._pass_calls.contrastive(
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
        accept_partial: bool = False,
    ) -> APIFuture[OptimStepResponse]:
        """Apply the gradients held, by AdamW with decoupled weight decay, and drop them.

        Args:
            adam_params: learning rate (default 1e-4), betas, eps, weight decay, and the bound of
                the global gradient norm (0: none).
            grad_accumulation_normalization: divide the gradients by "num_loss_tokens" or
                "num_sequences" held; None or "none" takes the plain sum.
            emit_grad_norm_metrics: "off", "basic" or "detailed"; None leaves it to the trainer.
            accept_partial: apply even where the server may hold part of a step that failed
                (`GradientsInDoubt`).

        Returns:
            Metrics of the step, such as `grad_norm`.

        Raises, through the future:
            PrecedingOperationFailed: an operation of this step failed; nothing was applied.
            GradientsInDoubt: the server does not enforce steps, and one has failed.
        """
        return self._submit(
            operations.optim_step(
                self.model_id,
                adam_params,
                grad_accumulation_normalization,
                emit_grad_norm_metrics,
                accept_partial=accept_partial,
            )
        )

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

        A second save under a name takes the place of the first in one step, and a warning says so:
        states are the job's, so that a run that begins again, or another model of the job, may
        come to a name that is taken. A save that fails leaves the earlier state as it was.

        Args:
            name: of the state; 1 to 200 characters of letters, digits, '.', '_' and '-'.
            ttl_seconds, overwrite: of Tinker servers; refused.
            timeout: seconds; wait in this thread until the state is saved, and raise `TimeoutError`
                if it is not by then (the save goes on). None does not wait.

        Returns:
            `path`: the name to load; the trainer may have changed it.

        Raises:
            WrongLoop: `timeout` on the loop that has to do the work; nothing is saved.
        """
        if timeout is not None and self._owner.is_current():
            raise WrongLoop(
                "save_state(timeout=...) waits in its thread, and this is the event loop that has "
                "to do the work: `await client.save_state(name).result_async(timeout)` there."
            )
        future = self._submit(
            operations.save_state(self.model_id, name, self._runner, ttl_seconds, overwrite)
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
        return self._submit(
            operations.load_state(self.model_id, path, weights_access_token, optimizer=None)
        )

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Load weights and optimizer of a saved state: training goes on as if never stopped.

        Args and errors as for `load_state`.
        """
        call = operations.load_state(
            self.model_id, path, weights_access_token, optimizer=self._runner
        )
        return self._submit(call)

    def load_adapter(self, adapter_path: str) -> APIFuture[LoadWeightsResponse]:
        """Start from the weights of an adapter; the optimizer starts anew. Drops held gradients.

        Args:
            adapter_path: a model resource (`accounts/<a>/models/<m>`), a `gs://` folder, or what
                else the trainer's platform lets you load, in the format of `peft`.

        Raises, through the future:
            RequestFailed: there is none, or it does not fit the model.
        """
        return self._submit(operations.load_adapter(self.model_id, adapter_path))

    # -- the model ---------------------------------------------------------------------------------

    def unload_model(self) -> APIFuture[None]:
        """Free the trainer's memory once the operations before this one are done."""
        return self._submit(
            operations.unload_model(self.model_id, tinker_only=self._session.tinker_only)
        )

    async def get_info(self) -> dict[str, Any]:
        """What the trainer says of the model: `model_id`, `model_data`, `is_lora`, `lora_rank`."""
        return await self._owner.run(
            lambda: self._session.plane.call(
                "get_info", {"model_id": self.model_id, "type": "get_info"}, what="get_info"
            ),
            label="get_info",
        )

    async def list_checkpoints(self) -> list[str]:
        """Names of the states that this trainer can load."""
        answer = await self._owner.run(
            lambda: self._session.plane.get("list_checkpoints", what="list_checkpoints"),
            label="list_checkpoints",
        )
        return [str(name) for name in answer.get("checkpoints", [])]

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """What `load_state` takes for a state of this trainer job, or of another one.

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
    def lora_rank(self) -> int:
        """Rank of the adapter that is trained; 0 for all parameters."""
        return self._config.lora_rank

    @property
    def last_saved_state(self) -> str | None:
        """Name of the newest state that this client saved, or else resumed from."""
        return self._runner.last_saved_state

    @property
    def ended(self) -> FireworksTrainingError | None:
        """Why the client takes no more operations; None while it does."""
        return self._runner.ended

    # -- the same operations, as coroutines that give the future --------------------------------

    async def forward_async(
        self, data: Datums, loss_fn: str = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """`forward`, awaited for its future."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: Datums, loss_fn: str, loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """`forward_backward`, awaited for its future."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self,
        data: Datums,
        loss_fn: LossFunction,
        *,
        loss_type_input: str = "logprobs",
        output: Output = "logprobs",
        pooling: Pooling = "mean",
        precomputed_forward: tinker.ForwardBackwardOutput | None = None,
    ) -> PassFuture:
        """`forward_backward_custom`, awaited for its future."""
        return self.forward_backward_custom(
            data,
            loss_fn,
            loss_type_input=loss_type_input,
            output=output,
            pooling=pooling,
            precomputed_forward=precomputed_forward,
        )

    async def forward_backward_contrastive_async(
        self,
        data: Datums,
        *,
        num_queries: int,
        temperature: float,
        pooling: Pooling = "last",
        num_extra_negatives: int = 0,
    ) -> PassFuture:
        """`forward_backward_contrastive`, awaited for its future."""
        return self.forward_backward_contrastive(
            data,
            num_queries=num_queries,
            temperature=temperature,
            pooling=pooling,
            num_extra_negatives=num_extra_negatives,
        )

    async def optim_step_async(
        self,
        adam_params: tinker.AdamParams,
        grad_accumulation_normalization: Normalization | None = None,
        emit_grad_norm_metrics: GradNorms | None = None,
        *,
        accept_partial: bool = False,
    ) -> APIFuture[OptimStepResponse]:
        """`optim_step`, awaited for its future."""
        return self.optim_step(
            adam_params,
            grad_accumulation_normalization,
            emit_grad_norm_metrics,
            accept_partial=accept_partial,
        )

    async def save_state_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        *,
        timeout: float | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """`save_state`, awaited for its future; with a timeout, until the state is saved."""
        future = self.save_state(name, ttl_seconds, overwrite)
        if timeout is not None:
            await future.result_async(timeout)
        return future

    async def load_state_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """`load_state`, awaited for its future."""
        return self.load_state(path, weights_access_token)

    async def load_state_with_optimizer_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """`load_state_with_optimizer`, awaited for its future."""
        return self.load_state_with_optimizer(path, weights_access_token)

    async def load_adapter_async(self, adapter_path: str) -> APIFuture[LoadWeightsResponse]:
        """`load_adapter`, awaited for its future."""
        return self.load_adapter(adapter_path)

    async def _close(self, *, drain: bool) -> None:
        await self._runner.close(drain=drain)

    def _first_unseen_failure(self) -> BaseException | None:
        return self._runner.first_unseen_failure()

    def __repr__(self) -> str:
        return f"<AsyncFiretitanTrainingClient {self.model_id}>"
