"""Small JSON bodies of the Tinker API."""

from __future__ import annotations

import orjson
from aiohttp import web

from fireworks_training.local.gateway.web.problems import HttpProblem


async def read_json(request: web.Request) -> dict[str, object]:
    """The JSON object of a small request.

    Raises:
        Problem: 400, 413.
    """
    raw = await request.read()
    try:
        body: object = orjson.loads(raw or b"{}")
    except orjson.JSONDecodeError:
        raise HttpProblem(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HttpProblem(400, "the body must be a JSON object")
    return body


def text(body: dict[str, object], key: str) -> str:
    """A string of a body, or Problem 400."""
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise HttpProblem(400, f"{key} must be a non-empty string")
    return value
