"""Calls from other threads: none lost, none twice, in order, and few wake-ups of the loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fireworks_training._inbox import call_on


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread wakes it."""

    wakes = 0

    def call_soon_threadsafe(self, *args: Any, **options: Any) -> asyncio.Handle:
        self.wakes += 1
        return super().call_soon_threadsafe(*args, **options)


def run_until_stopped(loop: asyncio.AbstractEventLoop, *works: Callable[[], None]) -> None:
    """Run a loop while each work has a thread."""
    threads = [threading.Thread(target=work) for work in works]

    def wait_for_all() -> None:
        for thread in threads:
            thread.join()
        call_on(loop, loop.stop)

    for thread in threads:
        thread.start()
    threading.Thread(target=wait_for_all).start()
    loop.run_forever()


def test_what_gathers_while_the_loop_is_busy_wakes_it_once() -> None:
    loop = CountingLoop()
    made: list[int] = []
    for number in range(1000):
        call_on(loop, partial(made.append, number))
    call_on(loop, loop.stop)
    loop.run_forever()
    loop.close()
    assert made == list(range(1000))
    assert loop.wakes == 1


def test_calls_of_many_threads_are_all_made_in_the_order_of_each() -> None:
    loop = asyncio.new_event_loop()
    made: list[tuple[int, int]] = []

    def put(thread: int) -> None:
        for number in range(2000):
            call_on(loop, partial(made.append, (thread, number)))

    run_until_stopped(loop, *(partial(put, thread) for thread in range(4)))
    loop.close()
    for thread in range(4):
        assert [number for one, number in made if one == thread] == list(range(2000))
    assert len(made) == 8000


def test_each_call_runs_in_its_context() -> None:
    loop = asyncio.new_event_loop()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    seen: list[str] = []
    for value in ("a", "b"):
        context = contextvars.copy_context()
        context.run(variable.set, value)
        call_on(loop, lambda: seen.append(variable.get()), context)
    call_on(loop, lambda: seen.append(variable.get()))
    call_on(loop, loop.stop)
    loop.run_forever()
    loop.close()
    assert seen == ["a", "b", "none"]


def test_one_that_fails_is_told_and_the_next_is_made() -> None:
    loop = asyncio.new_event_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    call_on(loop, lambda: 1 / 0)
    call_on(loop, loop.stop)
    loop.run_forever()
    loop.close()
    assert [type(one["exception"]) for one in told] == [ZeroDivisionError]


def test_what_an_interrupt_cut_off_is_made_when_the_loop_runs_again() -> None:
    loop = asyncio.new_event_loop()
    made: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    call_on(loop, interrupt)
    call_on(loop, lambda: made.append("after"))
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    call_on(loop, loop.stop)
    loop.run_forever()
    loop.close()
    assert made == ["after"]


def test_a_closed_loop_is_an_error_also_when_calls_wait_for_it() -> None:
    loop = asyncio.new_event_loop()
    call_on(loop, lambda: None)
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            call_on(loop, lambda: None)
