"""What a run used: counts add up, holding costs time, prices make money of it."""

from __future__ import annotations

import pytest

from fireworks_training import InvalidArgument, Usage
from fireworks_training._async.runtime.usage_meter import UsageMeter
from fireworks_training.testing import ManualClock


def test_tokens_add_up_by_what_was_done_with_them() -> None:
    meter = UsageMeter(ManualClock())
    meter.passed(10, trained=True)
    meter.passed(5, trained=True)
    meter.passed(7, trained=False)
    meter.sampled(100, 60, 20)
    meter.sampled(30, None, 4)
    meter.sampled(None, 9, None)  # a server that says nothing of the prompt has cached none of it
    assert meter.read() == Usage(
        trained_tokens=15,
        forward_tokens=7,
        prefilled_tokens=70,
        cached_tokens=60,
        sampled_tokens=24,
    )


def test_what_is_held_counts_until_it_is_given_back() -> None:
    clock = ManualClock(100.0)
    meter = UsageMeter(clock)
    meter.hold("trainer", 1)
    clock.advance(10)
    meter.hold("replica", 3)
    clock.advance(5)
    assert (meter.read().trainer_seconds, meter.read().replica_seconds) == (15.0, 15.0)
    meter.release()
    clock.advance(1000)
    assert (meter.read().trainer_seconds, meter.read().replica_seconds) == (15.0, 15.0)
    meter.release()
    assert meter.read().trainer_seconds == 15.0


def test_prices() -> None:
    usage = Usage(
        trained_tokens=2_000_000,
        sampled_tokens=500_000,
        trainer_seconds=1800,
        replica_seconds=7200,
    )
    assert usage.cost({"trained": 1.5, "sampled": 4.0, "trainer_hour": 10, "replica_hour": 3}) == (
        3.0 + 2.0 + 5.0 + 6.0
    )
    assert usage.cost({}) == 0.0
    with pytest.raises(InvalidArgument, match="trainer_hour"):
        usage.cost({"gpu": 1.0})
    for wrong in (-1.0, float("nan"), True, "3"):
        with pytest.raises(InvalidArgument, match="number from 0"):
            usage.cost({"trained": wrong})  # type: ignore[dict-item]
