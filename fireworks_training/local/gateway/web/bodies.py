"""JSON bodies of the gateway's routes: reads and checks requests, cuts answers into pages.

Knows bounds, kinds of values and the words of a 400. Does not know what a field means. A message
names the field, never its value: that may be a prompt or a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import orjson
from aiohttp import web
from pydantic import ValidationError

from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.store.database import Body

MAX_BODY_BYTES = 1 << 20
MAX_PAGE = 200


# -- whole bodies --------------------------------------------------------------------------------


def parse_object(data: bytes) -> dict[str, object]:
    """Parse a JSON object.

    Raises:
        HttpProblem: 400.
    """
    try:
        body: object = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise HttpProblem(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HttpProblem(400, "the body is not a JSON object")
    return cast("dict[str, object]", body)


async def read_object(request: web.Request) -> dict[str, object]:
    """Read the JSON object of a small body; an absent body is an empty object.

    Raises:
        HttpProblem: 400; 413 over `MAX_BODY_BYTES`.
    """
    length = request.content_length or 0
    raw = b"" if length > MAX_BODY_BYTES else await request.read()
    if max(length, len(raw)) > MAX_BODY_BYTES:
        raise HttpProblem(413, f"the body is over {MAX_BODY_BYTES} bytes")
    return parse_object(raw) if raw.strip() else {}


def invalid_body(error: ValidationError) -> HttpProblem:
    """Make the 400 of a body that does not fit its pydantic model, with the first wrong field."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = ".".join(str(part) for part in fault["loc"])
    return HttpProblem(400, f"{fault['msg']}, field: '{name}'")


# -- single fields -------------------------------------------------------------------------------


def text_field(
    body: Mapping[str, object], name: str, default: str = "", most: int | None = None
) -> str:
    """Return a string of a body, at most `most` characters; `default` when it is absent or null.

    Raises:
        HttpProblem: 400.
    """
    value = optional_text(body, name, most)
    return default if value is None else value


def optional_text(body: Mapping[str, object], name: str, most: int | None = None) -> str | None:
    """Return a string of a body as `text_field` does; None when it is absent or null."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise HttpProblem(400, f"{name} must be a string")
    if most is not None and len(value) > most:
        raise HttpProblem(400, f"{name} is over {most} characters")
    return value


def required_text(body: Mapping[str, object], *names: str) -> str:
    """Return a non-empty string of a body, under the first of its spellings that is there.

    Raises:
        HttpProblem: 400.
    """
    value = next((body[name] for name in names if body.get(name) is not None), None)
    if not isinstance(value, str) or not value:
        raise HttpProblem(400, f"{names[0]} must be a non-empty string")
    return value


def int_field(
    body: Mapping[str, object], name: str, low: int, high: int, default: int | None = None
) -> int:
    """Return an integer of a body from `low` to `high`; a bool is none.

    Args:
        default: stands for a field that is absent or null; None makes the field required.

    Raises:
        HttpProblem: 400.
    """
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise HttpProblem(400, f"{name} must be an integer from {low} to {high}")
    return value


def object_field(body: Mapping[str, object], name: str) -> Mapping[str, object]:
    """Return an object of a body; an empty one when it is absent or null.

    Raises:
        HttpProblem: 400.
    """
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise HttpProblem(400, f"{name} must be an object")
    return cast("dict[str, object]", value)


def int_query(request: web.Request, name: str, low: int, default: int) -> int:
    """Return an integer of a query from `low`; `default` when it is absent or empty.

    Raises:
        HttpProblem: 400.
    """
    try:
        value = int(request.query.get(name) or default)
    except ValueError:
        value = low - 1
    if value < low:
        raise HttpProblem(400, f"{name} must be an integer from {low}")
    return value


# -- answers -------------------------------------------------------------------------------------


def page(request: web.Request, rows: Sequence[Body], name: str) -> web.Response:
    """Answer with one page of a list; page tokens are offsets.

    Raises:
        HttpProblem: 400.
    """
    size = min(int_query(request, "pageSize", 1, default=MAX_PAGE), MAX_PAGE)
    start = int_query(request, "pageToken", 0, default=0)
    more = start + size < len(rows)
    return web.json_response(
        {
            name: rows[start : start + size],
            "nextPageToken": str(start + size) if more else "",
            "totalSize": len(rows),
        }
    )
