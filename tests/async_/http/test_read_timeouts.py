"""Silent requests: which are failed and which are not, on a loop whose time the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from fireworks_training._async.http.read_timeouts import LOOKS, ReadTimeouts, SilenceTimer


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


class Request:
    """One that is watched."""

    def __init__(self) -> None:
        self.received = 0
        self.error: TimeoutError | None = None
        self.failed = asyncio.Event()

    def fail(self, error: TimeoutError) -> None:
        assert self.error is None
        self.error = error
        self.failed.set()


class Watch(SilenceTimer):
    """A watch over a limit of 10 s that notes when it is idle."""

    def __init__(self, loop: StillLoop) -> None:
        self.idled = 0
        super().__init__(10.0, loop, self._note)

    def _note(self) -> None:
        self.idled += 1


def test_a_request_that_is_silent_fails_and_one_that_is_not_goes_on(loop: StillLoop) -> None:
    watch = Watch(loop)
    silent, alive = Request(), Request()
    watch.add(silent)
    watch.add(alive)
    for _ in range(9):
        loop.pass_time(1.0)
        alive.received += 1
        assert silent.error is None
    loop.pass_time(10.0 * (1 + 2 / LOOKS) - 9)
    assert isinstance(silent.error, TimeoutError)
    assert alive.error is None
    assert len(watch) == 1
    loop.pass_time(10.0 * (1 + 2 / LOOKS))
    assert isinstance(alive.error, TimeoutError)
    assert (watch.idled, loop.timers()) == (1, [])


def test_a_blocked_loop_is_not_a_silent_server(loop: StillLoop) -> None:
    watch = Watch(loop)
    request = Request()
    watch.add(request)
    loop.now += 60.0  # nothing ran; then the socket is read before the timers, as asyncio does
    request.received += 1
    loop.pass_time(0.0)
    assert request.error is None


def test_the_timer_ends_soon_after_the_last_request(loop: StillLoop) -> None:
    watch = Watch(loop)
    for _ in range(3):  # one after another they share it
        request = Request()
        watch.add(request)
        assert len(loop.timers()) == 1
        watch.discard(request)
        watch.discard(request)
        assert request.error is None
    loop.pass_time(10.0 / LOOKS)
    assert (watch.idled, loop.timers()) == (1, [])


async def test_each_limit_has_its_watch_for_as_long_as_it_is_needed() -> None:
    stalls = ReadTimeouts()
    soon, late = Request(), Request()
    stalls.add(soon, 0.001)
    stalls.add(late, 600.0)
    await soon.failed.wait()
    await asyncio.sleep(0)  # the watch over none is idle after its look
    assert list(stalls._timers) == [600.0]
    stalls.discard(late, 600.0)
    stalls.discard(soon, 0.001)
    stalls.close()
    assert stalls._timers == {}
