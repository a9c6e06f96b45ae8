"""Long waits are said: of many, the oldest; once at 30 s, then ever more rarely."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._core.waits.reports import FIRST_NOTICE, LOOK_EVERY, WaitReporter
from fireworks_training.testing import ManualClock


def spoken(watch: WaitReporter, until: int, start: int = 0) -> dict[int, str]:
    """What is said in each second."""
    lines = {now: watch.look(float(now)) for now in range(start, until)}
    return {now: line for now, line in lines.items() if line is not None}


def test_a_request_that_hangs_is_said_at_30_s_and_at_growing_intervals() -> None:
    watch = WaitReporter()
    watch.begin(1, "optim_step (1)", "no answer to its submit yet", 0.0)
    lines = spoken(watch, 300)
    assert list(lines) == [30, 90, 209]  # the first second that is over when it is due
    assert lines[30] == "optim_step (1): waiting for 30 s: no answer to its submit yet"


def test_what_it_waits_for_is_what_it_waits_for_now() -> None:
    watch = WaitReporter()
    wait = watch.begin(1, "forward (1)", "to be sent", 0.0)
    wait.doing = "no answer to a poll"
    assert watch.look(31.0) == "forward (1): waiting for 31 s: no answer to a poll"


def test_a_thousand_operations_behind_one_are_one_line() -> None:
    watch = WaitReporter()
    for key in range(1000):
        watch.begin(key, f"op {key}", "for the results before it", 0.0)
    lines = spoken(watch, 60)
    assert list(lines) == [30]
    assert lines[30].endswith("; 999 more wait behind it")
    watch.end(0)
    assert list(spoken(watch, 61, start=60)) == [60]  # the next oldest, not sooner


def test_short_waits_and_none_are_not_said() -> None:
    watch = WaitReporter()
    for second in range(100):
        watch.begin(second, "quick", "", float(second))
        assert watch.look(second + 29.4) is None
        watch.end(second)
        watch.end(second)
    assert len(watch) == 0
    assert watch.look(1000.0) is None


def watched(watch: WaitReporter, clock: ManualClock, until: float) -> list[tuple[float, str]]:
    """What is said, and when, by one who looks exactly when he is told to."""
    said: list[tuple[float, str]] = []
    while (when := watch.next_look(clock())) <= until:
        assert when <= clock() + LOOK_EVERY
        clock.advance(when - clock())
        line = watch.look(clock())
        if line is not None:
            said.append((clock(), line))
        elif not len(watch):
            break
    clock.advance(until - clock())
    return said


@given(st.floats(0.0, 40.0), st.floats(0.0, 1.0))
def test_a_hung_request_is_said_within_30_s_whatever_went_before(
    before: float, answered_after: float
) -> None:
    clock, watch = ManualClock(), WaitReporter()
    clock.advance(before)
    watch.begin(1, "quick", "", clock())
    clock.advance(answered_after)
    watch.begin(2, "hangs", "no answer to its submit yet", clock())
    begun = clock()
    watch.end(1)
    (said, line), *_ = watched(watch, clock, begun + 60.0)
    assert FIRST_NOTICE - 1.0 < said - begun <= FIRST_NOTICE
    assert line.startswith("hangs: waiting for 30 s: no answer to its submit yet")


def test_one_that_hung_behind_another_is_said_when_it_is_the_oldest() -> None:
    clock, watch = ManualClock(), WaitReporter()
    watch.begin(1, "first", "", clock())
    watch.begin(2, "second", "", clock())
    assert len(watched(watch, clock, 40.0)) == 1
    watch.end(1)
    (said, line), *_ = watched(watch, clock, 100.0)
    assert said <= 60.0
    assert line.startswith("second")
