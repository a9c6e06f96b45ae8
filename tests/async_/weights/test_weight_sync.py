"""The coordinator against a scripted deployment."""

from __future__ import annotations

import asyncio
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
from fireworks_training._core.snapshots import links_to


class Deployment:
    """Replicas that report what a test scripts: one list of identities for each look; or a status,
    or None for an answer that lists none. With `follows`, one replica loads what it is told."""

    def __init__(self) -> None:
        self.looks: list[list[dict[str, Any]] | int | None] = []
        self.follows = False
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
        if isinstance(rows, int):
            return web.json_response({"error": {"message": "restarting"}}, status=rows)
        if rows is None:
            return web.json_response({"state": "rolling"})
        return web.json_response({"replicas": rows})

    async def load(self, request: web.Request) -> web.Response:
        self.loads.append({**await request.json(), "to": request.headers["fireworks-deployment"]})
        if self.follows:
            self.looks.clear()
            self.will_report(self.loads[-1]["identity"])
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
        yield WeightSync(transport, Target(url, "accounts/a/deployments/d", "m"), timeout=1.5)
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


@pytest.mark.parametrize("status", [404, 409, 403, 401, 500, 503])
async def test_a_look_that_fails_is_made_again(
    sync: WeightSync, deployment: Deployment, status: int
) -> None:
    """A pod that restarts answers anything; only the time-out ends a load."""
    deployment.will_report("a")
    deployment.looks.append(status)
    deployment.looks.append(None)  # no list of replicas
    deployment.will_report("b")
    await sync.load("b")
    assert len(deployment.loads) == 1


async def test_a_load_is_asked_for_where_the_status_can_not_be_read(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.looks.append(404)
    deployment.looks.append([])
    deployment.will_report("b")
    await sync.load("b")
    assert [load["identity"] for load in deployment.loads] == ["b"]


async def test_a_status_that_is_never_read_is_a_time_out_with_the_last_failure(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.looks.append(404)
    with pytest.raises(HotLoadTimeout, match="404"):
        await sync.load("b")


async def test_loads_by_name_are_made_in_turn_and_those_of_the_newest_coalesce(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.follows = True
    deployment.will_report(None)
    named = [asyncio.create_task(sync.load(name)) for name in ("s0", "s1")]
    newest = [asyncio.create_task(sync.load(name, newest=True)) for name in ("n0", "n1", "n2")]
    last = asyncio.create_task(sync.load("s2"))
    outcomes = await asyncio.gather(*named, *newest, last)
    assert [load["identity"] for load in deployment.loads] == ["s0", "s1", "n2", "s2"]
    assert [(one.identity, one.superseded) for one in outcomes] == [
        ("s0", False),
        ("s1", False),
        ("n2", True),
        ("n2", True),
        ("n2", False),
        ("s2", False),
    ]


async def test_whoever_names_a_snapshot_can_tell_that_another_takes_its_place(
    sync: WeightSync, deployment: Deployment
) -> None:
    deployment.follows = True
    deployment.will_report(None)
    first, second = (asyncio.create_task(sync.load(name)) for name in ("s0", "s1"))
    await first
    assert sync.replaces("s0") == "s1"
    assert sync.replaces("s1") is None
    await second
    assert sync.replaces("s1") is None


async def test_what_is_not_known_of_a_snapshot_is_looked_up_before_it_is_loaded(
    sync: WeightSync, deployment: Deployment
) -> None:
    async def learn(identity: str) -> None:
        for link in links_to(identity, {"base": None, "d1": "base", "d2": "d1"}):
            sync.chain.learn(link)

    sync._learn = learn
    deployment.follows = True
    deployment.will_report("something else")
    await sync.load("d2")
    assert [load["identity"] for load in deployment.loads] == ["base", "d1", "d2"]
    assert "incremental_snapshot_metadata" not in deployment.loads[0]
