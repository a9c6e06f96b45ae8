"""The training client: one model in one trainer, and the operations on it.

Every operation takes its place in the model's line when it is called, and returns an `APIFuture`;
call order is execution order, whatever is awaited first. The rules of the line are in
`_core.operations`, its execution in `_async.operations`, the shapes of requests in `_wire`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from uuid import uuid4

import orjson

from fireworks_training._async.arguments import check_datums, check_name, check_state
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.operations import LineRunner, Request, Turn
from fireworks_training._async.patience import speaking
from fireworks_training._async.session import Capabilities, TrainerSession
from fireworks_training._core.operations import Line, Role
from fireworks_training._wire.training import PassKind, decode_snapshot
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import (
    ClientClosed,
    FireworksTrainingError,
    InvalidArgument,
    NotSupported,
    ProtocolError,
)
from fireworks_training.futures import APIFuture

if TYPE_CHECKING:
    import tinker
    from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

    from fireworks_training._async.custom_loss import LossFunction
    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

logger = logging.getLogger("fireworks_training.trainer")

T = TypeVar("T")

CheckpointType = Literal["base", "delta", "merged_base"]
Normalization = Literal["num_loss_tokens", "num_sequences", "none"]

DRAIN_TIMEOUT = 60.0
"""Seconds that `close()` gives accepted operations to finish."""


class AsyncFiretitanTrainingClient:
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
        pipeline_steps: bool = False,
        forward_only: bool = False,
    ) -> None:
        # Here, since it loads numpy, which a service that only samples does without.
        from fireworks_training._async.passes import Passes

        self._session = session
        self._capabilities = capabilities
        self._config = config
        self._owner = owner
        self._forward_only = forward_only
        self._suffix = uuid4().hex[:8]
        self._passes = Passes(capabilities.model_id, capabilities.comms)
        self._runner = LineRunner(
            session.plane,
            owner=owner,
            model_id=capabilities.model_id,
            line=Line(step_protocol=capabilities.step_protocol, pipeline_steps=pipeline_steps),
            name=capabilities.model_id,
        )

    # -- passes ------------------------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
        """Logprobs of the targets, without gradients.

        Args:
            data: datums; entry t of each loss input belongs to predicting target t from the input
                tokens up to t, so all have as many entries as the model input has tokens.
            loss_fn: name of a built-in loss.
            loss_fn_config: its options.

        Returns:
            `loss_fn_outputs[i]["logprobs"]`, float32 `[T_i]`, natural log; and metrics.
        """
        return self._pass("forward", Role.FORWARD, data, loss_fn, loss_fn_config)

    def forward_backward(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
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
        return self._pass("forward_backward", Role.GRADIENT, data, loss_fn, loss_fn_config)

    def forward_backward_custom(
        self, data: Sequence[tinker.Datum], loss_fn: LossFunction
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
        """Add the gradients of your own loss to those held for the next `optim_step`.

        The trainer computes the logprobs, `loss_fn` runs here in a thread of its own, and its
        gradient by the logprobs goes back. Costs one forward more than a built-in loss.

        Args:
            data: as for `forward`; only target_tokens and weights go to the trainer, `loss_fn` sees
                the datums whole.
            loss_fn: takes the datums and a list of float32 tensors, one a datum, in the shape of
                its target_tokens: the logprob of each target. Returns a scalar tensor and a dict of
                numbers.

        Returns:
            As `forward_backward`; the metrics hold those of `loss_fn`, its value as `loss:sum`, and
            the trainer's `surrogate_loss:sum`.

        Raises, through the future:
            LossFailed: `loss_fn` raised, gave something else, or does not depend on the logprobs.
        """
        from fireworks_training._async.custom_loss import require_torch

        require_torch()
        check_datums(data)
        if not callable(loss_fn):
            raise InvalidArgument(f"loss_fn must be callable, not {type(loss_fn).__name__}")
        datums = list(data)
        return self._submit(
            Role.GRADIENT,
            "forward_backward_custom",
            lambda turn: self._passes.run_custom(turn, datums, loss_fn),
        )

    def _pass(
        self,
        kind: PassKind,
        role: Role,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None,
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
        check_datums(data)
        if not isinstance(loss_fn, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(
                f"loss_fn must be the name of a built-in loss, not {type(loss_fn).__name__}; a "
                "function goes to forward_backward_custom"
            )
        datums, config = list(data), None if loss_fn_config is None else dict(loss_fn_config)
        return self._submit(
            role, kind, lambda turn: self._passes.run(turn, kind, datums, loss_fn, config)
        )

    # -- steps -------------------------------------------------------------------------------------

    def optim_step(
        self,
        adam_params: tinker.AdamParams,
        grad_accumulation_normalization: Normalization | None = None,
        *,
        accept_partial: bool = False,
    ) -> APIFuture[OptimStepResponse]:
        """Apply the gradients held, by AdamW with decoupled weight decay, and drop them.

        Args:
            adam_params: learning rate (default 1e-4), betas, eps, weight decay, and the bound of
                the global gradient norm (0: none).
            grad_accumulation_normalization: divide the gradients by "num_loss_tokens" or
                "num_sequences" held; None or "none" takes the plain sum.
            accept_partial: apply even where the server may hold part of a step that failed
                (`GradientsInDoubt`).

        Returns:
            Metrics of the step, such as `grad_norm`.

        Raises, through the future:
            PrecedingOperationFailed: an operation of this step failed; nothing was applied.
            GradientsInDoubt: the server does not enforce steps, and one has failed.
        """
        import tinker

        if not isinstance(adam_params, tinker.AdamParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(
                f"adam_params must be tinker.AdamParams, not {type(adam_params).__name__}"
            )
        if grad_accumulation_normalization not in (
            None,
            "num_loss_tokens",
            "num_sequences",
            "none",
        ):
            raise InvalidArgument(
                f"grad_accumulation_normalization={grad_accumulation_normalization!r}: allowed are "
                "num_loss_tokens, num_sequences, none"
            )
        fields: dict[str, Any] = {"adam_params": adam_params.model_dump(), "type": "optim_step"}
        if grad_accumulation_normalization is not None:
            fields["grad_accumulation_normalization"] = grad_accumulation_normalization

        async def run(turn: Turn) -> OptimStepResponse:
            from tinker.types import OptimStepResponse

            payload = await self._one(turn, "optim_step", fields)
            return OptimStepResponse(metrics=payload.get("metrics"))

        return self._submit(Role.OPTIM, "optim_step", run, accept_partial=accept_partial)

    # -- saving and loading ------------------------------------------------------------------------

    def save_state(self, name: str) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer, to be resumed from.

        Args:
            name: of the state; 1 to 200 characters of letters, digits, '.', '_' and '-'.

        Returns:
            `path`: the name to load; the trainer may have changed it.
        """
        check_name("name", name)

        async def run(turn: Turn) -> SaveWeightsResponse:
            from tinker.types import SaveWeightsResponse

            payload = await self._one(turn, "save_weights", {"path": name, "type": "save_weights"})
            path = payload.get("path")
            if not isinstance(path, str):
                raise ProtocolError("the trainer saved a state but named no path")
            self._runner.last_saved_state = path
            return SaveWeightsResponse(path=path)

        return self._submit(Role.SAVE, "save_state", run)

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load the weights of a saved state; the optimizer starts anew. Drops held gradients.

        Args:
            path: a name, `cross_job://<job>/<name>`, or what the trainer's save returned.

        Raises, through the future:
            RequestFailed: there is no such state; the message lists those there are.
        """
        return self._load(path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load weights and optimizer of a saved state: training goes on as if never stopped.

        Args and errors as for `load_state`.
        """
        return self._load(path, optimizer=True)

    def _load(self, path: str, *, optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        check_state("path", path)
        fields = {"path": path, "optimizer": optimizer, "type": "load_weights"}

        async def run(turn: Turn) -> LoadWeightsResponse:
            from tinker.types import LoadWeightsResponse

            payload = await self._one(turn, "load_weights", fields)
            if optimizer and self._runner.last_saved_state is None:
                self._runner.last_saved_state = path
            return LoadWeightsResponse(path=payload.get("path", path))

        return self._submit(Role.LOAD, "load_state", run)

    def save_weights_for_sampler(
        self,
        name: str,
        *,
        checkpoint_type: CheckpointType | None = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Save a snapshot that a deployment can load.

        Args:
            name: 1 to 200 characters of letters, digits, '.', '_' and '-'; the session's suffix is
                added, so that runs do not meet.
            checkpoint_type: None and "base" save all weights (or the whole adapter).

        Returns:
            `path`: the snapshot's public identity, for `model_path=`; and `snapshot`, what was
            written.
        """
        check_name("name", name)
        if checkpoint_type not in (None, "base"):
            raise NotSupported(
                f"checkpoint_type={checkpoint_type!r} is not supported yet; use 'base'"
            )
        fields = {
            "path": f"{name}-{self._suffix}",
            "checkpoint_type": "base",
            "type": "save_weights_for_sampler",
        }

        async def run(turn: Turn) -> SaveWeightsForSamplerResponse:
            from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

            payload = await self._one(turn, "save_weights_for_sampler", fields)
            snapshot = decode_snapshot(payload)
            return SaveWeightsForSamplerResponse(path=snapshot.identity, snapshot=snapshot)

        return self._submit(Role.SAVE, "save_weights_for_sampler", run)

    # -- the model ---------------------------------------------------------------------------------

    def unload_model(self) -> APIFuture[None]:
        """Free the trainer's memory once the operations before this one are done."""

        async def run(turn: Turn) -> None:
            await self._one(turn, "unload_model", {"type": "unload_model"})

        return self._submit(Role.OTHER, "unload_model", run)

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

    @property
    def model_id(self) -> str:
        """The trainer's name for the model."""
        return self._capabilities.model_id

    @property
    def session_id(self) -> str:
        """The trainer's name for the session."""
        return self._session.session_id

    @property
    def comms(self) -> str:
        """ "v1" or "v2" of the JSON dialect."""
        return self._capabilities.comms

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
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
        """`forward`, awaited for its future."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
        """`forward_backward`, awaited for its future."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self, data: Sequence[tinker.Datum], loss_fn: LossFunction
    ) -> APIFuture[tinker.ForwardBackwardOutput]:
        """`forward_backward_custom`, awaited for its future."""
        return self.forward_backward_custom(data, loss_fn)

    async def optim_step_async(
        self,
        adam_params: tinker.AdamParams,
        grad_accumulation_normalization: Normalization | None = None,
        *,
        accept_partial: bool = False,
    ) -> APIFuture[OptimStepResponse]:
        """`optim_step`, awaited for its future."""
        return self.optim_step(
            adam_params, grad_accumulation_normalization, accept_partial=accept_partial
        )

    async def save_state_async(self, name: str) -> APIFuture[SaveWeightsResponse]:
        """`save_state`, awaited for its future."""
        return self.save_state(name)

    async def load_state_async(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """`load_state`, awaited for its future."""
        return self.load_state(path)

    async def load_state_with_optimizer_async(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """`load_state_with_optimizer`, awaited for its future."""
        return self.load_state_with_optimizer(path)

    async def save_weights_for_sampler_async(
        self, name: str, *, checkpoint_type: CheckpointType | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """`save_weights_for_sampler`, awaited for its future."""
        return self.save_weights_for_sampler(name, checkpoint_type=checkpoint_type)

    # -- plumbing ----------------------------------------------------------------------------------

    def _submit(
        self,
        role: Role,
        label: str,
        run: Callable[[Turn], Awaitable[T]],
        *,
        accept_partial: bool = False,
    ) -> APIFuture[T]:
        if self._forward_only and role not in (Role.FORWARD, Role.OTHER):
            raise NotSupported(
                f"{label}: this is a reference client, whose weights stay as they are; it offers "
                "forward"
            )
        return self._runner.submit(role, label, run, accept_partial=accept_partial)

    async def _one(self, turn: Turn, path: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send one JSON request and wait for its result."""

        def body(seq_id: int) -> bytes:
            return orjson.dumps({**fields, "model_id": self.model_id, "seq_id": seq_id})

        (payload,) = await turn.send([Request(path, body)])
        return payload

    async def _close(self, *, drain: bool) -> None:
        """Finish what was accepted (or not), then refuse everything; on the owner loop."""
        runner = self._runner
        finished = not drain or runner.ended is not None
        finished = finished or await speaking(
            runner.drain(DRAIN_TIMEOUT),
            lambda: f"close() lets {runner.open_operations} accepted operations finish",
        )
        if not finished:
            logger.warning(
                "close(): %d operations were not done within %.0f s and are given up",
                self._runner.open_operations,
                DRAIN_TIMEOUT,
            )
        self._runner.end(ClientClosed("the service was closed; make a new one"))
        await self._runner.settled()

    def _first_unseen_failure(self) -> BaseException | None:
        return self._runner.first_unseen_failure()

    def __repr__(self) -> str:
        return f"<AsyncFiretitanTrainingClient {self.model_id}>"
