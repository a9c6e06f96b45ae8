"""Requests for different snapshots take turns on one engine; none sees another's weights."""

from __future__ import annotations

import asyncio

import pytest

from fireworks_training.local.gateway.tinker.turns import SnapshotTurns


class Engine:
    """Holds one identity; a load is let through by hand."""

    def __init__(self) -> None:
        self.held: str | None = None
        self.loads: list[str] = []
        self.failing: set[str] = set()
        self.seen: list[tuple[str, str | None]] = []
        self.turns = SnapshotTurns(self.load)

    async def load(self, identity: str) -> None:
        self.loads.append(identity)
        await asyncio.sleep(0)
        if identity in self.failing:
            raise RuntimeError(f"no {identity}")
        self.held = identity

    async def run(self, identity: str, release: asyncio.Event | None = None) -> None:
        async with self.turns.turn(identity):
            assert self.held == identity
            self.seen.append((identity, self.held))
            if release is not None:
                await release.wait()
                assert self.held == identity


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_those_of_one_snapshot_run_together_and_others_wait() -> None:
    engine, release = Engine(), asyncio.Event()
    first = [asyncio.create_task(engine.run("a", release)) for _ in range(3)]
    await settle()
    assert len(engine.seen) == 3
    other = [asyncio.create_task(engine.run("b")) for _ in range(2)]
    late = asyncio.create_task(engine.run("a"))
    await settle()
    assert engine.loads == ["a"], "a turn is not cut short, and a late comer does not prolong it"
    assert len(engine.seen) == 3
    release.set()
    await asyncio.gather(*first, *other, late)
    assert engine.loads == ["a", "b", "a"]


async def test_a_load_that_fails_fails_only_those_who_wait_for_it() -> None:
    engine = Engine()
    engine.failing.add("x")
    results = await asyncio.gather(
        engine.run("x"), engine.run("a"), engine.run("x"), return_exceptions=True
    )
    assert [type(result) for result in results] == [RuntimeError, type(None), RuntimeError]
    await engine.run("a")
    assert engine.loads == ["x", "a"]


@pytest.mark.parametrize("waits", [1, 3, 6])
async def test_one_cancelled_at_any_moment_holds_up_nobody(waits: int) -> None:
    engine, release = Engine(), asyncio.Event()
    running = asyncio.create_task(engine.run("a", release))
    await settle()
    doomed = asyncio.create_task(engine.run("b"))
    for _ in range(waits):
        await asyncio.sleep(0)
    release.set()
    for _ in range(waits):
        await asyncio.sleep(0)
    doomed.cancel()
    await asyncio.gather(running, doomed, return_exceptions=True)
    await asyncio.wait_for(engine.run("c"), 5)
    await engine.turns.close()


async def test_a_forgotten_snapshot_is_loaded_again() -> None:
    engine = Engine()
    await engine.run("a")
    await engine.run("a")
    engine.turns.forget()
    await engine.run("a")
    assert engine.loads == ["a", "a"]
