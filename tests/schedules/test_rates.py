"""Learning rates, against their formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fireworks_training.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    LRSchedulerSpec,
    WSDSchedule,
    compute_lr,
    default_constant_schedule,
    has_v1_scheduler_fields,
    normalize_lr_scheduler_spec,
    parse_lr_scheduler_spec,
)

BASE = 2e-4


def rates(spec: LRSchedulerSpec, total: int = 10) -> list[float]:
    return [compute_lr(spec, step, BASE, total_steps=total) / BASE for step in range(1, total + 1)]


def test_constant_after_its_warm_up() -> None:
    assert rates(ConstantSchedule(warmup_steps=4)) == [0.25, 0.5, 0.75, *[1.0] * 7]
    assert compute_lr(default_constant_schedule(), 1, BASE) == BASE
    assert rates(ConstantSchedule(warmup_ratio=0.2))[:3] == [0.5, 1.0, 1.0]


def test_linear_falls_to_its_floor() -> None:
    expected = [1 - 0.9 * step / 10 for step in range(1, 11)]
    assert rates(LinearSchedule(min_lr_ratio=0.1)) == pytest.approx(expected)
    assert rates(LinearSchedule(warmup_steps=2))[2] == pytest.approx(1 - 1 / 8)


def test_cosine_is_half_a_cosine() -> None:
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(1, 11)]
    assert rates(CosineSchedule(min_lr_ratio=0.2)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "at_half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))]
)
def test_wsd_is_stable_and_then_decays(kind: Any, at_half: float) -> None:
    found = rates(WSDSchedule(decay_ratio=0.4, decay_type=kind))
    assert found[:6] == [1.0] * 6
    assert found[7] == pytest.approx(at_half)
    assert found[9] == 0.0


def test_a_rate_beyond_the_end_is_the_floor() -> None:
    assert compute_lr(LinearSchedule(min_lr_ratio=0.5), 99, BASE, total_steps=10) == BASE * 0.5


def test_what_is_needed_is_asked_for() -> None:
    with pytest.raises(ValueError, match="total_steps"):
        compute_lr(CosineSchedule(), 1, BASE)
    with pytest.raises(ValueError, match="warmup_ratio"):
        compute_lr(ConstantSchedule(warmup_ratio=0.5), 1, BASE)


@pytest.mark.parametrize(
    "data",
    [
        {"type": "square"},
        {"type": "linear", "color": 1},
        {"type": "wsd", "decay_ratio": 0},
        {"type": "constant", "warmup_steps": 1, "warmup_ratio": 0.1},
        3,
    ],
)
def test_a_wrong_schedule_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="schedule"):
        parse_lr_scheduler_spec(data)


def test_flat_options_count_only_beside_nothing() -> None:
    cosine = normalize_lr_scheduler_spec(
        legacy_lr_schedule="cosine", legacy_warmup_steps=3, legacy_min_lr_ratio=0.1
    )
    assert cosine == CosineSchedule(warmup_steps=3, min_lr_ratio=0.1)
    given = {"type": "linear", "warmup_steps": 5}
    assert normalize_lr_scheduler_spec(given, legacy_lr_schedule="cosine") == LinearSchedule(
        warmup_steps=5
    )
    assert normalize_lr_scheduler_spec() == ConstantSchedule()
    assert normalize_lr_scheduler_spec(legacy_warmup_ratio=0.1) == ConstantSchedule(
        warmup_ratio=0.1
    )
    spec = WSDSchedule()
    assert normalize_lr_scheduler_spec(spec, legacy_warmup_steps=3) is spec
    assert has_v1_scheduler_fields(["lr_warmup_steps"])
    assert not has_v1_scheduler_fields(["learning_rate"])


SPECS = [
    ConstantSchedule(),
    ConstantSchedule(warmup_steps=3),
    *(
        kind(**settings)
        for kind in (LinearSchedule, CosineSchedule)
        for settings in ({}, {"warmup_steps": 3}, {"warmup_ratio": 0.2, "decay_ratio": 0.5})
    ),
    *(WSDSchedule(warmup_steps=w, decay_type=d) for w in (0, 4) for d in ("linear", "sqrt")),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_schedule_has_a_rate_from_step_0_on(spec: LRSchedulerSpec) -> None:
    warmed = spec.warmup_steps or spec.warmup_ratio
    assert compute_lr(spec, 0, BASE, total_steps=10) == (0.0 if warmed else BASE)
    rates_of_all = [compute_lr(spec, step, BASE, total_steps=10) for step in range(12)]
    assert all(0.0 <= rate <= BASE for rate in rates_of_all)


def test_a_run_of_one_step_has_rates() -> None:
    for spec in SPECS:
        assert math.isfinite(compute_lr(spec, 0, BASE, total_steps=1))
        assert math.isfinite(compute_lr(spec, 1, BASE, total_steps=1))


def test_the_official_names_are_these() -> None:
    from fireworks_training import compat, schedules

    for name in schedules.__all__:
        assert getattr(compat, name) is getattr(schedules, name)
