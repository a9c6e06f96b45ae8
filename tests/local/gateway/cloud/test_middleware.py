"""A gateway that stands in for a cloud, over pretended workers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.local.gateway.platform_fakes import HTTP, KEY, MODEL, Gateway, PlatformFolders

DATA = "/training/v1/rlorTrainerJobs/local/j1/api/v1"
JOB = "accounts/local/rlorTrainerJobs/j1"


@pytest.fixture
async def cloud(folders: PlatformFolders) -> AsyncIterator[Gateway]:
    async with folders.gateway(as_cloud=True, cloud_pace=0.0) as running:
        yield running


@pytest.fixture
async def troubled(folders: PlatformFolders) -> AsyncIterator[Gateway]:
    async with folders.gateway(as_cloud=True, cloud_pace=0.0, trouble=3) as running:
        yield running


async def test_an_unknown_field_is_refused_by_name(cloud: Gateway) -> None:
    body = {"trainingConfig": {"baseModel": MODEL, "extraValues": {}}}
    status, answer = await cloud.call("POST", f"{HTTP}/rlorTrainerJobs", body)
    assert status == 400
    assert "trainingConfig.extraValues" in answer["error"]["message"]


async def test_a_deployment_of_a_job_that_is_not_there_is_refused(cloud: Gateway) -> None:
    path = f"{HTTP}/deployments?deploymentId=d1"
    body = {"baseModel": MODEL, "hotLoadTrainerJob": JOB}
    status, answer = await cloud.call("POST", path, body)
    assert status == 400
    assert "hotLoadTrainerJob" in answer["error"]["message"]
    await cloud.job("j1")
    status, _ = await cloud.call("POST", path, body)
    assert status == 200
    missing = {"trainingConfig": {"baseModel": MODEL}, "hotLoadDeploymentId": "d2"}
    status, answer = await cloud.call("POST", f"{HTTP}/rlorTrainerJobs", missing)
    assert status == 400
    assert "hotLoadDeploymentId" in answer["error"]["message"]


async def test_the_platform_itself_takes_both(gateway: Gateway) -> None:
    body = {"baseModel": MODEL, "hotLoadTrainerJob": JOB}
    status, _ = await gateway.call("POST", f"{HTTP}/deployments?deploymentId=d1", body)
    assert status == 200


async def test_own_routes_stay_and_extensions_are_not_found(cloud: Gateway) -> None:
    assert (await cloud.call("GET", "/local/v1/limits"))[0] == 200
    assert (await cloud.call("GET", "/local/v1/faults"))[0] == 200
    assert (await cloud.call("GET", f"{HTTP}/models/tiny/tokenizer"))[0] == 404
    await cloud.job("j1")
    assert (await cloud.call("POST", f"{DATA}/discard_gradients", {}))[0] == 404


async def test_a_wait_is_not_made(cloud: Gateway) -> None:
    await cloud.job("j1")
    async with cloud.session.get(
        f"{cloud.base_url}{HTTP}/rlorTrainerJobs/j1",
        headers={"X-API-Key": KEY, "Prefer": "wait=5", "If-None-Match": "*"},
    ) as response:
        assert response.status == 200
        assert "ETag" not in response.headers
        assert "Preference-Applied" not in response.headers


async def test_protobuf_and_compressed_bodies_are_refused(cloud: Gateway) -> None:
    await cloud.job("j1")
    for headers in (
        {"Content-Type": "application/x-protobuf"},
        {"Content-Type": "application/json", "Content-Encoding": "zstd"},
    ):
        async with cloud.session.post(
            f"{cloud.base_url}{DATA}/forward", data=b"x", headers={"X-API-Key": KEY, **headers}
        ) as response:
            assert response.status == 415


async def test_bodies_reach_the_trainer_and_its_answers_lose_extensions(cloud: Gateway) -> None:
    trainer = await cloud.job("j1")
    body = {"request_id": "r"}
    async with cloud.session.post(
        f"{cloud.base_url}{DATA}/retrieve_future", json=body, headers={"X-API-Key": KEY}
    ) as response:
        assert response.status == 207
    assert [json.loads(sent) for _, _, sent in trainer.requests] == [body]


async def test_polls_meet_their_faults_in_turn(cloud: Gateway) -> None:
    await cloud.job("j1")
    found: list[int] = []
    for _ in range(12):
        async with cloud.session.post(
            f"{cloud.base_url}{DATA}/retrieve_future",
            json={"request_id": "r"},
            headers={"X-API-Key": KEY},
        ) as response:
            found.append(response.status)
    assert found == [207, 207, 207, 408] * 2 + [207, 207, 207, 503]


async def test_stray_faults_are_those_of_the_seed_and_redirects_lead_back(
    troubled: Gateway,
) -> None:
    found: list[int] = []
    followed = 0
    for _ in range(300):
        async with troubled.session.post(
            f"{troubled.base_url}{DATA}/get_info",
            json={"model_id": "m"},
            headers={"X-API-Key": KEY},
            allow_redirects=False,
        ) as response:
            found.append(response.status)
            if response.status == 307:
                followed += 1
                assert response.headers["Location"] == str(response.url)
    assert followed
    assert {307, 408} <= set(found)
