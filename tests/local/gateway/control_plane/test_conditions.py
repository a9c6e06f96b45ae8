"""Capacity, delays, idleness and failures on demand: what makes the local platform like a cloud."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.limits import Limits
from fireworks_training.local.processes import lifetime
from tests.local.gateway.platform_fakes import (
    HTTP,
    MODEL,
    FakeProcess,
    Gateway,
    PlatformFolders,
)

JOBS = f"{HTTP}/rlorTrainerJobs"
DEPLOYMENTS = f"{HTTP}/deployments"
LIMITS = "/local/v1/limits"
FAULTS = "/local/v1/faults"
AN_HOUR = 3600


async def create_job(gateway: Gateway, id_: str, **fields: Any) -> None:
    body = {"trainingConfig": {"baseModel": MODEL}, **fields}
    status, row = await gateway.call("POST", f"{JOBS}?rlorTrainerJobId={id_}", body)
    assert status == 200, row


async def create_deployment(gateway: Gateway, id_: str, **fields: Any) -> None:
    body = {"baseModel": MODEL, **fields}
    status, row = await gateway.call("POST", f"{DEPLOYMENTS}?deploymentId={id_}", body)
    assert status == 200, row


async def fault(gateway: Gateway, **fields: Any) -> dict[str, Any]:
    status, answer = await gateway.call("POST", FAULTS, fields)
    assert status == 200, answer
    return answer


async def limit(gateway: Gateway, **values: Any) -> None:
    assert (await gateway.call("PATCH", LIMITS, values))[0] == 200


async def state(gateway: Gateway, path: str) -> tuple[str, str]:
    row = (await gateway.call("GET", f"{HTTP}/{path}"))[1]
    return row["state"], row["statusMessage"]


def job(id_: str) -> str:
    return f"accounts/local/rlorTrainerJobs/{id_}"


def deployment(id_: str) -> str:
    return f"accounts/local/deployments/{id_}"


# -- capacity ------------------------------------------------------------------------------------


async def test_a_second_trainer_waits_its_turn_with_a_reason(gateway: Gateway) -> None:
    await limit(gateway, maxTrainers=1)
    await gateway.job("j1")
    for id_ in ("j2", "j3"):
        await create_job(gateway, id_)
        await gateway.until(f"rlorTrainerJobs/{id_}", "JOB_STATE_PENDING")
    assert (await state(gateway, "rlorTrainerJobs/j3"))[1] == (
        "waiting for capacity: 1 of 1 trainer places are taken (by j1), 1 ahead in the queue"
    )
    assert len(gateway.spawner.living("trainer")) == 1
    # Its data plane says that it starts, not that it is lost.
    path = "/training/v1/rlorTrainerJobs/local/j2/api/v1/echo"
    assert (await gateway.call("POST", path, {}))[0] == 503
    await gateway.call("DELETE", f"{JOBS}/j1")
    await gateway.until("rlorTrainerJobs/j2", "JOB_STATE_RUNNING")
    assert (await state(gateway, "rlorTrainerJobs/j3"))[0] == "JOB_STATE_PENDING"
    await limit(gateway, maxTrainers=2)
    await gateway.until("rlorTrainerJobs/j3", "JOB_STATE_RUNNING")


async def test_a_place_is_free_again_when_its_holder_fails(gateway: Gateway) -> None:
    await limit(gateway, maxTrainers=1)
    first = await gateway.job("j1")
    await create_job(gateway, "j2")
    await gateway.until("rlorTrainerJobs/j2", "JOB_STATE_PENDING")
    first.die()
    await gateway.until("rlorTrainerJobs/j2", "JOB_STATE_RUNNING")
    # Who comes back asks for a place like everybody else.
    await gateway.call("POST", f"{JOBS}/j1:resume")
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_PENDING")


async def test_who_leaves_the_queue_lets_the_next_one_up(gateway: Gateway) -> None:
    await limit(gateway, maxTrainers=1)
    await gateway.job("j1")
    for id_ in ("j2", "j3"):
        await create_job(gateway, id_)
        await gateway.until(f"rlorTrainerJobs/{id_}", "JOB_STATE_PENDING")
    assert (await gateway.call("DELETE", f"{JOBS}/j2"))[0] == 200
    await eventually_message(gateway, "rlorTrainerJobs/j3", "0 ahead")
    await gateway.call("DELETE", f"{JOBS}/j1")
    await gateway.until("rlorTrainerJobs/j3", "JOB_STATE_RUNNING")


async def eventually_message(gateway: Gateway, path: str, part: str) -> None:
    async with asyncio.timeout(20):
        while part not in (await state(gateway, path))[1]:  # noqa: ASYNC110 - polls HTTP
            await asyncio.sleep(0.002)


async def test_the_creators_notice_comes_back_after_the_wait(gateway: Gateway) -> None:
    await limit(gateway, maxTrainers=0)
    await create_job(gateway, "j1", preemptible=True)
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_PENDING")
    await limit(gateway, maxTrainers=None)
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")
    assert "preemptible" in row["statusMessage"]


async def test_one_that_a_fault_holds_back_holds_back_nobody(gateway: Gateway) -> None:
    await limit(gateway, maxTrainers=1)
    await fault(gateway, resource=job("j1"), pending="no H200 is free in this region")
    await create_job(gateway, "j1")
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_PENDING")
    assert (await state(gateway, "rlorTrainerJobs/j1"))[1] == "no H200 is free in this region"
    await gateway.job("j2")
    await gateway.call("DELETE", f"{FAULTS}?resource={job('j1')}")
    await eventually_message(gateway, "rlorTrainerJobs/j1", "taken (by j2)")


async def test_replicas_have_a_capacity_of_their_own(gateway: Gateway) -> None:
    await limit(gateway, maxReplicas=1)
    await gateway.deployment("d1")
    await create_deployment(gateway, "d2")
    await eventually_message(gateway, "deployments/d2", "1 of 1 replica places are taken")
    assert (await state(gateway, "deployments/d2"))[0] == "CREATING"
    body = {"maxReplicaCount": 0, "minReplicaCount": 0}
    await gateway.call("PATCH", f"{DEPLOYMENTS}/d1", body)
    row = await gateway.until("deployments/d2", "READY")
    assert row["statusMessage"] == ""


# -- delays --------------------------------------------------------------------------------------


async def test_a_delay_keeps_a_job_creating_until_it_is_taken_back(gateway: Gateway) -> None:
    await limit(gateway, trainerDelayS=AN_HOUR)
    await create_job(gateway, "j1")
    await create_job(gateway, "j2")
    await fault(gateway, resource=job("j2"), delayS=0)
    await gateway.until("rlorTrainerJobs/j2", "JOB_STATE_RUNNING")
    assert (await state(gateway, "rlorTrainerJobs/j1"))[0] == "JOB_STATE_CREATING"
    await limit(gateway, trainerDelayS=None)
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")


async def test_a_delayed_deployment_can_be_deleted(gateway: Gateway) -> None:
    await fault(gateway, resource=deployment("d1"), delayS=AN_HOUR)
    await create_deployment(gateway, "d1")
    assert (await state(gateway, "deployments/d1"))[0] == "CREATING"
    assert (await gateway.call("DELETE", f"{DEPLOYMENTS}/d1?hard=true"))[0] == 200
    assert gateway.spawner.processes == []


async def test_a_start_that_had_not_begun_begins_on_the_next_platform(
    folders: PlatformFolders,
) -> None:
    async with folders.gateway() as gateway:
        await limit(gateway, maxTrainers=1, trainerDelayS=AN_HOUR)
        for id_ in ("j1", "j2"):
            await create_job(gateway, id_)
        await gateway.until("rlorTrainerJobs/j2", "JOB_STATE_PENDING")
    await folders.end()
    later = PlatformFolders(lifetime.make_runtime_dir(), folders.state_dir, folders.model_dir)
    try:
        async with later.gateway() as gateway:
            for id_ in ("j1", "j2"):
                await gateway.until(f"rlorTrainerJobs/{id_}", "JOB_STATE_RUNNING")
    finally:
        await later.end()


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["pending", "creating", "running"])
async def test_a_job_fails_on_demand_in_every_state(gateway: Gateway, when: str) -> None:
    limits = {"pending": {"maxTrainers": 0}, "creating": {"trainerDelayS": AN_HOUR}, "running": {}}
    await limit(gateway, **limits[when])
    await create_job(gateway, "j1")
    await gateway.until("rlorTrainerJobs/j1", f"JOB_STATE_{when.upper()}")
    await fault(gateway, resource=job("j1"), fail="out of memory")
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")
    assert "out of memory" in row["statusMessage"]
    assert gateway.spawner.living("trainer") == []
    # It has come due: the next start is a good one.
    await limit(gateway, maxTrainers=None, trainerDelayS=None)
    await gateway.call("POST", f"{JOBS}/j1:resume")
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")


async def test_a_failure_may_be_set_before_its_job_exists(gateway: Gateway) -> None:
    await fault(gateway, resource=job("j1"), fail="out of memory")
    await create_job(gateway, "j1")
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")
    assert row["statusMessage"] == "out of memory"
    assert gateway.spawner.processes == []


async def test_a_deployment_fails_on_demand(gateway: Gateway) -> None:
    await gateway.deployment("d1")
    await fault(gateway, resource=deployment("d1"), fail="image pull failed")
    row = await gateway.until("deployments/d1", "FAILED")
    assert row["statusMessage"] == "image pull failed"
    assert gateway.spawner.living("engine") == []
    await fault(gateway, resource=deployment("d2"), fail="no image")
    await create_deployment(gateway, "d2")
    assert (await gateway.until("deployments/d2", "FAILED"))["statusMessage"] == "no image"


async def test_a_replica_can_be_killed_and_comes_back(gateway: Gateway) -> None:
    await gateway.deployment("d1")
    first = gateway.spawner.living("engine")[0]
    await fault(gateway, resource=deployment("d1"), killReplica=0)
    assert not first.running
    assert (await gateway.call("POST", FAULTS, {"resource": job("x"), "killReplica": 0}))[0] == 400
    status, _ = await gateway.call("POST", FAULTS, {"resource": deployment("d1"), "killReplica": 7})
    assert status == 404


async def test_an_answer_is_replaced_or_lost(gateway: Gateway) -> None:
    await fault(gateway, method="post", path=JOBS, status=503, times=2, retryAfterS=2)
    path, body = f"{JOBS}?rlorTrainerJobId=j1", {"trainingConfig": {"baseModel": MODEL}}
    for _ in range(2):
        assert (await gateway.call("POST", path, body))[0] == 503
    assert (await gateway.call("GET", f"{JOBS}/j1"))[0] == 404
    await fault(gateway, method="POST", path=f"{JOBS}*", status=502, after=True)
    assert (await gateway.call("POST", path, body))[0] == 502
    # Only the answer was lost.
    assert (await gateway.call("POST", path, body))[0] == 409
    assert (await gateway.call("GET", FAULTS))[1] == {"faults": []}


async def test_faults_are_listed_and_taken_back(gateway: Gateway) -> None:
    await fault(gateway, resource=job("j1"), pending="full", delayS=3)
    await fault(gateway, method="GET", path="/v1/accounts", times=5)
    listed = (await gateway.call("GET", FAULTS))[1]["faults"]
    assert listed[0] == {"resource": job("j1"), "delayS": 3.0, "pending": "full", "fail": ""}
    assert (listed[1]["path"], listed[1]["times"]) == ("/v1/accounts", 5)
    assert (await gateway.call("DELETE", FAULTS))[0] == 200
    assert (await gateway.call("GET", "/v1/accounts"))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"resource": "accounts/local/models/tiny"},
        {"resource": "accounts/other/deployments/d1"},
        {"resource": "accounts/local/deployments/../x"},
        {"resource": "accounts/local/deployments/d1", "delayS": -1},
        {"resource": "accounts/local/deployments/d1", "delayS": float("1e12")},
        {"resource": "accounts/local/deployments/d1", "fail": "x" * 501},
        {"resource": "accounts/local/deployments/d1", "explode": True},
        {"path": "v1"},
        {"path": "/v1", "status": 200},
        {"path": "/v1", "method": "SHOUT"},
        {"path": "/v1", "after": "yes"},
        {"path": "/v1", "times": 0},
    ],
)
async def test_a_wrong_fault_is_refused(gateway: Gateway, body: object) -> None:
    status, answer = await gateway.call("POST", FAULTS, body)
    assert status == 400, answer
    assert (await gateway.call("GET", FAULTS))[1] == {"faults": []}


async def test_the_routes_need_the_key(gateway: Gateway) -> None:
    for path in (LIMITS, FAULTS):
        assert (await gateway.call("GET", path, key="wrong"))[0] == 401


# -- idleness ------------------------------------------------------------------------------------


async def test_a_trainer_that_nobody_uses_is_stopped_and_resumes(gateway: Gateway) -> None:
    trainer = await gateway.job("j1")
    busy = await busy_job(gateway, "j2")
    await limit(gateway, inactivityTimeoutS=0.01)
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_PAUSED")
    assert "0.01 s without an operation or a heartbeat" in row["statusMessage"]
    assert not trainer.running
    assert busy.running
    path = "/training/v1/rlorTrainerJobs/local/j1/api/v1/echo"
    status, answer = await gateway.call("POST", path, {})
    assert (status, answer["error_class"]) == (410, "ModelLost")
    await limit(gateway, inactivityTimeoutS=None)
    await gateway.call("POST", f"{JOBS}/j1:resume")
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")


async def busy_job(gateway: Gateway, id_: str) -> FakeProcess:
    """A job with a request on its way, for as long as the gateway lives."""
    trainer = await gateway.job(id_)
    path = f"/training/v1/rlorTrainerJobs/local/{id_}/api/v1/hang"
    request = asyncio.create_task(gateway.call("POST", path, {}))
    await trainer.arrived.wait()
    gateway.background.append(request)
    return trainer


async def test_a_job_says_itself_how_long_it_may_be_idle(gateway: Gateway) -> None:
    await create_job(gateway, "short", inactivityTimeout="0.01s")
    await gateway.until("rlorTrainerJobs/short", "JOB_STATE_PAUSED")
    await limit(gateway, inactivityTimeoutS=0.01)
    await create_job(gateway, "never", disableInactivityCleanup=True)
    await create_job(gateway, "long", inactivityTimeout="3600s")
    for id_ in ("never", "long"):
        row = await gateway.until(f"rlorTrainerJobs/{id_}", "JOB_STATE_RUNNING")
    assert row["inactivityTimeout"] == "3600s"
    await create_job(gateway, "default")
    await gateway.until("rlorTrainerJobs/default", "JOB_STATE_PAUSED")
    for id_ in ("never", "long"):
        assert (await state(gateway, f"rlorTrainerJobs/{id_}"))[0] == "JOB_STATE_RUNNING"


@pytest.mark.parametrize("value", ["10", "10801s", "0s", "soon", 600, "-1s", "nans"])
async def test_a_wrong_inactivity_timeout_is_refused(gateway: Gateway, value: object) -> None:
    body = {"trainingConfig": {"baseModel": MODEL}, "inactivityTimeout": value}
    assert (await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", body))[0] == 400


# -- limits --------------------------------------------------------------------------------------


async def test_limits_are_shown_and_changed(gateway: Gateway) -> None:
    shown = (await gateway.call("GET", LIMITS))[1]
    assert shown == Limits().shown()
    status, shown = await gateway.call("PATCH", LIMITS, {"maxTrainers": 2, "trainerDelayS": 1.5})
    assert (status, shown["maxTrainers"], shown["trainerDelayS"]) == (200, 2, 1.5)
    assert (await gateway.call("PATCH", LIMITS, {"maxTrainers": None}))[1]["maxTrainers"] is None


@pytest.mark.parametrize(
    "values",
    [{"maxTrainers": -1}, {"maxTrainers": True}, {"maxTrainers": 1.5}, {"trainerDelayS": "1"},
     {"trainerDelayS": float("inf")}, {"color": 1}],
)  # fmt: skip
def test_wrong_limits_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(LocalPlatformError):
        Limits().changed(values)
