"""Learning rate schedules: constant, linear, cosine and warm-up-stable-decay, each with a warm-up.

    schedule = CosineSchedule(warmup_steps=10, min_lr_ratio=0.1)
    for step in range(1, 101):
        adam = tinker.AdamParams(learning_rate=compute_lr(schedule, step, 1e-5, total_steps=100))

Loads neither torch nor tinker.
"""

from __future__ import annotations

from fireworks_training.schedules.rates import (
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

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "LRSchedulerSpec",
    "LinearSchedule",
    "WSDSchedule",
    "compute_lr",
    "default_constant_schedule",
    "has_v1_scheduler_fields",
    "normalize_lr_scheduler_spec",
    "parse_lr_scheduler_spec",
]
