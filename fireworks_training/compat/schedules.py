"""The schedules under the official SDK's names; they stand in `fireworks_training.schedules`."""

from __future__ import annotations

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
