"""Checks of the fields of request bodies: present, of the right kind, in range, known.

Knows JSON and its kinds of values. Does not know the meaning of any field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import orjson

from fireworks_training.local.trainer.queue.operations import OperationFailed

Body = Mapping[str, object]

MOST = (1 << 63) - 1
"""Largest whole number of a field that names no bound of its own."""


class Malformed(Exception):
    """Raised for a body that is no request at all: it names no place in any queue."""


def parse(raw: bytes) -> dict[str, object]:
    """Decode a JSON object; NaN and Infinity pass, to be refused with the name of their field.

    Raises:
        Malformed: the body is not a JSON object.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Malformed("the body is not JSON") from error
    if not isinstance(value, dict):
        raise Malformed("the body is not a JSON object")
    return value


def identifier(body: Body, key: str) -> str:
    """Read a string that names a session, a model or a request; raises Malformed."""
    value = body.get(key)
    if not isinstance(value, str):
        raise Malformed(f"{key} must be a string")
    return value


def text(body: Body, key: str) -> str:
    """Read a string that is not empty; raises OperationFailed, as all that follow."""
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise OperationFailed(f"{key} must be a non-empty string")
    return value


def allow(body: Body, allowed: tuple[str, ...], what: str) -> None:
    """Refuse fields that are not among the allowed ones; null counts as absent."""
    unknown = sorted(key for key in body if body[key] is not None and key not in allowed)
    if unknown:
        raise OperationFailed(
            f"{what} does not know {', '.join(map(repr, unknown[:5]))}; it takes"
            f" {', '.join(sorted(allowed))}"
        )


def number(body: Body, key: str, default: float) -> float:
    """Read a finite number; null is the default."""
    value = body.get(key)
    if value is None:
        return float(default)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(found := float(value)):
                return found
        except OverflowError:
            pass  # a whole number of hundreds of digits
    raise OperationFailed(f"{key} must be a finite number")


def count(body: Body, key: str, default: int, most: int) -> int:
    """Read a whole number from 0 to `most`, also as a float: protobuf's settings are floats."""
    value = number(body, key, default)
    if not value.is_integer() or not 0 <= value <= most:
        raise OperationFailed(f"{key} must be a whole number from 0 to {most}")
    return int(value)


def whole(
    body: Body,
    key: str,
    default: int | None = None,
    *,
    least: int = 0,
    most: int = MOST,
    refusal: type[Exception] = OperationFailed,
) -> int:
    """Read a whole number within its bounds, both included; a bool does not count.

    Args:
        default: stands for null; None = the field must be there.
        refusal: type of the exception for any other value.
    """
    value = body.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        bound = f" to {most}" if most < MOST else ""
        raise refusal(f"{key} must be a whole number from {least}{bound}")
    return value


def flag(body: Body, key: str, default: bool) -> bool:
    """Read true or false; null is the default."""
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise OperationFailed(f"{key} must be true or false")
    return value
