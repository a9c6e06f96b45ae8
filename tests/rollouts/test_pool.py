"""The pool on a loop: batches, publishes, failures, deadlines, cancellation, and its ledger."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fireworks_training import ClientClosed, InvalidArgument, RateLimited
from fireworks_training.rollouts import (
    Batch,
    FailurePolicy,
    LagExceeded,
    Reward,
    RolloutContext,
    RolloutsFailed,
    SnapshotMoved,
)
from tests.rollouts.fakes import Trainer, episode, pool_of


async def train(pool: Any, trainer: Trainer | None = None) -> list[Batch]:
    """Take all batches, publishing after each."""
    trainer, batches = trainer or Trainer(), []
    async with pool:
        async for batch in pool:
            batches.append(batch)
            await pool.publish(trainer)
    assert pool.token_counts().closes
    return batches


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [[group.number for group in batch.groups] for batch in batches]


async def good(task: Any, ctx: RolloutContext) -> Any:
    return episode(float(task))


async def test_batches_in_order_with_all_kinds_of_tasks() -> None:
    async def stream() -> AsyncIterator[int]:
        for task in range(5):
            yield task

    for tasks in (range(5), list(range(5)), iter(range(5)), stream()):
        batches = await train(pool_of(tasks, good))
        assert numbers(batches) == [[0, 1], [2, 3], [4]]
        assert [batch.mean_reward for batch in batches] == [0.5, 2.5, 4.0]


async def test_slow_groups_hold_their_place_and_the_ones_behind_them_are_kept() -> None:
    gate, began = asyncio.Event(), list[int]()

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        began.append(task)
        if task == 0:
            await gate.wait()
        return episode()

    async with pool_of(range(6), rollout, max_lag=1) as pool:
        first = asyncio.ensure_future(anext(pool))
        for _ in range(60):
            await asyncio.sleep(0)
        assert began == [0, 1, 2, 3]  # (0 + 1 + 1) * 2, and no more
        assert not first.done()
        gate.set()
        assert [group.number for group in (await first).groups] == [0, 1]
        await pool.publish(Trainer())  # type: ignore[arg-type]
        assert [group.number for group in (await anext(pool)).groups] == [2, 3]


async def test_without_a_publish_the_batch_that_cannot_come_raises_at_once() -> None:
    async with pool_of(range(8), good, max_lag=1) as pool:
        await anext(pool)
        await anext(pool)
        with pytest.raises(LagExceeded, match="batch 2"):
            await anext(pool)
        await pool.publish(Trainer())  # type: ignore[arg-type]
        assert (await anext(pool)).number == 2


async def test_a_batch_waits_for_a_publish_that_is_under_way_and_a_failed_one_may_be_repeated() -> (
    None
):
    trainer = Trainer()
    trainer.at_once = False
    async with pool_of(range(4), good, max_lag=0) as pool:
        await anext(pool)
        publishing = pool.publish(trainer)  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(anext(pool))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        trainer.syncs[0].set_exception(RateLimited("full", status=429))
        with pytest.raises(RateLimited):
            await publishing
        with pytest.raises(LagExceeded):
            await waiting
        trainer.at_once = True
        await pool.publish(trainer)  # type: ignore[arg-type]
        assert (await anext(pool)).number == 1


async def test_the_last_batch_needs_no_publish_to_end_the_loop() -> None:
    async with pool_of(range(4), good, max_lag=0) as pool:
        await anext(pool)
        await pool.publish(Trainer())  # type: ignore[arg-type]
        await anext(pool)
        with pytest.raises(StopAsyncIteration):
            await anext(pool)


async def test_lag_is_that_of_the_oldest_token_in_optimizer_steps() -> None:
    live = ["base"]
    trainer = Trainer()

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        return episode(snapshot=live[-1])

    batches = []
    async with pool_of(range(8), rollout, max_lag=1, steps_per_batch=3) as pool:
        async for batch in pool:
            batches.append(batch)
            await pool.publish(trainer)  # type: ignore[arg-type]
            live.append(f"s{len(trainer.syncs)}")
    assert batches[0].lag == 0
    assert batches[1].lag == 3
    assert all(batch.lag is not None and batch.lag <= 3 for batch in batches)
    assert batches[0].versions == {"base": 0}


@pytest.mark.parametrize(
    ("options", "outcome", "words"),
    [
        ({"skip_constant_rewards": True, "group_size": 2}, "filtered", "constant"),
        ({"max_row_tokens": 3}, "filtered", "max_row_tokens=3"),
        ({"keep": lambda episodes: False}, "filtered", "keep"),
        ({"reward": lambda e, task: float("nan")}, "failed", "finite"),
        ({"reward": lambda e, task: "good"}, "failed", "finite"),
        ({"reward": Reward(lambda es, task: [], of="group")}, "failed", "0 numbers for 1"),
    ],
)
async def test_groups_that_are_not_trained_say_why(
    options: dict[str, Any], outcome: str, words: str
) -> None:
    async def rollout(task: int, ctx: RolloutContext) -> Any:
        return episode(1.0)

    pool = pool_of(range(4), rollout, max_lag=0, **options)
    batches = await train(pool)
    assert numbers(batches) == [[], []]  # empty batches come, and count
    groups = [group for batch in batches for group in batch.untrained]
    assert [group.outcome for group in groups] == [outcome] * 4
    assert all(words in group.reason for group in groups)
    counts = pool.token_counts()
    assert counts.trained == 0
    assert counts.sampled == counts.filtered + counts.failed > 0


async def test_rewards_plain_async_per_group_and_weighted_are_added() -> None:
    threads = []

    def length(e: Any, task: int) -> Any:
        threads.append(threading.current_thread())
        return e.sampled

    async def quality(e: Any, task: int) -> float:
        return 10.0

    def ranks(es: Any, task: int) -> list[int]:
        return list(range(len(es)))

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        return episode(None)

    rewards = [length, Reward(quality, 0.5), Reward(ranks, 100, of="group")]
    (batch,) = await train(pool_of([0], rollout, group_size=2, reward=rewards))
    assert batch.groups[0].rewards == [8.0, 108.0]
    assert batch.groups[0].advantages() == [-50.0, 50.0]
    assert len(batch.data()) == 2
    assert threading.main_thread() not in threads


async def test_nonsense_is_a_failure_with_words_and_the_run_goes_on() -> None:
    nonsense: list[Any] = [None, "text", {"a": 1}, (episode(None), float("inf")), [], episode(None)]

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        return nonsense[task] if task < len(nonsense) else episode()

    policy = FailurePolicy(breaker_in_a_row=50, breaker_window=50)
    batches = await train(pool_of(range(8), rollout, failures=policy))
    untrained = [group for batch in batches for group in batch.untrained]
    assert [group.number for group in untrained] == [0, 1, 2, 3, 4, 5]
    assert all(group.outcome == "failed" and group.reason for group in untrained)
    assert numbers(batches)[-1] == [6, 7]


async def test_a_transient_fault_is_repeated_and_a_permanent_one_is_not() -> None:
    calls: dict[int, int] = {}

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        calls[task] = calls.get(task, 0) + 1
        assert ctx.attempt == calls[task]
        if task == 0 and ctx.attempt < 3:
            raise RateLimited("full", status=429)
        if task == 1:
            raise InvalidArgument("the prompt does not fit")
        if task == 2:
            raise ConnectionResetError
        return episode()

    batches = await train(pool_of(range(4), rollout))
    assert calls == {0: 3, 1: 1, 2: 3, 3: 1}
    assert numbers(batches) == [[0], [3]]
    assert batches[0].groups[0].attempts == 3


async def test_a_group_shrinks_or_is_dropped_when_it_loses_a_member() -> None:
    async def rollout(task: int, ctx: RolloutContext) -> Any:
        if ctx.member == 1:
            raise ValueError("no")
        return episode(float(ctx.member))

    shrink = FailurePolicy(lost_member="shrink", min_group_size=2)
    (batch,) = await train(pool_of([0], rollout, group_size=3, failures=shrink))
    assert batch.groups[0].rewards == [0.0, 2.0]
    assert batch.groups[0].lost == 1
    (batch,) = await train(pool_of([0], rollout, group_size=2, failures=shrink))
    assert not batch.groups
    drop = FailurePolicy(lost_member="drop")
    (batch,) = await train(pool_of([0], rollout, group_size=3, failures=drop))
    assert "ValueError: no" in batch.untrained[0].reason


@pytest.mark.parametrize("plain", [False, True])
async def test_a_rollout_that_hangs_is_timed_out(plain: bool) -> None:
    never = threading.Event()

    async def hangs(task: int, ctx: RolloutContext) -> Any:
        await asyncio.Event().wait()

    def blocks(task: int, ctx: RolloutContext) -> Any:
        never.wait()

    pool = pool_of([0], blocks if plain else hangs, deadline_s=0.01)
    (batch,) = await train(pool)
    never.set()
    assert batch.untrained[0].outcome == "timed_out"
    assert "0.01 s" in batch.untrained[0].reason


async def test_when_all_fail_the_breaker_ends_the_run_with_the_words_of_the_failure() -> None:
    async def rollout(task: int, ctx: RolloutContext) -> Any:
        raise InvalidArgument("no such model")

    async with pool_of(range(100), rollout, max_lag=9) as pool:
        with pytest.raises(RolloutsFailed, match=r"8 of the last 8 .* no such model") as it:
            while True:
                await anext(pool)
        assert isinstance(it.value.cause, InvalidArgument)


async def test_tasks_that_raise_end_the_loop_with_their_error() -> None:
    def tasks() -> Any:
        yield 0
        raise OSError("the file is gone")

    async with pool_of(tasks(), good) as pool:
        with pytest.raises(OSError, match="the file is gone"):
            await anext(pool)


async def test_leaving_cancels_what_is_under_way_and_the_ledger_closes() -> None:
    ended = []

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        if task < 3:
            return episode()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(task)

    before = asyncio.all_tasks()
    async with pool_of(range(9), rollout, max_lag=1) as pool:
        await anext(pool)
        await pool.publish(Trainer())  # type: ignore[arg-type]
        for _ in range(10):
            await asyncio.sleep(0)
    assert sorted(ended) == [3, 4, 5]
    assert asyncio.all_tasks() == before
    counts = pool.token_counts()
    assert counts.closes
    assert (counts.trained, counts.unused, counts.in_flight, counts.waiting) == (6, 3, 0, 0)
    with pytest.raises(ClientClosed):
        await anext(pool)
    with pytest.raises(ClientClosed):
        await pool.__aenter__()


@pytest.mark.parametrize("at", range(40))
async def test_cancelled_at_any_await_nothing_is_left_over(at: int) -> None:
    """The loop's task is cancelled after `at` turns of the loop."""

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        for _ in range(task % 3):
            await asyncio.sleep(0)
        return episode()

    pool = pool_of(range(20), rollout, group_size=2, concurrency=3, max_lag=1)
    before = asyncio.all_tasks()
    run = asyncio.create_task(train(pool))
    for _ in range(at):
        await asyncio.sleep(0)
    run.cancel()
    await asyncio.wait([run])
    assert asyncio.all_tasks() == before
    if pool._running is not None:
        counts = pool.token_counts()
        assert counts.closes
        assert not counts.in_flight


