"""The windows: the law by example, and the invariants under any sequence of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fireworks_training._core.aimd import AdaptiveWindow, AimdSettings, FixedWindow
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import ServerMetrics


def window(**settings: Any) -> AdaptiveWindow:
    return AdaptiveWindow(AimdSettings(**settings))


def run(target: AdaptiveWindow, metrics: ServerMetrics | None, *, now: float = 0.0) -> None:
    target.admit()
    target.release(metrics, now)


def queued(seconds: float) -> ServerMetrics:
    return ServerMetrics(http_status_code=200, prefill_queue_duration=seconds)


OK = ServerMetrics(http_status_code=200)
BUSY = ServerMetrics(http_status_code=503, retry_attempt=1)


def test_defaults_are_the_field_s() -> None:
    settings = AimdSettings()
    assert (settings.initial_window, settings.min_window, settings.max_window) == (8, 1, 256)
    assert (settings.prefill_queue_target, settings.ema_alpha) == (0.5, 0.3)
    assert (settings.additive_increase, settings.multiplicative_decrease) == (1.0, 0.5)
    assert (settings.adjustment_interval, settings.shrink_cooldown_s) == (32, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_window": 0},
        {"max_window": 3, "min_window": 4},
        {"initial_window": 0},
        {"prefill_queue_target": 0.0},
        {"additive_increase": -1.0},
        {"multiplicative_decrease": 1.0},
        {"multiplicative_decrease": 0.0},
        {"ema_alpha": 0.0},
        {"adjustment_interval": -1},
        {"shrink_cooldown_s": -1.0},
    ],
)
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        AimdSettings(**wrong)


def test_the_initial_window_is_brought_within_bounds() -> None:
    assert window(initial_window=500).size == 256
    assert window(initial_window=2, min_window=4).size == 4


def test_an_empty_queue_grows_the_window_by_four_an_interval() -> None:
    adaptive = window()
    for _ in range(31):
        run(adaptive, queued(0.0))
    assert adaptive.size == 8
    run(adaptive, queued(0.0))
    assert adaptive.size == 12
    assert adaptive.signal == "prefill_queue"


def test_growth_is_proportional_to_the_headroom() -> None:
    adaptive = window(adjustment_interval=1)
    run(adaptive, queued(0.25))
    assert adaptive.size == 10


def test_a_queue_over_the_target_halves_it() -> None:
    adaptive = window(adjustment_interval=1, initial_window=40)
    run(adaptive, queued(0.6))
    assert adaptive.size == 20


def test_the_mean_enters_a_moving_average_seeded_by_the_first() -> None:
    adaptive = window(adjustment_interval=2)
    run(adaptive, queued(0.1))
    run(adaptive, queued(0.3))
    assert adaptive.ema_prefill_queue == pytest.approx(0.2)
    run(adaptive, queued(1.0))
    run(adaptive, queued(1.0))
    assert adaptive.ema_prefill_queue == pytest.approx(0.3 * 1.0 + 0.7 * 0.2)


def test_statuses_say_nothing_where_a_queue_is_reported() -> None:
    adaptive = window(adjustment_interval=2)
    run(adaptive, queued(0.0))
    run(adaptive, ServerMetrics(http_status_code=429, prefill_queue_duration=0.0))
    assert adaptive.size == 12


def test_congestion_shrinks_at_once_but_once_a_cooldown() -> None:
    adaptive = window(initial_window=64)
    run(adaptive, BUSY, now=10.0)
    assert (adaptive.size, adaptive.signal) == (32, "status")
    run(adaptive, BUSY, now=10.9)
    assert adaptive.size == 32
    run(adaptive, ServerMetrics(transport_error="ConnectionFailed"), now=11.0)
    assert adaptive.size == 16


def test_a_deep_retry_shrinks_harder() -> None:
    adaptive = window(initial_window=64)
    run(adaptive, ServerMetrics(http_status_code=429, retry_attempt=3))
    assert adaptive.size == 16


def test_a_clean_interval_grows_by_one_and_a_congested_one_does_not() -> None:
    adaptive = window(adjustment_interval=2)
    run(adaptive, OK)
    run(adaptive, OK)
    assert adaptive.size == 9
    run(adaptive, BUSY)
    assert adaptive.size == 4
    run(adaptive, OK)
    assert adaptive.size == 4


def test_other_errors_count_for_nothing() -> None:
    adaptive = window(adjustment_interval=1)
    for status in (400, 404, 500, 502):
        run(adaptive, ServerMetrics(http_status_code=status))
    run(adaptive, None)
    assert adaptive.size == 8


def test_the_queue_wins_where_both_were_seen() -> None:
    adaptive = window(adjustment_interval=2)
    run(adaptive, OK)
    run(adaptive, queued(0.0))
    assert adaptive.size == 12


def test_interval_zero_adjusts_at_steps_only() -> None:
    adaptive = window(adjustment_interval=0)
    for _ in range(100):
        run(adaptive, queued(0.0))
    assert adaptive.size == 8
    adaptive.step_completed()
    assert adaptive.size == 12


def test_a_shrink_below_what_is_in_flight_is_repaid_by_releases() -> None:
    adaptive = window(initial_window=8)
    for _ in range(8):
        adaptive.admit()
    adaptive.release(BUSY, 0.0)
    assert (adaptive.size, adaptive.in_flight, adaptive.debt) == (4, 7, 3)
    for left in (2, 1, 0):
        assert not adaptive.has_room
        adaptive.release(None, 0.0)
        assert adaptive.debt == left
    assert not adaptive.has_room
    adaptive.release(None, 0.0)
    assert adaptive.has_room


def test_growth_cancels_debt() -> None:
    adaptive = window(initial_window=8, adjustment_interval=0)
    for _ in range(8):
        adaptive.admit()
    adaptive.release(BUSY, 0.0)
    assert adaptive.debt == 3
    adaptive.release(queued(0.0), 5.0)
    assert adaptive.debt == 2
    summary = adaptive.step_completed()
    assert (summary["pending_decrease"], summary["window_after"]) == (2.0, 8.0)
    assert adaptive.debt == 0
    assert adaptive.has_room


def test_the_summary_of_a_step_on_queues() -> None:
    adaptive = window()
    for _ in range(3):
        run(
            adaptive,
            ServerMetrics(prefill_queue_duration=0.1, cached_prompt_tokens=19, prompt_tokens=20),
        )
    assert adaptive.step_completed() == {
        "window": 8.0,
        "requests": 3.0,
        "avg_pq": pytest.approx(0.1),
        "avg_window": 8.0,
        "max_in_flight": 1.0,
        "window_after": 12.0,
        "cache_hit_rate": pytest.approx(0.95),
    }
    assert adaptive.step_completed() == {"window": 12.0, "requests": 0.0, "max_in_flight": 0.0}


def test_the_summary_of_a_step_on_statuses() -> None:
    adaptive = window()
    run(adaptive, OK)
    run(adaptive, BUSY)
    adaptive.note_retry_exhausted(BUSY)
    adaptive.note_retry_exhausted(OK)
    adaptive.note_retry_exhausted(None)
    assert adaptive.step_completed() == {
        "window": 4.0,
        "requests": 2.0,
        "status_responses": 2.0,
        "congestion_responses": 1.0,
        "congestion_rate": 0.5,
        "congestion_events": 1.0,
        "retry_exhaustions": 1.0,
        "avg_window": 8.0,
        "max_in_flight": 1.0,
        "window_after": 4.0,
    }
    assert set(adaptive.step_completed()) == {"window", "requests", "max_in_flight"}


def test_the_later_summary_has_the_moving_average_again() -> None:
    adaptive = window()
    run(adaptive, queued(0.2))
    adaptive.step_completed()
    run(adaptive, queued(0.2))
    assert adaptive.step_completed()["ema_pq"] == pytest.approx(0.2)


def test_a_fixed_window() -> None:
    fixed = FixedWindow(2)
    fixed.admit()
    fixed.admit()
    assert not fixed.has_room
    fixed.release(BUSY, 0.0)
    assert (fixed.size, fixed.in_flight, fixed.has_room) == (2, 1, True)
    fixed.withdraw()
    assert fixed.in_flight == 0
    assert fixed.step_completed() == {"window": 2.0}
    with pytest.raises(InvalidArgument):
        FixedWindow(0)


def test_admission_beyond_the_window_is_a_fault_of_the_caller() -> None:
    fixed = FixedWindow(1)
    fixed.admit()
    with pytest.raises(AssertionError):
        fixed.admit()


class AnyHistory(RuleBasedStateMachine):
    """Any sequence of admissions, releases, time and steps keeps the window's promises."""

    def __init__(self) -> None:
        super().__init__()
        self.adaptive = window(initial_window=6, min_window=2, max_window=12, adjustment_interval=3)
        self.now = 0.0

    @precondition(lambda self: self.adaptive.has_room)
    @rule()
    def admit(self) -> None:
        self.adaptive.admit()
        assert self.adaptive.in_flight <= self.adaptive.size

    @precondition(lambda self: self.adaptive.in_flight > 0)
    @rule(
        status=st.sampled_from([200, 400, 429, 503, None]),
        queue=st.none() | st.floats(0, 10),
        attempt=st.integers(1, 7),
        broken=st.booleans(),
    )
    def release(self, status: int | None, queue: float | None, attempt: int, broken: bool) -> None:
        metrics = ServerMetrics(
            http_status_code=status,
            prefill_queue_duration=queue,
            retry_attempt=attempt,
            transport_error="ConnectionFailed" if broken else None,
        )
        before = self.adaptive.in_flight
        self.adaptive.release(metrics, self.now)
        assert self.adaptive.in_flight == before - 1

    @precondition(lambda self: self.adaptive.in_flight > 0)
    @rule()
    def withdraw(self) -> None:
        self.adaptive.withdraw()

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def step(self) -> None:
        summary = self.adaptive.step_completed()
        assert all(isinstance(value, float) for value in summary.values())

    @rule()
    def drain(self) -> None:
        while self.adaptive.in_flight:
            self.adaptive.release(None, self.now)
        assert self.adaptive.debt == 0
        assert self.adaptive.has_room

    @invariant()
    def within_bounds(self) -> None:
        assert 2 <= self.adaptive.size <= 12
        assert self.adaptive.in_flight >= 0
        assert self.adaptive.debt == max(0, self.adaptive.in_flight - self.adaptive.size)
        assert self.adaptive.has_room == (self.adaptive.in_flight < self.adaptive.size)


TestAnyHistory = AnyHistory.TestCase


@given(st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_the_same_history_gives_the_same_window(queues: list[float]) -> None:
    first, second = window(adjustment_interval=4), window(adjustment_interval=4)
    for seconds in queues:
        run(first, queued(seconds), now=0.0)
        run(second, queued(seconds), now=1e9)
    assert first.size == second.size
