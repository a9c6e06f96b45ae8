"""The windows: the law by example, and the invariants under any sequence of events."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fireworks_training._core.window.aimd import AdaptiveWindow, FixedWindow
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import ServerMetrics
from fireworks_training.testing import simulate_engine


def window(**settings: Any) -> AdaptiveWindow:
    return AdaptiveWindow(AimdSettings(**settings))


def run(target: AdaptiveWindow, metrics: ServerMetrics | None, *, now: float = 0.0) -> None:
    target.admit()
    target.release(metrics, now)


def fill(target: AdaptiveWindow) -> None:
    while target.has_room:
        target.admit()


def turn(target: AdaptiveWindow, metrics: ServerMetrics, *, now: float = 0.0) -> None:
    """A round with a full window: each slot answers once, and is filled again."""
    fill(target)
    for _ in range(target.size):
        target.release(metrics, now)
        fill(target)


def queued(seconds: float, latency: float | None = None) -> ServerMetrics:
    return ServerMetrics(
        http_status_code=200, prefill_queue_duration=seconds, client_latency=latency
    )


def after_congestion(size: int = 40) -> AdaptiveWindow:
    """A window that was congested once at twice this size, and has drained to it."""
    adaptive = window(initial_window=2 * size)
    fill(adaptive)
    for _ in range(2 * size):
        if adaptive.size < 2 * size:
            break
        adaptive.release(queued(2.0), 0.0)
    while not adaptive.has_room:  # who is admitted from here on is news
        adaptive.release(None, 0.0)
    assert adaptive.size == size
    return adaptive


OK = ServerMetrics(http_status_code=200)
BUSY = ServerMetrics(http_status_code=503, retry_attempt=1)


def test_defaults_are_the_field_s() -> None:
    settings = AimdSettings()
    assert (settings.initial_window, settings.min_window, settings.max_window) == (8, 1, 4096)
    assert (settings.prefill_queue_target, settings.ema_alpha) == (0.5, 0.3)
    assert (settings.additive_increase, settings.multiplicative_decrease) == (1.0, 0.5)
    assert (settings.adjustment_interval, settings.shrink_cooldown_s) == (256, 1.0)


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
    assert window(initial_window=5000).size == 4096
    assert window(initial_window=2, min_window=4).size == 4


def test_slow_start_triples_the_window_in_a_round_trip() -> None:
    adaptive = window()
    for size in (24, 72, 216):
        turn(adaptive, queued(0.0))
        assert adaptive.size == size
    assert adaptive.signal == "prefill_queue"


def test_a_window_that_is_never_full_does_not_grow() -> None:
    adaptive = window()
    for _ in range(100):
        run(adaptive, queued(0.0))
    assert adaptive.size == 8


def test_slow_start_ends_at_the_first_queue() -> None:
    adaptive = window()
    fill(adaptive)
    adaptive.release(queued(0.1), 0.0)
    for _ in range(3):
        fill(adaptive)
        adaptive.release(queued(0.0), 0.0)
    assert adaptive.size == 8


def test_the_first_congestion_shrinks_by_the_whole_factor() -> None:
    adaptive = window(initial_window=40)
    fill(adaptive)
    for _ in range(2):
        adaptive.release(queued(0.6), 0.0)
    assert adaptive.size == 40  # two of forty are no more than one in twenty
    adaptive.release(queued(0.6), 0.0)
    assert adaptive.size == 20


def test_one_decrease_a_congestion() -> None:
    """Requests that were sent before the decrease met the queue of the old window."""
    adaptive = window(initial_window=40)
    fill(adaptive)
    for second in range(40):
        adaptive.release(queued(5.0, latency=5.0 + second), float(second))
    assert adaptive.size == 20


def test_the_first_congestion_shrinks_to_what_was_in_service() -> None:
    """However deep that is: four slots of a second each, and a window of 64."""
    adaptive = window(initial_window=64)
    fill(adaptive)
    for wave in range(3):
        for _ in range(4):
            adaptive.release(queued(float(wave), latency=wave + 1.0), wave + 1.0)
    assert adaptive.size == 4  # 4.4: a tenth of a second may be queued
    assert adaptive.debt == 48


def test_it_waits_until_they_have_all_been_answered() -> None:
    adaptive = window(initial_window=64)
    fill(adaptive)
    for _ in range(4):
        adaptive.release(queued(0.0, latency=1.0), 1.0)
    for _ in range(3):
        adaptive.release(queued(1.0, latency=2.0), 2.0)
    assert adaptive.size == 72  # opened by the first four
    adaptive.release(queued(1.0, latency=2.0), 2.0)
    assert adaptive.size == 4


def test_a_few_that_queued_in_a_fast_start_don_t_hold_the_window_for_ever() -> None:
    adaptive = window(initial_window=40)
    fill(adaptive)
    adaptive.release(queued(0.6, latency=1.0), 1.0)
    for second in range(2, 200):
        fill(adaptive)
        adaptive.release(queued(0.0, latency=0.5), float(second))
    assert adaptive.size > 40


def test_a_request_admitted_before_the_decrease_is_no_news_even_if_it_was_sent_later() -> None:
    """A loop that handles a burst of answers sends none of the requests that they admit before it
    has handled all of them."""
    adaptive = window(initial_window=64)
    fill(adaptive)
    for _ in range(8):
        adaptive.release(queued(1.0, latency=2.0), 2.0)
    assert adaptive.size == 32  # nobody was seen in service before: by the factor
    while adaptive.in_flight > 32:
        adaptive.release(queued(9.0, latency=9.5), 12.0)
    assert adaptive.size == 32
    adaptive.release(None, 12.0)  # from here on others are admitted
    for _ in range(32):
        fill(adaptive)
        adaptive.release(queued(9.0, latency=9.5), 22.0)
    assert adaptive.size == 16


def test_a_further_congestion_shrinks_to_what_was_in_service_and_a_little() -> None:
    adaptive = after_congestion(40)
    for _ in range(40):
        fill(adaptive)
        adaptive.release(queued(0.6, latency=2.4), 10.0)
    assert adaptive.size == 31  # 30 by Little's law


def test_but_never_by_more_than_the_factor() -> None:
    adaptive = after_congestion(40)
    for _ in range(40):
        fill(adaptive)
        adaptive.release(queued(9.0, latency=9.6), 10.0)
        if adaptive.size != 40:
            break
    assert adaptive.size == 20


@pytest.mark.parametrize(("seconds", "size"), [(0.1, 41), (0.3, 40), (0.45, 40)])
def test_it_grows_below_the_set_point_and_holds_between_it_and_the_target(
    seconds: float, size: int
) -> None:
    adaptive = after_congestion(40)
    turn(adaptive, queued(seconds, latency=1.0), now=10.0)
    assert adaptive.size == size


def test_a_queue_that_went_away_starts_slow_start_again() -> None:
    adaptive = after_congestion(40)
    turn(adaptive, queued(0.1, latency=1.0), now=10.0)
    assert adaptive.size == 41
    turn(adaptive, queued(0.0, latency=1.0), now=12.0)
    assert adaptive.size == 82
    turn(adaptive, queued(0.0, latency=1.0), now=14.0)
    assert adaptive.size == 246


def test_a_window_that_was_cut_too_deep_recovers_faster_and_then_fast() -> None:
    adaptive = after_congestion(40)
    sizes: list[int] = []
    for second in range(4):
        turn(adaptive, queued(0.0, latency=0.5), now=10.0 + second)
        sizes.append(adaptive.size)
    assert sizes == [45, 50, 101, 303]


def test_the_moving_average_is_of_the_window_that_holds() -> None:
    adaptive = after_congestion(2)
    assert adaptive.ema_prefill_queue is None
    turn(adaptive, queued(0.3, latency=1.0), now=10.0)
    assert adaptive.ema_prefill_queue == pytest.approx(0.3)
    turn(adaptive, queued(0.1, latency=1.0), now=12.0)
    assert adaptive.ema_prefill_queue == pytest.approx(0.3 * 0.1 + 0.7 * 0.3)


def test_a_refusal_shrinks_the_window_also_where_a_queue_is_reported() -> None:
    adaptive = window()
    turn(adaptive, queued(0.0))
    assert adaptive.size == 24
    run_down = adaptive.in_flight
    for _ in range(run_down):
        adaptive.release(BUSY, 0.0)
    assert (adaptive.size, adaptive.signal) == (12, "prefill_queue")  # once a cooldown
    summary = adaptive.step_completed()
    assert summary["congestion_events"] == 1.0
    assert summary["congestion_responses"] == float(run_down)


def test_a_queue_time_on_a_refusal_is_no_evidence_of_room() -> None:
    adaptive = window()
    fill(adaptive)
    refused = ServerMetrics(http_status_code=429, prefill_queue_duration=0.0)
    adaptive.release(refused, 0.0)
    assert adaptive.size == 4


def test_after_a_refusal_slow_start_does_not_begin_again_below_what_was_refused() -> None:
    adaptive = window(initial_window=32)
    fill(adaptive)
    adaptive.release(BUSY, 0.0)
    assert adaptive.size == 16
    sizes: list[int] = []
    for number in range(12):
        turn(adaptive, queued(0.0, latency=0.5), now=10.0 + number)
        sizes.append(adaptive.size)
    assert max(b - a for a, b in itertools.pairwise(sizes[: sizes.index(24) + 1])) <= 4
    steps = sizes[sizes.index(24) :]
    assert steps == [*range(24, 24 + len(steps))]  # then by one, up to what was refused


def test_a_limit_that_has_moved_is_found_again_fast() -> None:
    """A server that refused everything for a while: the window fell to 1, and must not stay low."""
    adaptive = window(initial_window=64)
    for second in range(0, 40, 2):
        run(adaptive, BUSY, now=float(second))
    assert adaptive.size == 1
    rounds = 0
    while adaptive.size < 64:
        turn(adaptive, queued(0.0, latency=0.5), now=100.0 + rounds)
        rounds += 1
    assert rounds < 50  # by one a round it would take 63 of them, each one slower than the last
    answers = window(initial_window=64)
    for second in range(0, 40, 2):
        run(answers, BUSY, now=float(second))
    rounds = 0
    while answers.size < 64:
        turn(answers, OK, now=100.0 + rounds)
        rounds += 1
    assert rounds < 30


def test_what_the_newest_success_tells_decides_which_law_ends_the_round() -> None:
    """Neither law is entered for good: a server may begin to report, and may end to."""
    adaptive = window(initial_window=16)
    run(adaptive, queued(0.1))
    assert adaptive.signal == "prefill_queue"
    adaptive.step_completed()
    run(adaptive, OK)
    assert adaptive.signal == "status"
    run(adaptive, BUSY)
    assert adaptive.size == 8
    turn(adaptive, OK, now=5.0)
    turn(adaptive, OK, now=6.0)
    assert adaptive.size == 10
    adaptive.release(queued(0.1), 7.0)
    assert adaptive.signal == "prefill_queue"


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


def test_without_queue_times_a_clean_round_grows_it_and_a_congested_one_does_not() -> None:
    adaptive = window(initial_window=16)
    run(adaptive, BUSY)
    assert adaptive.size == 8
    turn(adaptive, OK, now=5.0)  # the congestion is of this round
    assert adaptive.size == 8
    turn(adaptive, OK, now=6.0)
    assert adaptive.size == 10  # by a quarter, up to three quarters of what was refused
    turn(adaptive, OK, now=7.0)
    turn(adaptive, OK, now=8.0)
    assert adaptive.size == 13  # and then by one


def test_a_refusal_of_a_request_that_is_older_than_the_shrink_is_no_news() -> None:
    adaptive = window(initial_window=64)
    run(adaptive, BUSY, now=10.0)
    late = ServerMetrics(http_status_code=503, client_latency=30.0)
    run(adaptive, late, now=20.0)
    assert adaptive.size == 32


def test_other_errors_count_for_nothing() -> None:
    adaptive = window(adjustment_interval=1)
    for status in (400, 404, 500, 502):
        run(adaptive, ServerMetrics(http_status_code=status))
    run(adaptive, None)
    assert adaptive.size == 8


def test_the_queue_wins_where_both_were_seen() -> None:
    adaptive = window()
    turn(adaptive, OK)
    assert adaptive.size == 24
    turn(adaptive, queued(0.0))
    assert (adaptive.size, adaptive.signal) == (72, "prefill_queue")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_a_queue_time_that_is_none_counts_as_not_reported(wrong: float) -> None:
    told, not_told = window(), window()
    for now in (1.0, 2.0, 3.0):
        turn(told, queued(wrong), now=now)
        turn(not_told, OK, now=now)
    assert told.size == not_told.size
    assert told.signal == not_told.signal == "status"
    assert told.step_completed() == not_told.step_completed()


def test_a_server_whose_clock_is_wrong_holds_nobody_back() -> None:
    adaptive = after_congestion()
    for _ in range(3):
        turn(adaptive, queued(0.2, latency=0.001), now=10.0)
        turn(adaptive, queued(60.0, latency=0.001), now=10.0)
    assert adaptive.hold_back(10.0) <= 0.001


def test_interval_zero_adjusts_at_steps_only() -> None:
    adaptive = window(adjustment_interval=0)
    for _ in range(3):
        turn(adaptive, queued(0.0))
    assert adaptive.size == 8
    adaptive.step_completed()
    assert adaptive.size == 16


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
    adaptive.step_completed()
    adaptive.release(OK, 5.0)
    assert adaptive.debt == 2
    summary = adaptive.step_completed()
    assert (summary["pending_decrease"], summary["window_after"]) == (2.0, 5.0)
    assert adaptive.debt == 1
    adaptive.release(None, 5.0)
    adaptive.release(None, 5.0)
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
        "ema_pq": pytest.approx(0.1),
        "avg_window": 8.0,
        "max_in_flight": 1.0,
        "window_after": 8.0,
        "cache_hit_rate": pytest.approx(0.95),
    }
    assert adaptive.step_completed() == {
        "window": 8.0,
        "requests": 0.0,
        "max_in_flight": 0.0,
        "ema_pq": pytest.approx(0.1),
    }


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


JITTERS = (0.0, 0.05, 0.2, 0.9)  # engines that serve in waves, and such that do not


@pytest.mark.parametrize("jitter", JITTERS)
@pytest.mark.parametrize("initial", [8, 256])
def test_it_finds_the_capacity_of_an_engine(initial: int, jitter: float) -> None:
    run = simulate_engine(
        window(initial_window=initial), slots=32, service=0.64, requests=2000, jitter=jitter
    )
    assert run.busy >= 0.95
    warm, _ = run.queues[500]
    assert run.queue_quantile(0.95, after=warm) <= 0.4


@pytest.mark.parametrize("jitter", JITTERS)
def test_it_follows_a_capacity_that_changes(jitter: float) -> None:
    run = simulate_engine(
        window(),
        slots=lambda now: 32 if now < 20 else 8 if now < 40 else 64,
        service=0.64,
        requests=3250,
        jitter=jitter,
    )
    assert run.busy >= 0.9


@pytest.mark.parametrize("initial", [8, 256])
def test_waves_that_are_not_spread_queue_whole_waves(
    initial: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what does not fit into a wave waits for most of the next one."""
    monkeypatch.setattr(AdaptiveWindow, "hold_back", FixedWindow.hold_back)
    run = simulate_engine(
        window(initial_window=initial), slots=32, service=0.64, requests=2000, jitter=0.0
    )
    warm, _ = run.queues[500]
    assert run.queue_quantile(0.95, after=warm) > 0.45


