"""What asks a deployment for a load, and platforms that no longer take a field."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fireworks_training import ApiStatusError
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.weights.hot_load_requests import (
    FIELD_REST,
    PATH,
    HotLoadRequests,
    Target,
    difference_to,
)


class Platform:
    """Refuses a load that has the field, as told; keeps what came."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.refusal: tuple[int, str] | None = None

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen.append(body)
        if self.refusal is not None and "reset_prompt_cache" in body:
            status, message = self.refusal
            return web.json_response({"error": {"message": message}}, status=status)
        return web.json_response({"to": request.headers["fireworks-deployment"]})


@pytest.fixture
def platform() -> Platform:
    return Platform()


@pytest.fixture
async def ask(platform: Platform) -> AsyncIterator[Any]:
    app = web.Application()
    app.router.add_post(PATH, platform.load)
    owner = OwnerLoop()
    owner.get()
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        async with Transport(owner=owner, base_url=url, api_key="tml-x") as transport:
            yield HotLoadRequests(transport, Target(url, "accounts/a/d", "m")).ask


@pytest.mark.parametrize(
    "refusal",
    [
        (400, "Extra inputs are not permitted, field: 'reset_prompt_cache'"),
        (422, "body.reset_prompt_cache: extra inputs"),
    ],
)
async def test_a_platform_that_no_longer_takes_the_field_is_asked_without_it(
    platform: Platform, ask: Any, refusal: tuple[int, str]
) -> None:
    platform.refusal = refusal
    assert await ask("a", reset_prompt_cache=False) == {"to": "accounts/a/d"}
    assert platform.seen == [{"identity": "a", "reset_prompt_cache": False}, {"identity": "a"}]
    # It is not tried again at once.
    await ask("b", difference=difference_to("a"))
    assert platform.seen[2:] == [
        {"identity": "b", "incremental_snapshot_metadata": difference_to("a")}
    ]
    # One refusal is not for good: the platform may be another one by then.
    platform.refusal = None
    for _ in range(FIELD_REST - 2):
        await ask("c")
    assert platform.seen[-1] == {"identity": "c"}
    await ask("d")
    assert platform.seen[-1] == {"identity": "d", "reset_prompt_cache": True}


@pytest.mark.parametrize(
    "message", ["reset_prompt_cache must be a boolean", "Extra inputs are not permitted: 'path'"]
)
async def test_another_refusal_is_the_callers(platform: Platform, ask: Any, message: str) -> None:
    platform.refusal = 400, message
    with pytest.raises(ApiStatusError, match=message):
        await ask("a")
    assert len(platform.seen) == 1
