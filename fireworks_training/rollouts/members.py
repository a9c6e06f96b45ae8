"""Runs the rollouts of one group: attempts, deadlines, lost members, rewards, filters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fireworks_training.rollouts.batches import RolloutGroup
from fireworks_training.rollouts.context import (
    AttemptNotes,
    EndpointSampler,
    RolloutContext,
    RolloutSampler,
)
from fireworks_training.rollouts.episodes import Episode, episode_of
from fireworks_training.rollouts.failures import FailurePolicy, Verdict, is_transient
from fireworks_training.rollouts.law import Outcome, seed_of
from fireworks_training.rollouts.plain_calls import call
from fireworks_training.rollouts.rewards import Reward, rewarded
from fireworks_training.rollouts.token_ledger import TokenLedger

if TYPE_CHECKING:
    from fireworks_training import DeploymentSampler, TITOSidecar

Filter = Callable[[Sequence[Episode]], Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What all groups of a pool have in common.

    Attributes:
        rollout: the user's function of a task and a context.
        rewards: added to what rollouts set.
        group_size: members of a group.
        deadline_s: of a rollout, with all its attempts; None for none.
        policy: what a failed rollout means.
        skip_constant_rewards: whether groups whose rewards are all equal are filtered.
        max_row_tokens: groups with a longer row are filtered; None for no limit.
        keep: the user's filter: plain or async, of a group's episodes; None keeps all.
        seed: of the run.
        slots: bounds the rollouts in flight; None does not.
        sampler, endpoints: what the rollouts sample with; set when the pool starts.
    """

    rollout: Callable[..., Any]
    rewards: Sequence[Reward]
    group_size: int
    deadline_s: float | None
    policy: FailurePolicy
    skip_constant_rewards: bool
    max_row_tokens: int | None
    keep: Filter | None
    seed: int
    slots: asyncio.Semaphore | None
    sampler: DeploymentSampler | None = None
    endpoints: tuple[TITOSidecar, EndpointSampler] | None = None


class GroupLost(Exception):
    """A group has lost more members than its policy allows; internal."""

    def __init__(self, outcome: Outcome, error: BaseException) -> None:
        super().__init__(str(error))
        self.outcome: Outcome = outcome
        self.error = error


class GroupRun:
    """Runs one group, and notes its tokens in the ledger as its attempts end."""

    def __init__(
        self, work: Work, ledger: TokenLedger, number: int, task: Any, version: int = 0
    ) -> None:
        self._work, self._ledger = work, ledger
        self._number, self._task, self._version = number, task, version
        self._lost = self._attempts = 0

    async def run(self) -> RolloutGroup:
        """Run the members to their ends, and judge the group; only cancellation is raised."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        episodes: Sequence[Episode] = ()
        outcome: Outcome = "done"
        error: BaseException | None = None
        try:
            episodes = await self._members()
            episodes = await rewarded(episodes, self._task, self._work.rewards)
            reason = await self._filtered(episodes)
            if reason:
                outcome = "filtered"
        except GroupLost as lost:
            outcome = lost.outcome
            error = lost.error
            reason = f"{type(error).__name__}: {error}"
        except Exception as failure:  # of a reward function or a filter
            outcome = "failed"
            error = failure
            reason = f"{type(error).__name__}: {error}"
        if outcome == "done":
            self._ledger.done(self._number, sum(episode.sampled for episode in episodes))
        else:
            self._ledger.untrained(self._number, "filtered" if outcome == "filtered" else "failed")
        return RolloutGroup(
            self._number,
            self._task,
            outcome,
            reason,
            episodes if outcome in ("done", "filtered") else (),
            self._attempts,
            self._lost,
            loop.time() - started,
            error,
            self._version,
        )

    async def _members(self) -> list[Episode]:
        tasks = [
            asyncio.create_task(self._member(member), name=f"rollout {self._number}.{member}")
            for member in range(self._work.group_size)
        ]
        try:
            for task in asyncio.as_completed(tasks):
                await task  # the first that loses the group ends the others
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [episode for task in tasks if (episode := task.result()) is not None]

    async def _member(self, member: int) -> Episode | None:
        """Run a rollout until it returns an episode; None if the group goes on without it."""
        if self._work.slots is None:
            return await self._within_deadline(member)
        async with self._work.slots:
            return await self._within_deadline(member)

    async def _within_deadline(self, member: int) -> Episode | None:
        deadline = asyncio.timeout(self._work.deadline_s)
        try:
            async with deadline:
                return await self._attempts_of(member)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            late = TimeoutError(f"the rollout took more than {self._work.deadline_s} s")
            late.__cause__ = error
            if self._verdict(0, transient=False) == "lose_member":
                self._lost += 1
                return None
            raise GroupLost("timed_out", late) from error

    async def _attempts_of(self, member: int) -> Episode | None:
        attempt = 0
        while True:
            attempt += 1
            self._attempts += 1
            try:
                return await self._attempt(member, attempt)
            except Exception as error:
                verdict = self._verdict(attempt, transient=is_transient(error))
                if verdict == "lose_group":
                    raise GroupLost("failed", error) from error
                if verdict == "lose_member":
                    self._lost += 1
                    return None

    def _verdict(self, attempts: int, *, transient: bool) -> Verdict:
        return self._work.policy.verdict(
            transient=transient,
            attempts=attempts,
            lost=self._lost,
            group_size=self._work.group_size,
        )

    async def _attempt(self, member: int, number: int) -> Episode:
        noted, work = AttemptNotes(), self._work
        assert work.sampler is not None
        seed = seed_of(work.seed, self._number, member)
        context = RolloutContext(
            RolloutSampler(work.sampler, noted, seed),
            seed,
            self._number,
            member,
            number,
            noted,
            work.endpoints,
        )
        episode: Episode | None = None
        try:
            returned = await call(work.rollout, self._task, context)
            episode = episode_of(returned, noted.turns)
            return episode
        finally:
            # Tokens of a sampler of the user's own are seen only here.
            tokens = max(noted.tokens, 0 if episode is None else episode.sampled)
            self._ledger.sample(self._number, tokens)
            if episode is None:
                self._ledger.lose(self._number, tokens)

    async def _filtered(self, episodes: Sequence[Episode]) -> str:
        """Return why the group is not to be trained; empty if it is."""
        work = self._work
        longest = max((len(row.tokens) for e in episodes for row in e.rows), default=0)
        if work.max_row_tokens is not None and longest > work.max_row_tokens:
            return f"a row has {longest} tokens, over max_row_tokens={work.max_row_tokens}"
        if work.skip_constant_rewards and len({e.reward for e in episodes}) <= 1:
            return "constant rewards"
        if work.keep is not None and not await call(work.keep, list(episodes)):
            return "the pool's keep= said no"
        return ""
