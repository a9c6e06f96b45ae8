"""The scripted cloud: its faults come when they should, and its resources know each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.cloud.replicas import Replica, Replicas
from tests.cloud.server import JOB, Cloud, Fault, Habits, serving


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def statuses(http: aiohttp.ClientSession, url: str, count: int) -> list[int]:
    found = []
    for _ in range(count):
        async with http.get(f"{url}/v1/accounts") as answer:
            found.append(answer.status)
    return found


async def test_a_fault_covers_so_many_requests_after_some(http: aiohttp.ClientSession) -> None:
    cloud = Cloud(Habits(), (Fault("accounts", 503, times=2, skip=1, after_s=0.0),))
    async with serving(cloud) as url:
        assert await statuses(http, url, 5) == [200, 503, 503, 200, 200]
    assert cloud.requests["accounts"] == 5


async def test_a_fault_of_no_time_covers_nothing(http: aiohttp.ClientSession) -> None:
    async with serving(Cloud(Habits(), (Fault("accounts", seconds=0.0),))) as url:
        assert await statuses(http, url, 2) == [200, 200]


async def test_a_cut_connection(http: aiohttp.ClientSession) -> None:
    async with serving(Cloud(Habits(), (Fault("create_session", 0, times=1),))) as url:
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await post(http, f"{url}/api/v1/create_session", {})
        assert (await post(http, f"{url}/api/v1/create_session", {}))[0] == 200


async def post(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    async with http.post(url, json=body) as answer:
        return answer.status, await answer.json()


async def test_a_deployment_needs_its_trainer(http: aiohttp.ClientSession) -> None:
    async with serving(Cloud(Habits(job_post_s=0.0))) as url:
        where = f"{url}/v1/accounts/acme/deployments?deploymentId=d"
        name = "accounts/acme/rlorTrainerJobs/new"
        status, said = await post(http, where, {"hotLoadTrainerJob": name})
        assert (status, "no such trainer job" in str(said)) == (400, True)
        await post(http, f"{url}/v1/accounts/acme/rlorTrainerJobs?rlorTrainerJobId=new", {})
        assert (await post(http, where, {"hotLoadTrainerJob": name}))[0] == 200


async def test_an_answer_that_is_lost_was_carried_out(http: aiohttp.ClientSession) -> None:
    fault = Fault("resume_job", 503, times=1, carried_out=True)
    async with serving(Cloud(Habits(job_state="JOB_STATE_FAILED"), (fault,))) as url:
        assert (await post(http, f"{url}/v1/{JOB}:resume", {}))[0] == 503
        assert (await post(http, f"{url}/v1/{JOB}:resume", {}))[0] == 409


async def test_a_closed_schema_names_the_field(http: aiohttp.ClientSession) -> None:
    async with serving(Cloud(Habits(closed=True))) as url:
        body = {"model_id": "m", "type": "unload_model"}
        assert (await post(http, f"{url}/api/v1/unload_model", body))[0] == 200
        status, said = await post(http, f"{url}/api/v1/unload_model", {**body, "seq_id": 1})
        assert (status, "'seq_id'" in str(said)) == (400, True)


async def test_a_submit_again_is_the_same_request(http: aiohttp.ClientSession) -> None:
    async with serving(Cloud(Habits())) as url:
        body = {"model_id": "m", "seq_id": 1, "adam_params": {}}
        one = await post(http, f"{url}/api/v1/optim_step", body)
        assert await post(http, f"{url}/api/v1/optim_step", body) == one
        other = await post(http, f"{url}/api/v1/optim_step", {**body, "seq_id": 2})
        assert other[1]["request_id"] != one[1]["request_id"]


def load(replicas: Replicas, identity: str, now: float, predecessor: str | None = None) -> None:
    metadata = {"previous_snapshot_identity": predecessor} if predecessor else None
    replicas.ask({"identity": identity, "incremental_snapshot_metadata": metadata}, now)


def test_a_replica_notices_late_and_loads_slowly() -> None:
    replicas = Replicas((Replica(notices_s=2, loads_s=3),))
    load(replicas, "a", 10.0)
    assert replicas.rows(11.0)[0]["readiness"] is True
    assert replicas.rows(13.0)[0]["loading_state"]["target_snapshot_identity"] == "a"
    assert replicas.rows(13.0)[0]["readiness"] is False
    assert replicas.loading(14.9)
    assert not replicas.loading(15.0)
    row = replicas.rows(15.0)[0]
    assert (row["current_snapshot_identity"], row["readiness"]) == ("a", True)


def test_a_replica_refuses_a_delta_to_what_it_does_not_hold() -> None:
    replicas = Replicas((Replica(),))
    load(replicas, "a", 1.0)
    load(replicas, "c", 2.0, predecessor="b")
    row = replicas.rows(3.0)[0]
    assert row["loading_state"] == {"stage": "error", "target_snapshot_identity": "c"}
    assert row["current_snapshot_identity"] == "a"
    load(replicas, "b", 4.0, predecessor="a")
    assert replicas.rows(5.0)[0]["current_snapshot_identity"] == "b"


def test_adapters_stay() -> None:
    replicas = Replicas((Replica(adapters="new_first"), Replica(adapters="new_last")))
    load(replicas, "a", 1.0)
    load(replicas, "b", 2.0)
    first, last = (
        [adapter["identity"] for adapter in row["loaded_adapters"]] for row in replicas.rows(3.0)
    )
    assert (first, last) == (["b", "a"], ["a", "b"])


def test_a_replica_hides_while_it_rolls() -> None:
    replicas = Replicas((Replica(loads_s=9, hidden=(1, 5)), Replica(listed_from_s=2)))
    assert len(replicas.rows(0.0)) == 1
    load(replicas, "a", 10.0)
    assert [len(replicas.rows(now)) for now in (10.5, 12.0, 16.0)] == [1, 1, 2]
