"""Carries the law out on a loop: starts groups, takes their ends, and waits for batches."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fireworks_training.errors import ClientClosed
from fireworks_training.futures import APIFuture
from fireworks_training.models import WeightSyncResult
from fireworks_training.rollouts.batches import Batch, RolloutGroup
from fireworks_training.rollouts.errors import RolloutsFailed, SnapshotMoved
from fireworks_training.rollouts.failures import Breaker
from fireworks_training.rollouts.law import Admission, Numbers, Plan
from fireworks_training.rollouts.members import GroupRun, Work
from fireworks_training.rollouts.token_ledger import TokenLedger


class Signal:
    """Wakes all that wait for a change; each looks again for itself."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def notify(self) -> None:
        """Wake those that wait now."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Running:
    """A pool that runs; all but `begin_publish` belongs to its loop.

    Attributes:
        law: the admission.
        work: what its groups have in common.
        closed: whether it was closed.
    """

    def __init__(self, plan: Plan, work: Work, steps_per_batch: int) -> None:
        self.law, self.work, self.closed = Admission(plan), work, False
        self._steps_per_batch = steps_per_batch
        self._breaker = Breaker(work.policy)
        self._changed = Signal()
        self._feeder: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._groups: dict[int, RolloutGroup] = {}
        self._failure: BaseException | None = None
        self._held_back = False  # there is a task that may not start yet
        self._publishing, self._counting = 0, threading.Lock()
        self._versions: dict[str | None, int] = {}
        self._ended, self._ended_s, self._trained, self._trained_s = 0, 0.0, 0, 0.0

    # -- groups ------------------------------------------------------------------------------------

    def start(self, source: AsyncGenerator[Any, None]) -> None:
        """Begin to start groups."""
        self._feeder = asyncio.create_task(self._feed(source), name="rollout pool")

    async def _feed(self, source: AsyncGenerator[Any, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for task in source:
                    await self._admission()
                    number = self.law.start()
                    running = asyncio.create_task(self._run(number, task), name=f"group {number}")
                    self._tasks.add(running)
                    running.add_done_callback(self._tasks.discard)
                    await asyncio.sleep(0)  # many tasks must not hold up the loop
            self.law.exhausted()
        except Exception as error:  # the caller's iterable
            self._failure = self._failure or error
        finally:
            self._changed.notify()

    async def _admission(self) -> None:
        while not self.law.may_start():
            self._held_back = True
            self._changed.notify()  # whoever waits may learn that its batch can't come
            await self._changed.wait()
        self._held_back = False

    async def _run(self, number: int, task: Any) -> None:
        version = self.law.admitted_at[number]
        group = await GroupRun(self.work, self.law.ledger, number, task, version).run()
        self._groups[number] = group
        self._ended, self._ended_s = self._ended + 1, self._ended_s + group.duration_s
        self.law.ended(number, group.outcome)
        tripped = self._breaker.note(failed=group.outcome in ("failed", "timed_out"))
        if tripped is not None and self._failure is None:
            failed, ended = tripped
            self._failure = RolloutsFailed(
                f"{failed} of the last {ended} groups failed, the newest of them with "
                f"{group.reason or 'no reason'}: mend what they met, then make a new pool "
                "(FailurePolicy sets how many may fail)",
                failed=failed,
                ended=ended,
                cause=group.error,
            )
        self._changed.notify()

    # -- batches -----------------------------------------------------------------------------------

    async def next(self) -> Batch | None:
        """Wait for the next batch; None when there is none any more."""
        while True:
            if self.closed:
                raise ClientClosed("the pool is closed: make a new one")
            if self._failure is not None:
                raise self._failure
            if self.law.finished():
                return None
            if self.law.ready():
                batch = self._batch(self.law.take())
                self._changed.notify()
                return batch
            if self._held_back and not self._publishing:
                self.law.check_can_come()
            await self._changed.wait()

    def _batch(self, numbers: Numbers) -> Batch:
        groups = [self._groups.pop(number) for number in numbers.trained]
        untrained = [self._groups.pop(number) for number in numbers.untrained]
        self._trained += len(groups)
        self._trained_s += sum(group.duration_s for group in groups)
        versions: dict[str | None, int] = {}
        for group in groups:
            for identity in identities(group):
                # A group samples at what served when it started, or newer.
                version = max(self._versions.get(identity, 0), group.version)
                versions[identity] = min(version, versions.get(identity, version))
        lag = max((numbers.batch - version for version in versions.values()), default=None)
        return Batch(
            numbers.batch,
            groups,
            untrained,
            versions,
            None if lag is None else lag * self._steps_per_batch,
            self._bias(),
        )

    def _bias(self) -> float:
        if not self._trained or not self._ended_s:
            return 1.0
        return (self._trained_s / self._trained) / (self._ended_s / self._ended)

    # -- weights -----------------------------------------------------------------------------------

    def begin_publish(self) -> None:
        """Note, from any thread, that a publish is under way: batches may wait for it."""
        with self._counting:
            self._publishing += 1

    async def publish(self, syncing: APIFuture[WeightSyncResult], batches: int) -> WeightSyncResult:
        """Wait until every replica serves weights that `batches` batches trained."""
        try:
            result = await syncing
            known = self._versions.get(result.identity, 0)
            self._versions[result.identity] = max(batches, known)
            self.law.publishes(batches)
            return result
        finally:
            with self._counting:
                self._publishing -= 1
            self._changed.notify()

    async def evaluate(
        self, work: Work, tasks: Sequence[Any], rounds: int
    ) -> Sequence[RolloutGroup]:
        """Run groups that are not trained, until all are at one snapshot."""
        evaluating = asyncio.current_task()
        assert evaluating is not None
        self._tasks.add(evaluating)
        evaluating.add_done_callback(self._tasks.discard)
        groups: dict[int, RolloutGroup] = {}
        ledger = TokenLedger()
        seen: dict[str | None, None] = {}  # in the order in which they came up
        for _ in range(rounds):
            missing = [number for number in range(len(tasks)) if number not in groups]
            async with asyncio.TaskGroup() as together:
                runs = [
                    together.create_task(GroupRun(work, ledger, number, tasks[number]).run())
                    for number in missing
                ]
            for run in runs:
                group = run.result()
                groups[group.number] = group
            for number in missing:  # in an order that is the same in every run
                seen.update(dict.fromkeys(sorted(identities(groups[number]), key=str)))
            now = set[str | None]().union(*(identities(group) for group in groups.values()))
            if len(now) <= 1:
                return [groups[number] for number in range(len(tasks))]
            order = list(seen)
            newest = max(now, key=lambda i: (self._versions.get(i, -1), order.index(i)))
            for number in [n for n, g in groups.items() if identities(g) - {newest}]:
                del groups[number]
        raise SnapshotMoved(
            f"the weights moved in each of {rounds} rounds of an evaluation: await it before the "
            "next publish, or give it fewer tasks"
        )

    # -- the end -----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Cancel what is under way, wait for its end, and close the ledger. Idempotent."""
        if self.closed:
            return
        self.closed = True
        tasks = [*self._tasks, *([self._feeder] if self._feeder else [])]
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self.law.ledger.close()
            self._changed.notify()


def identities(group: RolloutGroup) -> set[str | None]:
    """The snapshots that sampled the group's tokens; None where the server reported none."""
    return {
        identity
        for episode in group.episodes
        for row in episode.rows
        for identity, sampled in zip(row.snapshots, row.loss_mask, strict=True)
        if sampled
    }
