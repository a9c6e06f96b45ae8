"""Checks of arguments that many calls share: what is allowed, and the words when it is not."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import SupportsFloat, SupportsIndex, cast

from fireworks_training.errors import InvalidArgument


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is not among the allowed ones; None may be one of them.

    Raises:
        InvalidArgument: names those that are allowed.
    """
    if value not in allowed:
        names = ", ".join(str(each) for each in allowed if each is not None)
        raise InvalidArgument(f"{name}={value!r}: allowed are {names}")


def _is_scalar(value: object) -> bool:
    """Whether a value is a number as Python, numpy or torch write one; a bool is none.

    Arrays and tensors are numbers if they have no dimension; neither library is imported for that.
    """
    if type(value) is int or type(value) is float:
        return True
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return False
    if isinstance(value, numbers.Real):
        return True
    return getattr(value, "ndim", None) == 0 and hasattr(value, "__float__")


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer within its bounds, both included; a bool is none, one of numpy or torch is.

    Raises:
        InvalidArgument: it is another kind, or out of bounds.
    """
    try:
        if not _is_scalar(value):
            raise TypeError
        number = operator.index(cast(SupportsIndex, value))
    except (TypeError, RuntimeError):
        raise InvalidArgument(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InvalidArgument(f"{name} must be {bounds}, got {number}")
    return number


def number(name: str, value: object, least: float, most: float = math.inf) -> float:
    """A finite number within its bounds, both included; a bool is none, one of numpy or torch is.

    Raises:
        InvalidArgument: it is another kind, not finite, or out of bounds.
    """
    try:
        if not _is_scalar(value):
            raise TypeError
        figure = float(cast(SupportsFloat, value))
    except (TypeError, RuntimeError):
        raise InvalidArgument(f"{name} must be a number, got {type(value).__name__}") from None
    except OverflowError:
        figure = math.inf  # an integer that no double holds
    if not (math.isfinite(figure) and least <= figure <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        if not math.isfinite(figure):
            bounds = "a finite number"
        raise InvalidArgument(f"{name} must be {bounds}, got {figure}")
    return figure
