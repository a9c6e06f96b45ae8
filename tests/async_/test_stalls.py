"""Silent streams: which are failed and which are not, on a loop whose time the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol

from fireworks_training._async.stalls import LOOKS, StallWatch


class StillLoop(asyncio.SelectorEventLoop):
    """A loop that never runs: its time and its timers are the test's."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and the timers run that are due by then."""
        end = self.now + seconds
        while (timers := sorted(self.timers())) and timers[0].when() <= end:
            self.now = max(self.now, timers[0].when())
            self.timers().remove(timers[0])
            timers[0]._run()
        self.now = end

    def timers(self) -> list[asyncio.TimerHandle]:
        """Those that are set; a cancelled one is not."""
        live = [one for one in self._scheduled if not one.cancelled()]  # type: ignore[attr-defined]
        self._scheduled[:] = live  # type: ignore[attr-defined]
        return self._scheduled  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def loop() -> Iterator[StillLoop]:
    loop = StillLoop()
    yield loop
    loop.close()


def stream(loop: StillLoop) -> aiohttp.StreamReader:
    return aiohttp.StreamReader(BaseProtocol(loop), limit=2**16, loop=loop)


def test_a_stream_that_is_silent_fails_and_one_that_is_not_goes_on(loop: StillLoop) -> None:
    watch = StallWatch(10.0, loop)
    silent, alive = stream(loop), stream(loop)
    watch.add(silent)
    watch.add(alive)
    for _ in range(9):
        loop.pass_time(1.0)
        alive.feed_data(b"x")
        assert silent.exception() is None
    loop.pass_time(10.0 * (1 + 2 / LOOKS) - 9)
    assert isinstance(silent.exception(), TimeoutError)
    assert alive.exception() is None
    assert len(watch) == 1
    loop.pass_time(10.0 * (1 + 2 / LOOKS))
    assert isinstance(alive.exception(), TimeoutError)
    assert loop.timers() == []


def test_a_blocked_loop_is_not_a_silent_server(loop: StillLoop) -> None:
    watch = StallWatch(10.0, loop)
    content = stream(loop)
    watch.add(content)
    loop.now += 60.0  # nothing ran; then the socket is read before the timers, as asyncio does
    content.feed_data(b"x")
    loop.pass_time(0.0)
    assert content.exception() is None


def test_without_streams_no_timer_runs(loop: StillLoop) -> None:
    watch = StallWatch(10.0, loop)
    content = stream(loop)
    watch.add(content)
    assert len(loop.timers()) == 1
    watch.discard(content)
    watch.discard(content)
    assert loop.timers() == []
    loop.pass_time(100.0)
    assert content.exception() is None
