"""JSON bodies of the gateway's routes: reads and checks requests, cuts answers into pages.

Knows bounds, kinds of values and the words of a 400. Does not know what a field means. A message
names the field, never its value: that may be a prompt or a key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import orjson
from aiohttp import web
from pydantic import ValidationError

from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.store.database import Body

MAX_BODY_BYTES = 1 << 20
SAMPLING_BYTES = 8 << 20
"""Bytes of a body that brings a prompt."""
MAX_VALUES = 400_000
MAX_OBJECTS = 50_000
INLINE_BYTES = 64 << 10
MAX_PAGE = 200

RAW = web.RequestKey("raw_body", bytes)
"""A body that was read."""

Parsed = TypeVar("Parsed")


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
    raw = await read_bytes(request)
    check_shape(raw)
    return parse_object(raw) if raw.strip() else {}


async def read_bytes(request: web.Request, most: int = MAX_BODY_BYTES) -> bytes:
    """Read a body of at most so many bytes; it may be read again.

    Raises:
        HttpProblem: 413, with no more than `most` bytes in memory.
    """
    if RAW in request:
        return request[RAW]
    if (request.content_length or 0) > most:
        raise _too_long(most)
    if request.content_length is not None or request.content.is_eof():
        raw = await request.read()
    else:
        # Its length is told by nobody: it is counted on its way.
        parts = bytearray()
        async for chunk in request.content.iter_any():
            parts += chunk
            if len(parts) > most:
                raise _too_long(most)
        raw = bytes(parts)
    if len(raw) > most:
        raise _too_long(most)
    request[RAW] = raw
    return raw


def _too_long(most: int) -> HttpProblem:
    return HttpProblem(413, f"the body is over {most} bytes")


def check_shape(raw: bytes) -> None:
    """Refuse a JSON body that would take long to parse, before anything of it is parsed.

    A parser holds the interpreter until it has ended, in whatever thread; a comma or a bracket is
    looked for a hundred times faster than a value is made of it.

    Raises:
        HttpProblem: 413 for one with more values than any request has.
    """
    if len(raw) <= MAX_VALUES // 8:
        return
    for brackets in (b"{", b"["):
        if raw.count(brackets) > MAX_OBJECTS:
            raise HttpProblem(413, f"the body has over {MAX_OBJECTS} objects or lists")
    if raw.count(b",") > MAX_VALUES:
        raise HttpProblem(413, f"the body has over {MAX_VALUES} values")


async def parse_aside(raw: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Parse a body that passed `check_shape`: a large one in a thread, off the event loop."""
    check_shape(raw)
    return parse(raw) if len(raw) <= INLINE_BYTES else await asyncio.to_thread(parse, raw)


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