async def test_an_iteration_that_is_cancelled_loses_no_batch() -> None:
    gate = asyncio.Event()

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        await gate.wait()
        return episode()

    async with pool_of(range(2), rollout) as pool:
        waiting = asyncio.ensure_future(anext(pool))
        await asyncio.sleep(0)
        waiting.cancel()
        gate.set()
        assert [group.number for group in (await anext(pool)).groups] == [0, 1]


async def test_completed_order_reports_its_bias_towards_short_rollouts() -> None:
    gate = asyncio.Event()

    async def rollout(task: int, ctx: RolloutContext) -> Any:
        if task == 0:
            await gate.wait()
        return episode()

    pool = pool_of(range(6), rollout, order="completed", max_lag=2)
    async with pool:
        first = await anext(pool)
        assert [group.number for group in first.groups] == [1, 2]
        await anext(pool)
        gate.set()
        last = await anext(pool)
    assert 0 in [group.number for group in last.groups]
    assert last.bias == pytest.approx(1.0)


async def test_seeds_and_order_follow_from_the_run_seed() -> None:
    async def seen(seed: int) -> list[Any]:
        noted = []

        async def rollout(task: int, ctx: RolloutContext) -> Any:
            noted.append((ctx.group, ctx.member, task, ctx.seed))
            return episode()

        await train(pool_of(list(range(8)), rollout, seed=seed, shuffle=True, epochs=2))
        return sorted(noted)

    assert await seen(1) == await seen(1)
    assert await seen(1) != await seen(2)
    one = await seen(1)
    assert sorted(task for _, _, task, _ in one[:8]) == list(range(8))
    assert [t for _, _, t, _ in one[:8]] != [t for _, _, t, _ in one[8:]]
    assert len({seed for *_, seed in one}) == 16


