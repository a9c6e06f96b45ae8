"""The pacer and the count of what is in service."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training._core.window.occupancy import Occupancy
from fireworks_training._core.window.pacing import BURST, GAIN, Pacer


def paced(latency: float, longest: float = 10.0) -> Pacer:
    pacer = Pacer(longest)
    pacer.note(latency)
    return pacer


def test_nothing_is_held_back_before_a_latency_is_known() -> None:
    pacer = Pacer(0.5)
    assert [pacer.hold_back(8, 0.0) for _ in range(20)] == [0.0] * 20


def test_a_wave_is_spread_and_a_steady_stream_is_not() -> None:
    pacer = paced(1.0)
    delays = [pacer.hold_back(40, 0.0) for _ in range(40)]
    free = int(BURST * 40)
    assert delays[:free] == pytest.approx([0.0] * free)
    assert delays == sorted(delays)
    assert delays[-1] == pytest.approx((40 - free) / 40 / GAIN)
    steady = paced(1.0)
    assert max(steady.hold_back(40, index / 40) for index in range(200)) == pytest.approx(0.0)


def test_nobody_is_held_back_for_longer_than_the_target() -> None:
    pacer = paced(30.0, longest=0.5)
    assert max(pacer.hold_back(256, 0.0) for _ in range(256)) == pytest.approx(0.5)


def test_the_latency_follows() -> None:
    pacer = paced(1.0)
    for _ in range(200):
        pacer.note(4.0)
    assert [pacer.hold_back(40, 0.0) for _ in range(40)][-1] == pytest.approx(
        4.0 * 30 / 40 / GAIN, rel=0.01
    )


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=80), st.integers(1, 64))
def test_no_span_sees_more_than_a_burst_beyond_the_rate(gaps: list[float], window: int) -> None:
    pacer, now, sent = paced(1.0, longest=1e6), 0.0, list[float]()
    for gap in gaps:
        now += gap
        sent.append(now + pacer.hold_back(window, now))
    assert sent == sorted(sent)
    allowance = max(1.0, BURST * window) + 1e-6
    for first in range(len(sent)):
        for last in range(first, len(sent)):
            span = sent[last] - sent[first]
            assert last - first <= allowance + GAIN * window * span


def test_who_was_in_service_is_counted_once_answered() -> None:
    occupancy = Occupancy()
    assert occupancy.mean == 0.0
    for _ in range(4):
        occupancy.note(0.0, 1.0, keep=100)
    occupancy.measure(0.5, 1.5)
    assert occupancy.mean == 2.0  # four of them, for half of the span
    occupancy.note(1.0, 2.0, keep=100)
    assert occupancy.mean == 2.5
    occupancy.note(1.6, 2.0, keep=100)
    assert occupancy.mean == 2.5


def test_old_answers_are_forgotten() -> None:
    occupancy = Occupancy()
    for index in range(50):
        occupancy.note(float(index), index + 1.0, keep=10)
    occupancy.measure(0.0, 50.0)
    assert occupancy.mean == 10 / 50


@given(st.integers(1, 30), st.floats(0.1, 5), st.floats(0, 0.03))
def test_waves_and_streams_of_an_engine_count_as_its_slots(
    slots: int, service: float, late: float
) -> None:
    """However its slots turn over, and however late each answer is seen."""
    occupancy = Occupancy()
    for wave in range(5):
        for slot in range(slots):
            begin = (wave + slot / slots) * service + late * slot / slots
            occupancy.note(begin, begin + service, keep=1000)
    occupancy.measure(2.0 * service, 3.0 * service)
    assert occupancy.mean == pytest.approx(slots, rel=0.35 if late > 0.1 * service else 0.1)
