"""The coordinator against a scripted deployment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from fireworks_training import HotLoadFailed, HotLoadTimeout
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.weights.hot_load_requests import PATH, Target
from fireworks_training._async.weights.weight_sync import WeightSync


class Deployment:
    """Replicas that report what a test scripts: one list of identities for each look."""

    def __init__(self) -> None:
        self.looks: list[list[dict[str, Any]]] = []
        self.loads: list[dict[str, Any]] = []
        self.refusal: web.Response | None = None

    def will_report(self, *identities: str | None, **loading: Any) -> None:
        self.looks.append(
            [
                {"current_snapshot_identity": i, "readiness": True, "loading_state": loading}
                for i in identities
            ]
        )

    async def look(self, request: web.Request) -> web.Response:
        rows = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return web.json_response({"replicas": rows})

    async def load(self, request: web.Request) -> web.Response:
        self.loads.append({**await request.json(), "to": request.headers["fireworks-deployment"]})
        return self.refusal or web.json_response({})


@pytest.fixture
def deployment() -> Deployment:
    return Deployment()


@pytest.fixture
async def sync(deployment: Deployment) -> AsyncIterator[WeightSync]:
    app = web.Application()
    app.router.add_get(PATH, deployment.look)
    app.router.add_post(PATH, deployment.load)
    server = TestServer(app)
    await server.start_server()
    owner = OwnerLoop()
    owner.get()
    url = str(server.make_url("")).rstrip("/")
    async with Transport(owner=owner, base_url=url, api_key="tml-x") as transport:
        yield WeightSync(transport, Target(url, "accounts/a/deployments/d", "m"), timeout=0.3)
    await server.close()


async def test_live_when_the_last_replica_reports_it(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.will_report("a", "a")
    deployment.will_report("b", "a")  # an SDK that looks at the first replica would stop here
    deployment.will_report("b", "b")
    await sync.load("b")
    assert sync.current == "b"
    assert len(deployment.looks) == 1
    (load,) = deployment.loads
    assert load["identity"] == "b"
    assert load["to"] == "accounts/a/deployments/d"


async def test_loading_what_is_loaded_sends_nothing(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.will_report("b", "b")
    await sync.load("b")
    assert deployment.loads == []


async def test_a_replica_that_fails_is_named_with_its_reason(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.will_report("a")
    deployment.will_report(
        "a", stage="error", target_snapshot_identity="b", error="the hash of lm_head differs"
    )
    with pytest.raises(HotLoadFailed, match="lm_head") as failure:
        await sync.load("b")
    assert failure.value.replicas == {"0": "a, error b"}
    assert sync.current is None


async def test_an_old_error_is_not_this_loads(sync: WeightSync, deployment: Deployment) -> None:
    deployment.will_report("a", stage="error", target_snapshot_identity="old", error="x")
    deployment.will_report("a", stage="error", target_snapshot_identity="old", error="x")
    deployment.will_report("b")
    await sync.load("b")
    assert sync.current == "b"


async def test_a_replica_that_never_reports_is_named(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.will_report("b", "a")
    with pytest.raises(HotLoadTimeout, match="replica 1: a") as late:
        await sync.load("b")
    assert late.value.replicas == {"1": "a"}


async def test_a_refused_load_says_why(sync: WeightSync, deployment: Deployment) -> None:
    deployment.will_report("a")
    deployment.refusal = web.json_response({"error": {"message": "no such snapshot"}}, status=404)
    with pytest.raises(HotLoadFailed, match="no such snapshot"):
        await sync.load("b")
