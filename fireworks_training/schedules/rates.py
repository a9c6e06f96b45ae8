"""Learning rates over the steps of a run: constant, linear, cosine, and warm-up-stable-decay.

Pure functions of the step. With `w` warm-up steps out of `T`, step `t` has the rate `base * t / w`
for `t <= w` where `w > 0`. Steps count from 1; step 0 has the rate 0 under a warm-up, else that of
step 1 of a constant one: `base`. Decay begins at `s`: at `w`, or for a `decay_ratio` `r` at
`max(w, T - round(r T))`. With `p = (t - s) / (T - s)` and the floor `m = min_lr_ratio` the factor
is `1 - p (1 - m)` (linear), `m + (1 - m) (1 + cos(pi p)) / 2` (cosine), or
`max(m, 1 - sqrt(p) (1 - m))` (sqrt). The values are those of the official SDK, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from fireworks_training.errors import InvalidArgument


class _Schedule(BaseModel):
    """Holds what all schedules have: a warm-up, in steps or as a part of all steps."""

    model_config = ConfigDict(extra="forbid")

    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class ConstantSchedule(_Schedule):
    """Keeps the rate the same after the warm-up."""

    type: Literal["constant"] = "constant"


class LinearSchedule(_Schedule):
    """Lowers the rate along a line, to `min_lr_ratio` of it."""

    type: Literal["linear"] = "linear"
    decay_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)


class CosineSchedule(_Schedule):
    """Lowers the rate along half a cosine, to `min_lr_ratio` of it."""

    type: Literal["cosine"] = "cosine"
    decay_ratio: float | None = Field(default=None, ge=0.0, le=1.0)
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)


class WSDSchedule(_Schedule):
    """Lowers the rate only over the last `decay_ratio` of the steps: warm-up, stable, decay."""

    type: Literal["wsd"] = "wsd"
    decay_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    min_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)


LRSchedulerSpec = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule | WSDSchedule, Field(discriminator="type")
]
_SPEC: TypeAdapter[Any] = TypeAdapter(LRSchedulerSpec)
_FLAT_FIELDS = frozenset(
    {"lr_schedule", "lr_warmup_steps", "warmup_steps", "warmup_ratio", "min_lr_ratio"}
)


def default_constant_schedule() -> ConstantSchedule:
    """Make a schedule without warm-up and decay."""
    return ConstantSchedule()


def parse_lr_scheduler_spec(data: Any) -> LRSchedulerSpec:
    """Make a schedule of a mapping with a `type`.

    Raises:
        InvalidArgument: the type or a field is unknown, or a value is out of range.
    """
    try:
        spec: LRSchedulerSpec = _SPEC.validate_python(data)
    except ValueError as error:
        raise InvalidArgument(f"not a learning rate schedule: {error}") from error
    return spec


def normalize_lr_scheduler_spec(
    data: Any = None,
    *,
    legacy_lr_schedule: str | None = None,
    legacy_warmup_steps: int | None = None,
    legacy_warmup_ratio: float | None = None,
    legacy_min_lr_ratio: float | None = None,
) -> LRSchedulerSpec:
    """Make a schedule of a mapping, of a schedule, or of the older flat options.

    The flat options count only where `data` asks for no more than "constant".
    """
    spec: LRSchedulerSpec = default_constant_schedule()
    if data is not None:
        spec = parse_lr_scheduler_spec(data) if isinstance(data, dict) else data
    says_something = spec != ConstantSchedule()
    flat: dict[str, Any] = {"type": legacy_lr_schedule or "constant"}
    if legacy_warmup_steps:
        flat["warmup_steps"] = legacy_warmup_steps
    elif legacy_warmup_ratio:
        flat["warmup_ratio"] = legacy_warmup_ratio
    if flat["type"] != "constant" and legacy_min_lr_ratio is not None:
        flat["min_lr_ratio"] = legacy_min_lr_ratio
    if says_something or flat == {"type": "constant"}:
        return spec
    return parse_lr_scheduler_spec(flat)


def has_v1_scheduler_fields(flat: Iterable[str]) -> bool:
    """Tell whether one of the older flat options is among these names."""
    return not _FLAT_FIELDS.isdisjoint(flat)


def compute_lr(
    spec: LRSchedulerSpec, step: int, base_lr: float, *, total_steps: int | None = None
) -> float:
    """Compute the learning rate of a step.

    Args:
        step: counted from 1; loops that count from 0 get a rate too, at 0 the first of a warm-up.
        base_lr: the rate where nothing warms up or decays.
        total_steps: steps of the run; a `warmup_ratio` and every decay need them.

    Raises:
        InvalidArgument: `total_steps` is needed and missing.
    """
    warmup = spec.warmup_steps
    if not warmup and spec.warmup_ratio is not None:
        warmup = round(spec.warmup_ratio * _needed(total_steps, "warmup_ratio"))
    if warmup > 0 and step <= warmup:
        return base_lr * (step / warmup)
    if isinstance(spec, ConstantSchedule):
        return base_lr
    total = _needed(total_steps, type(spec).__name__)
    start = warmup
    if spec.decay_ratio is not None:
        start = max(warmup, total - max(1, round(spec.decay_ratio * total)))
    if step <= start:
        return base_lr
    if step >= total:
        return base_lr * spec.min_lr_ratio
    kind = spec.decay_type if isinstance(spec, WSDSchedule) else spec.type
    return base_lr * _factor(kind, (step - start) / (total - start), spec.min_lr_ratio)


def _factor(kind: str, progress: float, floor: float) -> float:
    if kind == "linear":
        return 1.0 - progress * (1.0 - floor)
    if kind == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return max(floor, 1.0 - math.sqrt(progress) * (1.0 - floor))


def _needed(total_steps: int | None, what: str) -> int:
    if not total_steps or total_steps <= 0:
        raise InvalidArgument(f"{what} needs total_steps, the number of steps of the run")
    return total_steps
