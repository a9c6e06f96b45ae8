"""Running tasks: known by their keys until they end, and ended together."""

from __future__ import annotations

import asyncio

from fireworks_training.local.gateway.web.tasks import RunningTasks


async def test_a_task_is_known_until_it_has_ended() -> None:
    tasks = RunningTasks[str]()
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()

    task = tasks.start("a", work(), "its name")
    assert (list(tasks), "a" in tasks, tasks.get("a")) == (["a"], True, task)
    assert task.get_name() == "its name"
    gate.set()
    await task
    await asyncio.sleep(0)
    assert (list(tasks), "a" in tasks, tasks.get("a")) == ([], False, None)


async def test_a_task_whose_key_was_taken_does_not_remove_its_successor() -> None:
    tasks = RunningTasks[str]()
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()

    async def nothing() -> None:
        return

    first = tasks.start("a", nothing())
    second = tasks.start("a", work())
    await first
    await asyncio.sleep(0)
    assert tasks.get("a") is second
    gate.set()
    await second


async def test_cancelling_waits_for_the_end() -> None:
    tasks = RunningTasks[str]()
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)

    for name in "abc":
        tasks.start(name, work(name))
    await asyncio.sleep(0)
    assert await tasks.cancel("b") is True
    assert ended == ["b"]
    assert await tasks.cancel("b") is False
    await tasks.close()
    assert ended == ["b", "a", "c"]
