"""The clock that a test moves, and the engine in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from fireworks_training import AdaptiveConcurrencyController, InvalidArgument, ServerMetrics
from fireworks_training.testing import AimdSettings, ManualClock, simulate_engine

ENGINE: dict[str, Any] = {"slots": 8, "service": 1.0, "requests": 200}


def test_a_clock_moves_only_forward() -> None:
    clock = ManualClock(5.0)
    clock.advance(0.5)
    assert clock() == 5.5
    with pytest.raises(InvalidArgument, match="can't go back by 1"):
        clock.advance(-1)


def test_a_controller_takes_the_clock() -> None:
    assert AdaptiveConcurrencyController(clock=ManualClock()).window_size == 8


def test_a_fixed_window_by_its_size() -> None:
    run = simulate_engine(4, **ENGINE)
    assert run.windows == [(0.0, 4)]
    assert run.queue_quantile(1.0) == 0.0  # eight slots for four requests at once
    assert run.busy < 0.6
    with pytest.raises(InvalidArgument):
        simulate_engine(0, **ENGINE)


def test_an_adaptive_window_by_the_arguments_of_its_controller() -> None:
    run = simulate_engine(AimdSettings(initial_window=2), **ENGINE)
    assert run.windows[0] == (0.0, 2)
    assert max(size for _, size in run.windows) >= 8
    bounded = simulate_engine(AimdSettings(initial_window=2, max_window=3), **ENGINE)
    assert max(size for _, size in bounded.windows) == 3


def test_a_window_of_ones_own() -> None:
    class Alternating:
        """One request, then two, then one."""

        def __init__(self) -> None:
            self.size = 1
            self.in_flight = 0

        @property
        def has_room(self) -> bool:
            return self.in_flight < self.size

        def admit(self) -> None:
            self.in_flight += 1

        def hold_back(self, now: float) -> float:
            return 0.0

        def release(self, metrics: ServerMetrics | None, now: float) -> None:
            self.in_flight -= 1
            self.size = 3 - self.size

    run = simulate_engine(Alternating(), slots=2, service=1.0, requests=20)
    assert {size for _, size in run.windows} == {1, 2}
    assert len(run.queues) == 20
