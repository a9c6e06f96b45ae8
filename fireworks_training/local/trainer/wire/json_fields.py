"""Fields of JSON request bodies: present or not, of the right kind, known or refused.

Knows: JSON and its kinds of values. Does not know what any field means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import orjson

from fireworks_training.local.trainer.queue.operations import OperationFailed

Body = Mapping[str, object]


class Malformed(Exception):
    """Not a request at all: it names no place in any line."""


def parse(raw: bytes) -> dict[str, object]:
    """A JSON object. NaN and Infinity are let through, to be refused with the name of their field.

    Raises:
        Malformed.
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


def text(body: Body, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise OperationFailed(f"{key} must be a non-empty string")
    return value


def allow(body: Body, allowed: tuple[str, ...], what: str) -> None:
    unknown = sorted(key for key in body if body[key] is not None and key not in allowed)
    if unknown:
        raise OperationFailed(
            f"{what} does not know {', '.join(map(repr, unknown[:5]))}; it takes"
            f" {', '.join(sorted(allowed))}"
        )


def number(body: Body, key: str, default: float) -> float:
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


def whole(body: Body, key: str, least: int = 1) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
        raise OperationFailed(f"{key} must be a whole number from {least}")
    return value


def flag(body: Body, key: str, default: bool) -> bool:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise OperationFailed(f"{key} must be true or false")
    return value
