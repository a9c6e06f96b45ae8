"""Requests of every form, to every route: none makes the gateway fail."""

from __future__ import annotations

import asyncio
from collections import Counter

import aiohttp
from yarl import URL

from tests.local.gateway.fuzzing import FuzzedRequest, requests, routes_of
from tests.local.gateway.platform_fakes import KEY, Gateway

SAMPLE = 1_000


async def test_no_request_makes_the_gateway_fail(gateway: Gateway) -> None:
    await gateway.job("j1")
    _, made = await gateway.call("POST", "/api/v1/create_session", {})
    session = made["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
    _, sampler = await gateway.call("POST", "/api/v1/create_sampling_session", body)
    known = [session, sampler["sampling_session_id"], f"{session}:train:0", "j1"]
    routes = routes_of(gateway.app)
    assert len(routes) > 60

    async def send(request: FuzzedRequest) -> int:
        try:
            async with (
                asyncio.timeout(1),
                gateway.session.request(
                    request.method,
                    URL(gateway.base_url + request.path, encoded=True),
                    data=request.body or None,
                    headers={"X-API-Key": KEY, **request.headers},
                    allow_redirects=False,
                ) as response,
            ):
                return response.status
        except (TimeoutError, aiohttp.ClientError):
            return 0  # held back, as a poll may be, or cut

    answers = [(r, await send(r)) for r in requests(routes, 1, SAMPLE, known)]
    assert not [request for request, status in answers if status == 500]
    # Negative controls: they arrived, were answered, and some went through.
    counts = Counter(status for _, status in answers)
    assert counts[0] < SAMPLE / 10, counts
    assert {200, 400, 404} <= set(counts), counts
    assert (await send(FuzzedRequest("GET", "/boom", b""))) == 500
    assert (await gateway.call("GET", "/healthz"))[0] == 200
