"""The part of the training client that saves weights for sampling, and brings them live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fireworks_training._async.training import operations
from fireworks_training._async.training.operations import CheckpointType
from fireworks_training._async.training.queue import OperationQueue
from fireworks_training._async.training.session import TrainerSession
from fireworks_training._async.weights.publisher import DRIFT_BOUND, OnDrift, WeightPublisher
from fireworks_training.futures import APIFuture
from fireworks_training.models import SaveSamplerResult, WeightSyncResult

if TYPE_CHECKING:
    import tinker

    from fireworks_training._async.training.pass_operations import PassFuture, PassOperations
    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse


class TrainerWeights:
    """Snapshots of a model in training."""

    _session: TrainerSession
    _runner: OperationQueue
    _pass_calls: PassOperations
    _publishing: WeightPublisher
    _model: str
    _suffix: str

    def _forward(self, data: Sequence[tinker.Datum], /) -> PassFuture:
        call = self._pass_calls.built_in("forward", data, "cross_entropy", None)
        return self._runner.submit(call)

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
            ttl_seconds, metadata: refused.

        Returns:
            `path`: the snapshot's public identity, for `model_path=`; and `snapshot`, what was
            written.

        Raises, through the future:
            RequestFailed: it was not written, as with a full disk, which is seen before it starts.
        """
        return self._runner.submit(
            operations.save_weights_for_sampler(
                self._model,
                name,
                self._suffix,
                chain=self._publishing.chain,
                checkpoint_type=checkpoint_type,
                export_precision=export_precision,
                ttl_seconds=ttl_seconds,
                metadata=metadata,
                tinker_only=self._session.tinker_only,
            )
        )

    async def save_weights_for_sampler_async(
        self, name: str, *, checkpoint_type: CheckpointType | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]:
        """`save_weights_for_sampler`, awaited for its future."""
        return self.save_weights_for_sampler(name, checkpoint_type=checkpoint_type)

    async def save_weights_for_sampler_ext(
        self,
        name: str,
        checkpoint_type: CheckpointType | None = None,
        ttl_seconds: int | None = None,
        export_precision: str | None = None,
    ) -> SaveSamplerResult:
        """`save_weights_for_sampler`, waited for: the snapshot's path and name."""
        saved = await self.save_weights_for_sampler(
            name, ttl_seconds, checkpoint_type=checkpoint_type, export_precision=export_precision
        )
        return SaveSamplerResult(path=saved.path, snapshot_name=saved.snapshot.identity)

    def weight_sync(
        self,
        name: str | None = None,
        *,
        on_drift: OnDrift | None = None,
        drift_bound: float = DRIFT_BOUND,
        probe_tokens: Sequence[int] | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Bring the weights as they are at this place in the line into the deployment.

        Returns at once; training goes on while the snapshot is written and loaded. The future ends
        when every replica serves it. Of syncs that wait for another one, only the newest is loaded,
        and the others end with it (`superseded`). Where a difference does not fit what a replica
        holds, a whole snapshot of the newest weights is saved and loaded in its place, with a
        warning that says why.

        Args:
            name: of the snapshot; None numbers them (`weight-sync-000001`).
            on_drift: compare the engine's logprobs of a few tokens with the trainer's once the
                snapshot is live, and beyond `drift_bound` "warn" or "raise"; None compares nothing.
            drift_bound: nats; of the mean absolute difference of a token's logprob.
            probe_tokens: what to compare on; default 32 fixed ids.

        Raises, through the future:
            RequestFailed: the snapshot could not be saved.
            HotLoadFailed: a replica refused it; the old weights keep serving.
            HotLoadTimeout: not every replica reported it within `hotload_timeout_s`.
            WeightsDrifted: with `on_drift="raise"`; the snapshot is live all the same.
        """
        return self._publishing.sync(
            self.save_weights_for_sampler,
            self._forward,
            name,
            on_drift,
            drift_bound,
            probe_tokens,
        )

    async def weight_sync_async(
        self, name: str | None = None, *, on_drift: OnDrift | None = None
    ) -> APIFuture[WeightSyncResult]:
        """`weight_sync`, awaited for its future."""
        return self.weight_sync(name, on_drift=on_drift)
