"""From a training client to its deployment: saves a snapshot, brings it live, and looks for drift.

The save takes its place in the client's line at the call; the rest goes on beside the line, so
training does too. Knows neither how a save is sent nor how replicas are watched.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._async.weights.weight_sync import Loaded, WeightSync
from fireworks_training._core.snapshots import Chain
from fireworks_training.errors import InvalidArgument, NotSupported, WeightsDrifted
from fireworks_training.events import SyncEvent
from fireworks_training.futures import APIFuture
from fireworks_training.models import Snapshot, WeightSyncResult
from fireworks_training.options import OnDrift

if TYPE_CHECKING:
    import tinker

    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

DRIFT_BOUND = 0.02
PROBE_TOKENS = tuple(10 + (7 * place * place + 3 * place) % 190 for place in range(32))
"""Ids that every vocabulary has, in no order that a model would know by heart."""

logger = logging.getLogger("fireworks_training.weight_sync")


class Save(Protocol):
    """`save_weights_for_sampler` of a training client, as far as a sync needs it."""

    def __call__(
        self, name: str, *, checkpoint_type: Literal["base"] | None = None
    ) -> APIFuture[SaveWeightsForSamplerResponse]: ...


class Forward(Protocol):
    """`forward` of a training client, as far as a sync needs it."""

    def __call__(
        self, data: Sequence[tinker.Datum], /
    ) -> APIFuture[tinker.ForwardBackwardOutput]: ...


class Deployment(Protocol):
    """What serves the weights, as far as a sync needs it: `ServedDeployment`, or a test's."""

    @property
    def chain(self) -> Chain:
        """The snapshots that were saved, and the one that is live."""
        ...

    async def weights(self) -> WeightSync:
        """The weights that it serves."""
        ...

    async def of_probe(self) -> DeploymentSampler:
        """A sampler for token ids, which does not wait for rollouts."""
        ...


@dataclass(frozen=True, slots=True)
class Probe:
    """A comparison of the engine's logprobs with the trainer's.

    Attributes:
        on_drift: what to do beyond `bound`.
        bound: nats, of the mean absolute difference of a token's logprob.
        tokens: the sequence.
        trained: the trainer's logprobs of it, asked for right after the save.
    """

    on_drift: OnDrift
    bound: float
    tokens: Sequence[int]
    trained: APIFuture[tinker.ForwardBackwardOutput]


class WeightPublisher:
    """How the weights of a service's training clients get into its deployment.

    Args:
        owner: the service's loop.
        deployment: what serves them.
        events: told when a snapshot is saved; None where nobody listens.
    """

    def __init__(
        self,
        owner: OwnerLoop,
        deployment: Deployment,
        events: EventHook | None = None,
    ) -> None:
        self.chain = deployment.chain
        self._owner = owner
        self._deployment = deployment
        self._events = events
        self._numbers = itertools.count(1)
        self._syncs: set[asyncio.Task[object]] = set()

    def sync(
        self,
        save: Save,
        forward: Forward,
        name: str | None,
        on_drift: OnDrift | None,
        drift_bound: float,
        probe_tokens: Sequence[int] | None,
    ) -> APIFuture[WeightSyncResult]:
        """Save now, in the line; load and compare beside it. Arguments as for `weight_sync`."""
        if on_drift not in (None, "warn", "raise"):
            raise InvalidArgument(f"on_drift={on_drift!r}: allowed are None, 'warn' and 'raise'")
        if not drift_bound > 0:
            raise InvalidArgument(f"drift_bound={drift_bound!r} must be above 0, in nats")
        tokens = PROBE_TOKENS if probe_tokens is None else tuple(probe_tokens)
        if len(tokens) < 2:
            raise InvalidArgument("probe_tokens must hold two token ids or more")
        name = name or f"weight-sync-{next(self._numbers):06d}"
        # The one keeps what the other compares: no operation of this client comes between them.
        saved = save(name)
        probe = None
        if on_drift is not None:
            probe = Probe(on_drift, drift_bound, tokens, forward([_datum(tokens)]))

        async def save_whole() -> Snapshot:
            whole = await save(f"{name}-whole", checkpoint_type="base")
            return whole.snapshot

        async def run() -> WeightSyncResult:
            task = asyncio.current_task()
            assert task is not None
            self._syncs.add(task)
            try:
                return await self._run(saved, probe, save_whole)
            finally:
                self._syncs.discard(task)

        return APIFuture(self._owner.spawn(run, label=f"weight_sync of {name}"))

    async def _run(
        self,
        saved: APIFuture[SaveWeightsForSamplerResponse],
        probe: Probe | None,
        save_whole: Callable[[], Awaitable[Snapshot]],
    ) -> WeightSyncResult:
        clock = asyncio.get_running_loop().time
        started = clock()
        snapshot = (await saved).snapshot
        written = clock()
        if (events := self._events) is not None:
            events.emit(
                SyncEvent(
                    at=events.now(),
                    identity=snapshot.identity,
                    stage="saved",
                    seconds=written - started,
                )
            )
        weights = await self._deployment.weights()
        loaded = await weights.load(snapshot.identity, save_whole=save_whole, newest=True)
        live = clock()
        drift = None if probe is None else await self._drift(probe, snapshot, loaded)
        return WeightSyncResult(
            identity=loaded.identity,
            snapshot=loaded.saved or snapshot,
            optimizer_step=self.chain.step_of(loaded.identity),
            loaded=loaded.steps,
            superseded=loaded.superseded,
            drift=drift,
            save_s=written - started,
            load_s=live - written,
        )

    async def _drift(self, probe: Probe, snapshot: Snapshot, loaded: Loaded) -> float | None:
        """Mean absolute difference, in nats; None if other weights than those saved are live."""
        outputs = (await probe.trained).loss_fn_outputs
        if loaded.identity != snapshot.identity:
            return None
        sampler = await self._deployment.of_probe()
        (completion,) = await sampler.sample_with_prompt_tokens(
            probe.tokens, max_tokens=1, echo=True, logprobs=True
        )
        reported = {completion.snapshot_identity, completion.snapshot_identity_first} - {None}
        if reported - {snapshot.identity} or completion.snapshot_switch_index is not None:
            return None  # a newer load came between: this says nothing about the one before
        count = len(probe.tokens) - 1
        served = (completion.inference_logprobs or [])[:count]
        trained = [float(value) for value in outputs[0]["logprobs"].tolist()[:count]]
        if len(served) != count or len(trained) != count:
            raise NotSupported("this deployment does not echo logprobs: leave on_drift out")
        drift = sum(abs(a - b) for a, b in zip(served, trained, strict=True)) / count
        if not drift <= probe.bound:
            message = (
                f"engine and trainer differ by {drift:.4f} nats a token on {snapshot.identity}, "
                f"more than {probe.bound}: what is sampled is not what is trained. Compare the "
                "precision of both sides, or sync a snapshot with checkpoint_type='base'"
            )
            if probe.on_drift == "raise":
                raise WeightsDrifted(message, identity=snapshot.identity, drift=drift)
            logger.warning("%s", message)
        return drift

    async def close(self) -> None:
        """Let the syncs under way end with the loads that they wait for; idempotent."""
        syncs = list(self._syncs)
        if syncs:
            await asyncio.wait(syncs, timeout=5.0)
            for task in syncs:
                task.cancel()
            await asyncio.gather(*syncs, return_exceptions=True)


def _datum(tokens: Sequence[int]) -> tinker.Datum:
    from fireworks_training.data import supervised_datum

    return supervised_datum(tokens, [1.0] * len(tokens))