def test_nothing_is_held_back_where_no_queue_is_reported_or_found() -> None:
    adaptive = window()
    turn(adaptive, OK)
    adaptive.release(BUSY, 1.0)
    assert [adaptive.hold_back(1.0) for _ in range(50)] == [0.0] * 50
    fast = window()
    turn(fast, queued(0.0, latency=1.0))
    assert [fast.hold_back(0.0) for _ in range(50)] == [0.0] * 50
    full = after_congestion(8)
    for _ in range(8):
        fill(full)
        full.release(queued(0.1, latency=1.0), 10.0)
    assert max(full.hold_back(10.0) for _ in range(50)) == 0.5


def test_the_field_s_law_does_not() -> None:
    """The control: without epochs, a set-point and slow start the same engine stands idle."""

    class Plain(AdaptiveWindow):
        def release(self, metrics: ServerMetrics | None, now: float) -> None:
            FixedWindow.release(self, metrics, now)
            assert metrics is not None
            self.means = [*getattr(self, "means", []), metrics.prefill_queue_duration or 0.0]
            if len(self.means) == 32:
                mean = sum(self.means) / 32
                self.ema = 0.3 * mean + 0.7 * getattr(self, "ema", mean)
                over = self.ema > 0.5
                self._window = max(1.0, self._window / 2) if over else self._window + 1.0
                self.means = []

    run = simulate_engine(Plain(AimdSettings()), slots=32, service=0.64, requests=2000)
    assert run.busy < 0.9


@pytest.mark.parametrize("jitter", JITTERS)
def test_without_queue_times_it_lives_with_an_engine_that_refuses(jitter: float) -> None:
    run = simulate_engine(
        window(),
        slots=32,
        service=0.64,
        requests=2000,
        jitter=jitter,
        queue_limit=32,
        reports_queue=False,
    )
    assert run.busy >= 0.95
    assert run.refused <= 100


@pytest.mark.parametrize("jitter", JITTERS)
def test_refusals_beside_queue_times_are_obeyed(jitter: float) -> None:
    """An engine that reports the (short) queue of what it takes, and refuses the rest."""
    run = simulate_engine(
        window(),
        slots=32,
        service=0.64,
        requests=2000,
        jitter=jitter,
        queue_limit=4,
        reports_queue=True,
    )
    assert run.busy >= 0.8
    assert run.refused <= 100


def test_the_simulated_engine_serves_everything_once() -> None:
    run = simulate_engine(FixedWindow(8), slots=4, service=1.0, requests=20, network=0.0, lag=0.0)
    assert len(run.queues) == 20
    assert run.seconds == 5.0
    assert run.busy == 1.0
    assert run.queue_quantile(1.0) == 1.0
