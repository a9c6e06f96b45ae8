"""Long polls of a resource: a GET whose answer is held back until the resource has changed.

A client that has seen a resource sends the answer's ETag back (`If-None-Match`) and the time that
it would wait for another one (`Prefer: wait=<seconds>`, RFC 7240). `Preference-Applied` in the
answer shows that the wait was made, so that the client may ask again at once; without a place, or
without the header, the answer comes as always. Knows tags and waiters. Does not know resources: the
caller shows them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

from aiohttp import web

from fireworks_training.local.store.database import Body, ResourceKind

MOST_WAITERS = 256
LONGEST_S = 30
_WAIT = re.compile(r'(?:^|,)\s*wait\s*=\s*"?(\d{1,6})"?\s*(?:[,;]|$)', re.IGNORECASE)


class Waiters:
    """Keeps the requests that wait, by the resource that they wait for."""

    def __init__(self) -> None:
        self._events: dict[tuple[ResourceKind, str], set[asyncio.Event]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def changed(self, kind: ResourceKind, id_: str) -> None:
        """Wake all who wait for this resource."""
        for event in self._events.get((kind, id_), ()):
            event.set()

    @contextmanager
    def place(self, kind: ResourceKind, id_: str) -> Generator[asyncio.Event | None]:
        """Give an event that is set at each change; None where too many wait already."""
        if self._count >= MOST_WAITERS:
            yield None
            return
        event = asyncio.Event()
        self._count += 1
        self._events.setdefault((kind, id_), set()).add(event)
        try:
            yield event
        finally:
            self._count -= 1
            waiting = self._events[kind, id_]
            waiting.discard(event)
            if not waiting:
                del self._events[kind, id_]


async def answer(
    request: web.Request,
    waiters: Waiters,
    resource: tuple[ResourceKind, str],
    show: Callable[[], Body],
) -> web.Response:
    """Answer with the resource as `show` has it, at once or once it differs from what the client
    has seen."""
    shown = show()
    seen = [tag.value for tag in request.if_none_match or ()]
    wait_s = _wait_s(request)
    headers: dict[str, str] = {}
    if wait_s and _tag(shown) in seen:
        with waiters.place(*resource) as changed:
            if changed is not None:
                headers["Preference-Applied"] = f"wait={wait_s}"
                shown = await _until_other(changed, seen, wait_s, show)
    tag = _tag(shown)
    if tag in seen:
        response = web.Response(status=304, headers=headers)
    else:
        response = web.json_response(shown, headers=headers)
    response.etag = tag
    return response


async def _until_other(
    changed: asyncio.Event, seen: list[str], wait_s: int, show: Callable[[], Body]
) -> Body:
    shown = show()
    try:
        async with asyncio.timeout(wait_s):
            while _tag(shown) in seen:
                await changed.wait()
                changed.clear()
                shown = show()
    except TimeoutError:
        return show()
    return shown


def _wait_s(request: web.Request) -> int:
    found = _WAIT.search(",".join(request.headers.getall("Prefer", [])))
    return 0 if found is None else min(int(found[1]), LONGEST_S)


def _tag(shown: Body) -> str:
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
