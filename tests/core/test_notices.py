"""Long waits are said: of many, the oldest; once at 30 s, then ever more rarely."""

from __future__ import annotations

from fireworks_training._core.notices import Watch


def spoken(watch: Watch, until: int, start: int = 0) -> dict[int, str]:
    """What is said in each second."""
    lines = {now: watch.look(float(now)) for now in range(start, until)}
    return {now: line for now, line in lines.items() if line is not None}


def test_a_request_that_hangs_is_said_at_30_s_and_at_growing_intervals() -> None:
    watch = Watch()
    watch.begin(1, "optim_step (1)", "no answer to its submit yet", 0.0)
    lines = spoken(watch, 300)
    assert list(lines) == [30, 90, 210]
    assert lines[30] == "optim_step (1): waiting for 30 s: no answer to its submit yet"


def test_what_it_waits_for_is_what_it_waits_for_now() -> None:
    watch = Watch()
    wait = watch.begin(1, "forward (1)", "to be sent", 0.0)
    wait.doing = "no answer to a poll"
    assert watch.look(31.0) == "forward (1): waiting for 31 s: no answer to a poll"


def test_a_thousand_operations_behind_one_are_one_line() -> None:
    watch = Watch()
    for key in range(1000):
        watch.begin(key, f"op {key}", "for the results before it", 0.0)
    lines = spoken(watch, 60)
    assert list(lines) == [30]
    assert lines[30].endswith("; 999 more wait behind it")
    watch.end(0)
    assert list(spoken(watch, 61, start=60)) == [60]  # the next oldest, not sooner


def test_short_waits_and_none_are_not_said() -> None:
    watch = Watch()
    for second in range(100):
        watch.begin(second, "quick", "", float(second))
        assert watch.look(second + 29.9) is None
        watch.end(second)
        watch.end(second)
    assert len(watch) == 0
    assert watch.look(1000.0) is None
