"""Advantages against their formulas written out."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireworks_training.errors import InvalidArgument
from fireworks_training.losses import advantages as adv

REWARDS = [1.0, 0.0, 0.5, 2.0]
groups = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


def test_the_formulas() -> None:
    mean = 0.875
    assert adv.group_mean(REWARDS) == [r - mean for r in REWARDS]
    for std, spread in (
        ("population", statistics.pstdev(REWARDS)),
        ("sample", statistics.stdev(REWARDS)),
    ):
        found = adv.group_mean_std(REWARDS, std=std, eps=1e-4)  # type: ignore[arg-type]
        assert found == pytest.approx([(r - mean) / (spread + 1e-4) for r in REWARDS])
    others = [sum(REWARDS[:i] + REWARDS[i + 1 :]) / 3 for i in range(4)]
    assert adv.leave_one_out(REWARDS) == pytest.approx(
        [r - o for r, o in zip(REWARDS, others, strict=True)]
    )
    assert adv.max_rl(REWARDS) == pytest.approx([(r - mean) / mean for r in REWARDS])


def test_batch_std_is_that_of_all_rewards() -> None:
    batch = [[1.0, 0.0], [3.0, 3.0], [2.0, 4.0]]
    spread = statistics.pstdev([r for group in batch for r in group])
    found = adv.batch_std(batch, eps=0.0)
    assert found[0] == pytest.approx([0.5 / spread, -0.5 / spread])
    assert found[1] == [0.0, 0.0]


def test_several_rewards_are_normalised_apart() -> None:
    right, style = [1.0, 0.0], [10.0, 30.0]
    assert adv.several_rewards([right, style], eps=0.0) == pytest.approx([0.0, 0.0])
    assert adv.several_rewards([right, style], weights=[1, 0.5], eps=0.0) == pytest.approx(
        [0.5, -0.5]
    )
    with pytest.raises(InvalidArgument, match="one weight"):
        adv.several_rewards([right, [1.0]])


@pytest.mark.parametrize("value", [0.1, 1e8, -3.7, 1e-30])
def test_float_dust_is_no_signal(value: float) -> None:
    dusty = [value, value * (1 + 1e-7), value * (1 - 1e-7)]
    for function in (adv.group_mean, adv.group_mean_std, adv.leave_one_out):
        assert function(dusty) == [0.0] * 3
    assert adv.batch_std([dusty, dusty]) == [[0.0] * 3] * 2
    # The control: a signal, however small, is one.
    assert adv.group_mean_std([0.0, 1e-9], eps=0.0) == pytest.approx([-1.0, 1.0])


@given(groups)
def test_laws(rewards: list[float]) -> None:
    for function in (adv.group_mean, adv.group_mean_std, adv.leave_one_out):
        found = function(rewards)
        assert len(found) == len(rewards)
        assert abs(math.fsum(found)) <= 1e-6 * max(1.0, max(map(abs, found)))
        assert function(rewards[::-1]) == pytest.approx(found[::-1])


def test_small_groups_have_no_advantage() -> None:
    for function in (adv.group_mean, adv.group_mean_std, adv.leave_one_out, adv.max_rl):
        assert function([]) == []
        assert function([3.0]) == [0.0]
    assert adv.group_mean_std([3.0], std="sample") == [0.0]
    assert adv.max_rl([0.0, 0.0]) == [0.0, 0.0]


def test_what_is_no_reward_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="finite"):
        adv.group_mean([1.0, math.nan])
    with pytest.raises(InvalidArgument, match="negative"):
        adv.max_rl([-1.0, 1.0])
    with pytest.raises(InvalidArgument, match="allowed are"):
        adv.group_mean_std([1.0, 2.0], std="unbiased")  # type: ignore[arg-type]


def test_information_gains_are_of_probabilities_or_their_logs() -> None:
    points = [[-2.0, -4.0], [-1.0, -1.0], [-0.5, -0.5]]
    assert adv.information_gains(points) == pytest.approx(
        [math.exp(-1) - math.exp(-3), math.exp(-0.5) - math.exp(-1)]
    )
    assert adv.information_gains(points, kind="logprob") == pytest.approx([2.0, 0.5])


def test_igpo_joint_and_separate() -> None:
    gains, outcomes = [[0.2, 0.1], [0.3]], [1.0, 0.0]
    every = [0.2, 0.1, 0.3, 1.0, 0.0]
    mean, spread = statistics.fmean(every), statistics.pstdev(every)
    z = [(v - mean) / spread for v in every]
    assert adv.igpo(gains, outcomes, gamma=0.5, eps=0.0) == [
        pytest.approx([z[0] + 0.5 * (z[1] + 0.5 * z[3]), z[1] + 0.5 * z[3], z[3]]),
        pytest.approx([z[2] + 0.5 * z[4], z[4]]),
    ]
    zg = [0.0, -math.sqrt(1.5), math.sqrt(1.5)]
    found = adv.igpo(gains, outcomes, normalize="separate", eps=0.0)
    assert found[0] == pytest.approx([zg[0] + zg[1] + 1, zg[1] + 1, 1])
    assert found[1] == pytest.approx([zg[2] - 1, -1])
    with pytest.raises(InvalidArgument, match="2 rollouts"):
        adv.igpo(gains, [1.0])


def test_igpo_gives_equal_outcomes_equal_credit_whatever_their_turns() -> None:
    """Normalised over all turns with zeros for those without an outcome, the first turns of these
    rollouts had 2.06, 0.44, -0.95 and -2.01 (fw-ai/cookbook at 76821fa, utils/rl/igpo.py)."""
    gains = [[0.0] * 2, [0.0] * 6, [0.0] * 2, [0.0] * 6]
    found = adv.igpo(gains, [1.0, 1.0, 0.0, 0.0], normalize="separate", eps=0.0)
    assert [turns[0] for turns in found] == pytest.approx([1.0, 1.0, -1.0, -1.0])
