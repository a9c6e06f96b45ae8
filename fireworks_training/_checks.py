"""Checks of arguments that many calls share: what is allowed, and the words when it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fireworks_training.errors import InvalidArgument


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not among the allowed ones; None may be one of them.

    Raises:
        InvalidArgument: names those that are allowed.
    """
    if value not in allowed:
        names = ", ".join(str(each) for each in allowed if each is not None)
        raise InvalidArgument(f"{name}={value!r}: allowed are {names}")


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer within its bounds, both included; a bool is none.

    Raises:
        InvalidArgument: it is another kind, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InvalidArgument(f"{name} must be {bounds}, got {value}")
    return value


def number(name: str, value: object, least: float, most: float = math.inf) -> float:
    """A finite number within its bounds, both included; a bool is none.

    Raises:
        InvalidArgument: it is another kind, not finite, or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidArgument(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and least <= value <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise InvalidArgument(f"{name} must be {bounds}, got {value}")
    return float(value)
