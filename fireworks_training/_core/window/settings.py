"""`AimdSettings`: checks and holds the constants of the adaptive window.

The bounds of several depend on another one or exclude an end, which `_checks` does not express.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from fireworks_training._checks import integer, number
from fireworks_training.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class AimdSettings:
    """Holds the constants of the law, which `AdaptiveConcurrencyController` describes.

    Raises:
        InvalidArgument: a value is out of range.
    """

    initial_window: int = 8
    min_window: int = 1
    max_window: int = 4096
    prefill_queue_target: float = 0.5
    additive_increase: float = 1.0
    multiplicative_decrease: float = 0.5
    ema_alpha: float = 0.3
    adjustment_interval: int = 256
    shrink_cooldown_s: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check = integer if isinstance(field.default, int) else number
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name), 0))
        problems = [
            (self.min_window >= 1, "min_window must be at least 1"),
            (self.max_window >= self.min_window, "max_window must be at least min_window"),
            (self.initial_window >= 1, "initial_window must be at least 1"),
            (self.prefill_queue_target > 0, "prefill_queue_target must be over 0 seconds"),
            (self.additive_increase >= 0, "additive_increase must not be negative"),
            (0 < self.multiplicative_decrease < 1, "multiplicative_decrease must be in (0, 1)"),
            (0 < self.ema_alpha <= 1, "ema_alpha must be in (0, 1]"),
            (self.adjustment_interval >= 0, "adjustment_interval must not be negative"),
            (self.shrink_cooldown_s >= 0, "shrink_cooldown_s must not be negative"),
        ]
        for holds, message in problems:
            if not holds:
                raise InvalidArgument(f"{message}; got {self}")
