"""Checks of arguments that many calls share: what is allowed, and the words when it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import index
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


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """An integer of Python, numpy or torch within its bounds, both included; a bool is none.

    Raises:
        InvalidArgument: it is another kind, or out of bounds.
    """
    try:
        found = index(cast(SupportsIndex, value if _is_scalar(value) else None))
    except (TypeError, ValueError, RuntimeError):
        raise InvalidArgument(f"{name} must be an integer, got {type(value).__name__}") from None
    if found < least or (most is not None and found > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise InvalidArgument(f"{name} must be {bounds}, got {found}")
    return found


def number(name: str, value: object, least: float, most: float = math.inf) -> float:
    """A finite number of Python, numpy or torch within its bounds, both included; a bool is none.

    Raises:
        InvalidArgument: it is another kind, not finite, or out of bounds.
    """
    # A tensor that requires a gradient is a number too, and torch would warn.
    detach: Callable[[], object] | None = getattr(value, "detach", None)
    given = value if detach is None else detach()
    try:
        if not (_is_scalar(given) and hasattr(given, "__float__")):  # text has none
            raise TypeError
        found = float(cast(SupportsFloat, given))
    except OverflowError:
        found = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise InvalidArgument(f"{name} must be a number, got {type(value).__name__}") from None
    if not (math.isfinite(found) and least <= found <= most):
        bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
        raise InvalidArgument(f"{name} must be {bounds}, got {found}")
    return found


def _is_scalar(value: object) -> bool:
    """Whether a value is neither a bool nor an array, not even one of a single element."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return False
    return getattr(value, "ndim", 0) == 0
