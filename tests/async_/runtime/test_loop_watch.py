"""A loop that is held up is named, with the function that holds it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fireworks_training import DeploymentSampler, Event, LoopBlockedEvent
from fireworks_training._async.runtime import loop_watch
from fireworks_training._async.runtime.loop_watch import LoopWatch
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import until


class HeldLoop:
    """A loop that answers when the test says so."""

    def __init__(self) -> None:
        self.running = True
        self.posted: list[Callable[[], None]] = []

    def is_closed(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.running

    def call_soon_threadsafe(self, call: Callable[..., None], *args: Any) -> None:
        self.posted.append(lambda: call(*args))

    def answer(self) -> None:
        for call in self.posted:
            call()
        self.posted.clear()


class Scene:
    """A watch without its thread, whose looks and clock are the test's."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.now = 0.0
        self.loop = HeldLoop()
        self.told: list[tuple[float, str]] = []
        self.watch = LoopWatch(period=3600.0, clock=lambda: self.now)
        self.release = self.watch.watch(
            self.loop,  # type: ignore[arg-type]
            lambda seconds, where: self.told.append((seconds, where)),
        )
        self._caplog = caplog
        caplog.set_level(logging.WARNING, "fireworks_training.loop")

    def look(self, now: float, overslept: float = 0.0) -> None:
        self.now = now
        self.watch.check(now, overslept)

    def answer(self, now: float) -> None:
        self.now = now
        self.loop.answer()

    @property
    def lines(self) -> list[str]:
        return [record.getMessage() for record in self._caplog.records]


@pytest.fixture
def scene(caplog: pytest.LogCaptureFixture) -> Any:
    made = Scene(caplog)
    yield made
    made.release()


def test_a_lively_loop_is_never_spoken_of(scene: Scene) -> None:
    for second in range(100):
        scene.look(float(second))
        scene.answer(second + 0.4)
    assert not scene.lines
    assert not scene.told


def test_a_block_is_said_with_its_length_and_place(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[int | None]()

    def where_is(thread: int | None) -> str:
        threads.append(thread)
        return "f() at a.py:1"

    monkeypatch.setattr(loop_watch, "where_is", where_is)
    scene.look(0.0)
    scene.answer(0.1)  # the watch now knows the loop's thread: this one
    scene.look(1.0)
    scene.look(1.5)
    scene.answer(13.3)
    (line,) = scene.lines
    assert "blocked for 12.3 s in f() at a.py:1" in line
    assert threads == [threading.get_ident()]
    ((seconds, where),) = scene.told
    assert seconds == pytest.approx(12.3)
    assert where == "f() at a.py:1"


def test_a_block_without_end_is_said_while_it_lasts(scene: Scene) -> None:
    scene.look(0.0)
    for now in range(1, 100):
        scene.look(float(now))
    assert [line.split(" s ")[0][-2:] for line in scene.lines] == ["30", "90"]
    assert "still is" in scene.lines[0]


def test_a_stopped_loop_is_no_block(scene: Scene) -> None:
    scene.look(0.0)
    scene.loop.running = False
    scene.look(1.0)
    scene.look(60.0)
    scene.loop.running = True
    scene.answer(61.0)
    assert not scene.lines


def test_a_suspended_process_is_told_apart(scene: Scene) -> None:
    scene.look(0.0)
    scene.look(600.0, overslept=599.5)
    scene.answer(600.1)
    (line,) = (line for line in scene.lines if "still is" not in line)
    assert "the process stood still for 600.1 s" in line


def reward(held: threading.Event) -> None:
    """A reward function that takes its time."""
    held.wait(0.6)


async def test_a_real_block_names_the_function() -> None:
    told = asyncio.Queue[tuple[float, str]]()
    watch = LoopWatch(limit=0.2, period=0.05)
    release = watch.watch(
        asyncio.get_running_loop(), lambda seconds, where: told.put_nowait((seconds, where))
    )
    try:
        await asyncio.sleep(0.2)  # a question or two, so that the loop's thread is known
        reward(threading.Event())
        where = ""
        async with asyncio.timeout(20):
            while (
                "reward()" not in where
            ):  # a machine under load may be slow for reasons of its own
                _, where = await told.get()
        assert __file__ in where
    finally:
        release()


def test_the_thread_ends_with_the_last_loop() -> None:
    watch = LoopWatch(period=0.01)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        one, two = watch.watch(loop), watch.watch(loop)
        thread = watch._thread
        assert thread is not None
        one()
        assert thread.is_alive()
        two()
        assert not thread.is_alive()
        watch.watch(loop)  # and one that is never released: its loop is closed
        last = watch._thread
        assert last is not None
        await asyncio.to_thread(lambda: None)
        threads.append(last)

    threads: list[threading.Thread] = []
    asyncio.run(main())
    threads[0].join(20)
    assert not threads[0].is_alive()


async def test_owners_are_watched_until_they_are_released() -> None:
    def watched() -> bool:
        return id(asyncio.get_running_loop()) in loop_watch._process._loops

    owner = OwnerLoop()
    assert not watched()
    owner.get()
    assert watched()
    owner.release()
    assert not watched()


async def test_the_hook_is_told_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_watch, "_process", LoopWatch(limit=0.2, period=0.05))
    heard = list[Event]()
    async with stub.CompletionsServer() as server:
        sampler = DeploymentSampler(server.url, "m", "fw_key", on_event=heard.append)
        async with sampler:
            await sampler.sample_with_prompt_tokens([1], max_tokens=1)
            await asyncio.sleep(0.2)
            reward(threading.Event())
            await until(
                lambda: any(
                    isinstance(event, LoopBlockedEvent) and "reward()" in event.where
                    for event in heard
                )
            )
