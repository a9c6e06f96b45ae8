"""What the control plane's routes share: JSON bodies in, pages out. Knows bounds, not resources."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from aiohttp import web

from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.store.database import Body

MAX_BODY_BYTES = 1 << 20
MAX_PAGE = 200


async def read_object(request: web.Request) -> Mapping[str, object]:
    """The JSON object of a request's body; an absent body is an empty one."""
    length = request.content_length or 0
    raw = b"" if length > MAX_BODY_BYTES else await request.read()
    if max(length, len(raw)) > MAX_BODY_BYTES:
        raise HttpProblem(413, f"the body is over {MAX_BODY_BYTES} bytes")
    if not raw.strip():
        return {}
    try:
        body: object = json.loads(raw)
    except (ValueError, RecursionError):
        raise HttpProblem(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise HttpProblem(400, "the body is not a JSON object")
    return cast("dict[str, object]", body)


def page(request: web.Request, rows: Sequence[Body], name: str) -> web.Response:
    """One page of a list; tokens are offsets."""
    try:
        size = min(int(request.query.get("pageSize") or MAX_PAGE), MAX_PAGE)
        start = int(request.query.get("pageToken") or 0)
    except ValueError:
        raise HttpProblem(400, "pageSize and pageToken must be numbers") from None
    if size < 1 or start < 0:
        raise HttpProblem(400, "pageSize must be at least 1, and pageToken one that a page gave")
    more = start + size < len(rows)
    return web.json_response(
        {
            name: rows[start : start + size],
            "nextPageToken": str(start + size) if more else "",
            "totalSize": len(rows),
        }
    )