async def test_an_evaluation_never_mixes_snapshots() -> None:
    drawn = iter(["a", "b", "b"])

    async def moved_once(task: int, ctx: RolloutContext) -> Any:
        return episode(float(task), snapshot=next(drawn))

    async def moves_always(task: int, ctx: RolloutContext) -> Any:
        return episode(snapshot=f"{task}")

    async with pool_of([], good) as pool:
        groups = await pool.evaluate([5, 6], moved_once)
        assert len({s for g in groups for s in g.episodes[0].rows[0].snapshots[1:]}) == 1
        assert [group.rewards for group in groups] == [[5.0], [6.0]]
        with pytest.raises(SnapshotMoved):
            await pool.evaluate([1, 2], moves_always)
        assert pool.token_counts().sampled == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"group_size": 0}, "group_size"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"concurrency": 0}, "concurrency"),
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"steps_per_batch": 0}, "steps_per_batch"),
        ({"reward": 3}, "reward"),
        ({"endpoint": {}}, "service"),
        ({"tasks": 3}, "tasks"),
        ({"tasks": iter([1]), "shuffle": True}, "shuffle"),
        ({"rollout": 3}, "rollout"),
    ],
)
def test_wrong_arguments_are_refused_when_the_pool_is_made(
    wrong: dict[str, Any], words: str
) -> None:
    arguments: dict[str, Any] = {"tasks": [1], "rollout": good, **wrong}
    with pytest.raises(InvalidArgument, match=words):
        pool_of(arguments.pop("tasks"), arguments.pop("rollout"), **arguments)


def test_the_blocking_pool_hands_out_the_same_batches() -> None:
    def rollout(task: int, ctx: RolloutContext) -> Any:
        return episode(), float(task)

    with pool_of(range(4), rollout, max_lag=1) as pool:
        batches = list(pool)
    assert [[group.rewards for group in batch.groups] for batch in batches] == [
        [[0.0], [1.0]],
        [[2.0], [3.0]],
    ]
    assert pool.token_counts().closes
