"""The rollout pool as users see it: its arguments, and its async and blocking use."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

from fireworks_training._checks import integer, number
from fireworks_training._portal import Lease, spawn_on, wait_for
from fireworks_training.errors import ClientClosed, InvalidArgument
from fireworks_training.futures import APIFuture
from fireworks_training.models import WeightSyncResult
from fireworks_training.rollouts.batches import Batch, RolloutGroup
from fireworks_training.rollouts.context import EndpointSampler
from fireworks_training.rollouts.failures import FailurePolicy
from fireworks_training.rollouts.feeder import Tasks, check_tasks, read
from fireworks_training.rollouts.law import BatchOrder, Plan
from fireworks_training.rollouts.members import Filter, Work
from fireworks_training.rollouts.rewards import RewardLike, rewards_of
from fireworks_training.rollouts.running import Running
from fireworks_training.rollouts.token_ledger import TokenCounts

if TYPE_CHECKING:
    from fireworks_training import (
        AsyncFiretitanServiceClient,
        AsyncFiretitanTrainingClient,
        DeploymentSampler,
        FiretitanServiceClient,
        FiretitanTrainingClient,
        TITOSidecar,
    )


class RolloutPool:
    """Samples groups of rollouts ahead of training, at most `max_lag` batches, losing none.

        async with RolloutPool(service, tasks, rollout, groups_per_batch=16, group_size=16) as pool:
            async for batch in pool:
                client.forward_backward(batch.data(), "importance_sampling")
                client.optim_step(adam)
                await pool.publish(client)

    With a blocking service it is `with`, `for`, and `pool.publish(client).result()`. A pool is used
    once: it starts when it is entered, and leaving cancels what is under way.

    The bound: nothing trained in batch s was sampled at weights older than s - max_lag batches.
    """

    def __init__(
        self,
        service: AsyncFiretitanServiceClient | FiretitanServiceClient | None,
        tasks: Tasks,
        rollout: Callable[..., Any],
        *,
        groups_per_batch: int,
        group_size: int,
        max_lag: int = 1,
        steps: int | None = None,
        refill: bool = False,
        order: BatchOrder = "submitted",
        steps_per_batch: int = 1,
        reward: RewardLike | Sequence[RewardLike] | None = None,
        keep: Filter | None = None,
        skip_constant_rewards: bool = False,
        max_row_tokens: int | None = None,
        deadline_s: float | None = None,
        failures: FailurePolicy | None = None,
        concurrency: int | None = None,
        seed: int = 0,
        shuffle: bool = False,
        epochs: int | None = 1,
        endpoint: Mapping[str, Any] | None = None,
        sampler: DeploymentSampler | None = None,
    ) -> None:
        """Make a pool; nothing runs before it is entered.

        Args:
            service: whose deployment is sampled; may be None if `sampler` is given and there is
                no endpoint.
            tasks: any iterable or async iterable; each task makes one group.
            rollout: `rollout(task, ctx)`, async or plain (then in a thread of its own), for each
                member. Returns a `SampledCompletion`, a `TITOTrajectoryArtifact`, a list of them,
                `(one of those, reward)`, or an `Episode`.
            groups_per_batch, max_lag, steps, refill, order: see `Plan`.
            group_size: rollouts of a task.
            steps_per_batch: optimizer steps that a batch gets; the reported lag counts them.
            reward: a function, or several, each plain or a `Reward` with its weight; added to
                what rollouts return.
            keep: a filter of a finished group's episodes, plain or async: false filters it.
            skip_constant_rewards: filter groups whose rewards are all equal.
            max_row_tokens: filter groups with a longer row; None for no limit.
            deadline_s: seconds of a rollout with all its attempts; None for no limit.
            failures: what failed rollouts mean; default `FailurePolicy()`.
            concurrency: rollouts in flight at most; None leaves it to admission and the sampler.
            seed: of the run.
            shuffle: shuffle a sequence of tasks, anew in each epoch, by the seed.
            epochs: how often a sequence of tasks is read; None without end.
            endpoint: options of the agents' endpoint, as of `TITOSidecar.from_deployment_sampler`
                (`max_context_tokens` and `max_output_tokens` are needed); None serves none. Only
                in an async pool.
            sampler: the deployment's; default `service.create_deployment_sampler()`.

        Raises:
            InvalidArgument: a value is out of range or of the wrong kind.
        """
        if not callable(rollout):
            raise InvalidArgument(f"rollout is a function, got {type(rollout).__name__}")
        check_tasks(tasks, shuffle)
        if service is None and (sampler is None or endpoint is not None):
            raise InvalidArgument("pass a service, or a sampler and no endpoint")
        if deadline_s is not None and number("deadline_s", deadline_s, 0) == 0:
            raise InvalidArgument("deadline_s must be over 0; None is no deadline")
        for name, value in (("epochs", epochs), ("concurrency", concurrency)):
            if value is not None:
                integer(name, value, 1)
        self._work = Work(
            rollout=rollout,
            rewards=rewards_of(reward),
            group_size=integer("group_size", group_size, 1),
            deadline_s=deadline_s,
            policy=failures or FailurePolicy(),
            skip_constant_rewards=skip_constant_rewards,
            max_row_tokens=max_row_tokens,
            keep=keep,
            seed=integer("seed", seed, 0),
            slots=None if concurrency is None else asyncio.Semaphore(concurrency),
        )
        self._steps_per_batch = integer("steps_per_batch", steps_per_batch, 1)
        self._plan = Plan(groups_per_batch, max_lag, steps, refill, order)
        self._source: Callable[[], AsyncGenerator[Any, None]] = lambda: read(
            tasks, seed=seed, shuffle=shuffle, epochs=epochs
        )
        self._service, self._sampler, self._endpoint = service, sampler, endpoint
        self._own_sampler = sampler is None
        self._running: Running | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lease: Lease | None = None
        self._sidecar: TITOSidecar | None = None

    # -- batches -----------------------------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """Wait for the next batch.

        Raises:
            LagExceeded: it can't come before a publish, and none is under way.
            RolloutsFailed: most groups fail.
            ClientClosed: the pool is closed, or was not entered.
        """
        batch = await self._entered().next()
        if batch is None:
            raise StopAsyncIteration
        return batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._blocking(self._entered().next, "the next batch")
            if batch is None:
                return
            yield batch

    def token_counts(self) -> TokenCounts:
        """The run's sampled tokens, by what became of them."""
        return self._entered(closed_too=True).law.ledger.counts()

    # -- weights -----------------------------------------------------------------------------------

    def publish(
        self,
        client: AsyncFiretitanTrainingClient | FiretitanTrainingClient,
        name: str | None = None,
    ) -> APIFuture[WeightSyncResult]:
        """Sync the client's weights into the deployment, and count the batches handed out as live.

        Call it after the passes and steps of a batch were submitted; they need not be awaited.

        Args:
            client: the training client, of the pool's service.
            name: of the snapshot, as for `weight_sync`.

        Returns:
            A future that ends when every replica serves the weights.

        Raises, through the future:
            RequestFailed, HotLoadFailed, HotLoadTimeout: as `weight_sync`; the bound then stays
                where it was, and publishing again is allowed.
        """
        running = self._entered()
        assert self._loop is not None
        # Both are taken now: the snapshot's place in the line is behind the batch's operations.
        syncing, batches = client.weight_sync(name), running.law.handed_out
        running.begin_publish()
        label = "publishing weights"
        return APIFuture(spawn_on(self._loop, running.publish, syncing, batches, label=label))

    def evaluate(
        self,
        tasks: Sequence[Any],
        rollout: Callable[..., Any] | None = None,
        *,
        group_size: int = 1,
        reward: RewardLike | Sequence[RewardLike] | None = None,
        tries: int = 3,
    ) -> APIFuture[Sequence[RolloutGroup]]:
        """Run rollouts that are not trained, all at one snapshot.

        They share the pool's sampler, `concurrency` and deadline. Rollouts at another snapshot than
        the newest that was seen are sampled again, so that weights may move meanwhile.

        Args:
            tasks: each makes one group.
            rollout: default the pool's.
            group_size: rollouts of a task.
            reward: default the pool's.
            tries: rounds at most, until all are at one snapshot.

        Returns:
            A future of one group a task, in their order; see its `outcome`.

        Raises, through the future:
            SnapshotMoved: weights moved in each of the rounds.
        """
        running = self._entered()
        assert self._loop is not None
        work = replace(
            running.work,
            rollout=rollout or running.work.rollout,
            group_size=integer("group_size", group_size, 1),
            rewards=running.work.rewards if reward is None else rewards_of(reward),
            skip_constant_rewards=False,
            max_row_tokens=None,
            keep=None,
        )
        rounds = integer("tries", tries, 1)
        label = "an evaluation"
        return APIFuture(
            spawn_on(self._loop, running.evaluate, work, list(tasks), rounds, label=label)
        )

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start; the sampler is made first, unless one was given."""
        self._check_unused()
        if self._sampler is None:
            made: Any = cast(Any, self._service).create_deployment_sampler()
            self._sampler = await made if inspect.isawaitable(made) else made
        try:
            self._loop = asyncio.get_running_loop()
            endpoints = None if self._endpoint is None else await self._open_endpoint()
            await self._start(endpoints)
        except BaseException:
            await self._release()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancel what is under way, and close; idempotent."""
        try:
            if self._running is not None:
                await self._running.close()
        finally:
            await self._release()

    def __enter__(self) -> Self:
        """Start on the background loop."""
        self._check_unused()
        if self._endpoint is not None:
            raise InvalidArgument("endpoint= needs an async pool: `async with RolloutPool(...)`")
        if self._sampler is None:
            made = cast(Any, self._service).create_deployment_sampler()
            if inspect.isawaitable(made):
                made.close()  # type: ignore[attr-defined]
                raise InvalidArgument(
                    "an async service needs `async with RolloutPool(...)`; `with` takes a "
                    "FiretitanServiceClient"
                )
            self._sampler = made
        self._lease = Lease()
        self._loop = self._lease.loop
        try:
            wait_for(spawn_on(self._loop, self._start, None, label="starting the pool"))
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is under way, and close; idempotent."""
        if self._lease is None:
            return
        try:
            self._blocking(self.__aexit__, "closing the pool")
        finally:
            self._lease.release()
            self._lease = None

    async def _start(self, endpoints: tuple[TITOSidecar, EndpointSampler] | None) -> None:
        assert self._sampler is not None
        work = replace(self._work, sampler=self._sampler, endpoints=endpoints)
        self._running = Running(self._plan, work, self._steps_per_batch)
        self._running.start(self._source())

    async def _open_endpoint(self) -> tuple[TITOSidecar, EndpointSampler]:
        from fireworks_training.tito import ChatTemplateRenderer, TITOSidecar

        assert self._sampler is not None
        options = dict(self._endpoint or {})
        if "renderer" not in options:
            tokenizer = await cast(Any, self._service).get_tokenizer()
            options["renderer"] = ChatTemplateRenderer(tokenizer)
        noting = EndpointSampler(self._sampler)
        make: Any = TITOSidecar
        self._sidecar = sidecar = cast(TITOSidecar, make(noting, **options))
        await sidecar.start()
        return sidecar, noting

    async def _release(self) -> None:
        try:
            if self._sidecar is not None:
                await self._sidecar.close()
        finally:
            self._sidecar = None
            if self._own_sampler and self._sampler is not None:
                await self._sampler.aclose()

    def _check_unused(self) -> None:
        if self._loop is not None:
            raise ClientClosed("a RolloutPool is used once: make a new one")

    def _entered(self, *, closed_too: bool = False) -> Running:
        if self._running is None:
            raise ClientClosed("the pool has not started: use it inside `async with` or `with`")
        if self._running.closed and not closed_too:
            raise ClientClosed("the pool is closed: make a new one")
        return self._running

    def _blocking(self, work: Callable[..., Any], label: str) -> Any:
        if self._lease is None:
            raise ClientClosed(
                "`for` needs a pool entered by `with`; `async for` one by `async with`"
            )
        return wait_for(spawn_on(self._lease.loop, work, label=label))
