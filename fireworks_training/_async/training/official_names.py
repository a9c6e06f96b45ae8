"""The official SDK's names for operations of the training client: coroutines that give the future.

The official SDK's operations are coroutines that give a future, beside methods that return it.
Needs nothing of the client but the public methods that it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fireworks_training._async.weights.publisher import DRIFT_BOUND
from fireworks_training.futures import APIFuture
from fireworks_training.models import WeightSyncResult
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


class OfficialTrainingNames:
    """The operations of a training client, by further names of the official SDK."""

    forward: Callable[..., PassFuture]
    forward_backward: Callable[..., PassFuture]
    forward_backward_custom: Callable[..., PassFuture]
    forward_backward_contrastive: Callable[..., PassFuture]
    optim_step: Callable[..., APIFuture[OptimStepResponse]]
    save_state: Callable[..., APIFuture[SaveWeightsResponse]]
    load_state: Callable[..., APIFuture[LoadWeightsResponse]]
    load_state_with_optimizer: Callable[..., APIFuture[LoadWeightsResponse]]
    load_adapter: Callable[..., APIFuture[LoadWeightsResponse]]
    save_weights_for_sampler: Callable[..., APIFuture[SaveWeightsForSamplerResponse]]
    weight_sync: Callable[..., APIFuture[WeightSyncResult]]

    async def forward_async(
        self, data: Datums, loss_fn: LossName = "cross_entropy", loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """Call `forward` and return its future."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self, data: Datums, loss_fn: LossName, loss_fn_config: LossConfig = None
    ) -> PassFuture:
        """Call `forward_backward` and return its future."""
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
        """Call `forward_backward_custom` and return its future."""
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
        """Call `forward_backward_contrastive` and return its future."""
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
        passes: int | None = None,
        accept_partial: bool = False,
    ) -> APIFuture[OptimStepResponse]:
        """Call `optim_step` and return its future."""
        return self.optim_step(
            adam_params,
            grad_accumulation_normalization,
            emit_grad_norm_metrics,
            passes=passes,
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
        """Call `save_state` and return its future; with a timeout, wait for the state."""
        future = self.save_state(name, ttl_seconds, overwrite)
        if timeout is not None:
            await future.result_async(timeout)
        return future

    async def load_state_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Call `load_state` and return its future."""
        return self.load_state(path, weights_access_token)

    async def load_state_with_optimizer_async(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Call `load_state_with_optimizer` and return its future."""
        return self.load_state_with_optimizer(path, weights_access_token)

    async def load_adapter_async(self, adapter_path: str) -> APIFuture[LoadWeightsResponse]:
        """Call `load_adapter` and return its future."""
        return self.load_adapter(adapter_path)

    async def save_weights_for_sampler_async(
        self,
        name: str,
        ttl_seconds: int | None = None,
        *,
        checkpoint_type: CheckpointType | None = None,
        export_precision: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """Call `save_weights_for_sampler` and return its future."""
        return self.save_weights_for_sampler(
            name,
            ttl_seconds,
            checkpoint_type=checkpoint_type,
            export_precision=export_precision,
            metadata=metadata,
        )

    async def weight_sync_async(
        self,
        name: str | None = None,
        *,
        on_drift: OnDrift | None = None,
        drift_bound: float = DRIFT_BOUND,
        probe_tokens: Sequence[int] | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Call `weight_sync` and return its future."""
        return self.weight_sync(
            name, on_drift=on_drift, drift_bound=drift_bound, probe_tokens=probe_tokens
        )
