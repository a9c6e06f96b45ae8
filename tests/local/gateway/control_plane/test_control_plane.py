"""Jobs and deployments from creation to their end, and across restarts of the gateway."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest

from fireworks_training.local.gateway.control_plane.deployments import MAX_SLOTS
from fireworks_training.local.gateway.inference.engine_client import LoadEnded
from fireworks_training.local.gateway.inference.registry import ServingRegistry, UnknownModel
from fireworks_training.local.processes import lifetime
from fireworks_training.local.store.database import Database
from tests.local.gateway.platform_fakes import (
    HTTP,
    MODEL,
    Gateway,
    PlatformFolders,
    eventually,
)

JOBS = f"{HTTP}/rlorTrainerJobs"
DEPLOYMENTS = f"{HTTP}/deployments"
JOB = {"trainingConfig": {"baseModel": MODEL}}
CLOUD_MODEL = "accounts/fireworks/models/qwen3-8b"
CLOUD_SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"


# -- accounts, models, shapes --------------------------------------------------------------------


async def test_there_is_one_account(gateway: Gateway) -> None:
    status, body = await gateway.call("GET", "/v1/accounts?pageSize=2")
    assert (status, [row["name"] for row in body["accounts"]]) == (200, ["accounts/local"])
    assert (await gateway.call("GET", "/v1/accounts/other/models"))[0] == 404
    assert (await gateway.call("GET", "/v1/accounts?pageSize=x"))[0] == 400


async def test_models(gateway: Gateway) -> None:
    status, body = await gateway.call("GET", f"/v1/{MODEL}")
    assert status == 200
    assert body["baseModelDetails"]["moe"] is False
    assert body["contextLength"] == 512
    status, body = await gateway.call("GET", f"/v1/{CLOUD_MODEL}")
    assert (status, body["name"]) == (200, CLOUD_MODEL)
    notice = f"Warning: {CLOUD_MODEL} is not served here; {MODEL} stands in for it"
    assert body["statusMessage"] == notice
    status, body = await gateway.call("GET", "/v1/accounts/local/models/huge")
    assert status == 404
    assert MODEL in body["error"]["message"]


async def test_shapes(gateway: Gateway) -> None:
    shape = "accounts/local/trainingShapes/cpu"
    query = "filter=latest_validated%3Dtrue&pageSize=1"
    status, body = await gateway.call("GET", f"/v1/{shape}/versions?{query}")
    assert status == 200
    (version,) = body["trainingShapeVersions"]
    assert version["name"] == f"{shape}/versions/1"
    assert version["snapshot"]["maxSupportedContextLength"] == 512
    assert version["snapshot"]["deploymentShapeVersion"].endswith("deploymentShapes/cpu/versions/1")
    assert (await gateway.call("GET", f"/v1/{shape}/versions/1"))[1] == version
    assert (await gateway.call("GET", f"/v1/{shape}/versions/latest"))[1] == version
    assert (await gateway.call("GET", f"/v1/{shape}/versions/7"))[0] == 404
    assert (await gateway.call("GET", "/v1/accounts/local/trainingShapes/h200"))[0] == 404
    assert (await gateway.call("GET", f"/v1/{shape}/versions?filter=color"))[0] == 400
    status, body = await gateway.call("GET", f"/v1/{CLOUD_SHAPE}/versions/abc")
    assert (status, body["name"]) == (200, f"{CLOUD_SHAPE}/versions/abc")
    assert body["statusMessage"].startswith("Warning:")


def test_without_models_a_stand_in_is_none() -> None:
    with pytest.raises(UnknownModel, match="none"):
        ServingRegistry().find_model(CLOUD_MODEL)


# -- jobs ----------------------------------------------------------------------------------------


async def test_a_job_from_creation_to_tombstone(gateway: Gateway, folders: PlatformFolders) -> None:
    gateway.spawner.gate.clear()
    status, row = await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", JOB)
    assert (status, row["state"]) == (200, "JOB_STATE_CREATING")
    assert row["name"] == "accounts/local/rlorTrainerJobs/j1"
    assert row["trainingConfig"]["maxContextLength"] == 512
    gateway.spawner.gate.set()
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")
    (trainer,) = gateway.spawner.living("trainer")
    assert trainer.settings == {
        "socket": str(folders.runtime_dir / "t-1.sock"),
        "job": "j1",
        "base_model": MODEL,
        "model_path": str(folders.model_dir),
        "states_dir": str(folders.state_dir / "jobs" / "j1" / "states"),
        "snapshots_dir": str(folders.state_dir / "snapshots"),
        "session_timeout_s": 300.0,
        "atomic_steps": True,
        "max_models": None,
        "lora_rank": 0,
        "forward_only": False,
        "snapshot_dtype": "bfloat16",
        "max_context_length": 512,
        "seed": 0,
    }
    status, body = await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", JOB)
    assert (status, body["error"]["code"]) == (409, "ALREADY_EXISTS")
    assert (await gateway.call("POST", f"{JOBS}/j1:resume"))[0] == 409
    assert (await gateway.call("DELETE", f"{JOBS}/j1")) == (200, {})
    assert not trainer.running
    assert trainer.signals[0] == signal.SIGTERM
    assert (await gateway.call("GET", f"{JOBS}/j1"))[1]["state"] == "JOB_STATE_DELETED"
    assert (await gateway.call("GET", JOBS))[1]["rlorTrainerJobs"] == []
    # A tombstone keeps its id.
    assert (await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", JOB))[0] == 409
    assert (await gateway.call("DELETE", f"{JOBS}/j1"))[0] == 200
    assert (await gateway.call("DELETE", f"{JOBS}/j2"))[0] == 404


async def test_options_reach_the_trainer(gateway: Gateway) -> None:
    options = {
        "loraRank": 8,
        "maxContextLength": 100,
        "extraValues": {"snapshot_dtype": "float32", "seed": 5},
    }
    trainer = await gateway.job(**options)
    told = trainer.settings
    assert (told["lora_rank"], told["max_context_length"]) == (8, 100)
    assert (told["snapshot_dtype"], told["seed"]) == ("float32", 5)


async def test_the_guides_names_are_taken_with_a_notice(gateway: Gateway) -> None:
    body = {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "useReservation": True,
        "nodeCount": 1,
        "preemptible": True,
        "trainingConfig": {
            "baseModel": CLOUD_MODEL,
            "loraRank": 0,
            "learningRate": 1e-5,
            "maxContextLength": 131072,
            "acceleratorType": "NVIDIA_H200_141GB",
            "somethingNew": 1,
        },
    }
    path = f"{JOBS}?trainingShape={CLOUD_SHAPE}&skipValidations=true&rlorTrainerJobId=guide"
    status, row = await gateway.call("POST", path, body)
    assert status == 200, row
    message = row["statusMessage"]
    assert message.startswith("Warning: ")
    for part in (CLOUD_MODEL, CLOUD_SHAPE, "512 instead of 131072", "preemptible"):
        assert part in message
    assert "acceleratorType" in message
    assert "nodeCount" not in message
    assert row["trainingConfig"]["baseModel"] == CLOUD_MODEL
    await gateway.until("rlorTrainerJobs/guide", "JOB_STATE_RUNNING")
    assert gateway.spawner.living("trainer")[0].settings["base_model"] == MODEL


@pytest.mark.parametrize(
    ("query", "body", "says"),
    [
        ("", {}, "baseModel"),
        ("", {"trainingConfig": {"baseModel": "accounts/local/models/x"}}, MODEL),
        ("", {"trainingConfig": {"baseModel": "accounts/acme/models/x"}}, MODEL),
        ("", {"trainingConfig": {"baseModel": 5}}, "string"),
        ("", {"trainingConfig": {"baseModel": MODEL, "loraRank": -1}}, "loraRank"),
        ("", {"trainingConfig": {"baseModel": MODEL, "loraRank": True}}, "loraRank"),
        ("", {"trainingConfig": {"baseModel": MODEL, "maxContextLength": 513}}, "512"),
        (
            "",
            {"trainingConfig": {"baseModel": MODEL, "extraValues": {"snapshot_dtype": "int8"}}},
            "float32",
        ),
        (
            "",
            {"trainingConfig": {"baseModel": MODEL, "extraValues": {"delta_compression": "no"}}},
            "fast, small",
        ),
        ("", {"trainingConfig": [1]}, "object"),
        ("&trainingShape=accounts/local/trainingShapes/h200", JOB, "trainingShapes/cpu"),
        ("&trainingShape=accounts/fireworks/trainingShapes/a/../b", JOB, "no shape"),
    ],
)
async def test_a_wrong_job_is_refused(
    gateway: Gateway, query: str, body: object, says: str
) -> None:
    status, answer = await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1{query}", body)
    assert status == 400
    assert says in answer["error"]["message"]
    assert (await gateway.call("GET", f"{JOBS}/j1"))[0] == 404


@pytest.mark.parametrize("id_", ["..", "A", "a_b", "-a", "a-", "a" * 64, "a/b", "a%00"])
async def test_a_wrong_id_is_refused(gateway: Gateway, id_: str) -> None:
    assert (await gateway.call("POST", f"{JOBS}?rlorTrainerJobId={id_}", JOB))[0] == 400
    path = f"{DEPLOYMENTS}?deploymentId={id_}"
    assert (await gateway.call("POST", path, {"baseModel": MODEL}))[0] == 400


async def test_lists_come_in_pages(gateway: Gateway) -> None:
    for number in range(3):
        await gateway.job(f"j{number}")
    status, first = await gateway.call("GET", f"{JOBS}?pageSize=2")
    assert status == 200
    assert [row["name"][-2:] for row in first["rlorTrainerJobs"]] == ["j0", "j1"]
    token = first["nextPageToken"]
    _, last = await gateway.call("GET", f"{JOBS}?pageSize=2&pageToken={token}")
    assert [row["name"][-2:] for row in last["rlorTrainerJobs"]] == ["j2"]
    assert last["nextPageToken"] == ""


async def test_a_job_that_can_not_start_says_why(gateway: Gateway) -> None:
    gateway.spawner.failure = "no memory left"
    await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", JOB)
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")
    assert row["statusMessage"] == "no memory left"


async def test_a_trainer_that_ends_before_it_serves_fails_the_job(gateway: Gateway) -> None:
    gateway.spawner.silent = True
    await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", JOB)
    await eventually(lambda: gateway.spawner.processes, "the spawn")
    (trainer,) = gateway.spawner.processes
    trainer.fail("ValueError: the model is damaged")
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")
    assert "ValueError: the model is damaged" in row["statusMessage"]


async def test_a_dead_trainer_fails_its_job_and_resume_brings_a_new_one(gateway: Gateway) -> None:
    trainer = await gateway.job()
    trainer.die()
    row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")
    assert "was killed" in row["statusMessage"]
    status, row = await gateway.call("POST", f"{JOBS}/j1:resume")
    assert (status, row["state"]) == (200, "JOB_STATE_CREATING")
    await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")
    (resumed,) = gateway.spawner.living("trainer")
    assert resumed.settings["socket"] != trainer.settings["socket"]
    assert resumed.settings["states_dir"] == trainer.settings["states_dir"]


async def test_a_trainer_that_ignores_sigterm_is_killed(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = await gateway.job()
    trainer.stubborn = True
    monkeypatch.setattr("fireworks_training.local.gateway.control_plane.workers.STOP_GRACE_S", 0.0)
    await gateway.call("DELETE", f"{JOBS}/j1")
    assert trainer.signals[0] == signal.SIGTERM
    assert trainer.signals[-1] == signal.SIGKILL
    assert not trainer.running


async def test_checkpoints_are_what_lies_on_disk(
    gateway: Gateway, folders: PlatformFolders
) -> None:
    await gateway.job()
    states = folders.state_dir / "jobs" / "j1" / "states"
    snapshots = folders.state_dir / "snapshots"
    (states / "step-10").mkdir(parents=True)
    (states / ".tmp-half").mkdir()
    for name, job in (("mine", "j1"), ("theirs", "j2"), ("damaged", None)):
        (snapshots / name).mkdir()
        text = "{" if job is None else json.dumps({"job": job, "kind": "lora"})
        (snapshots / name / "manifest.json").write_text(text)
    await gateway.call("DELETE", f"{JOBS}/j1")
    status, body = await gateway.call("GET", f"{JOBS}/j1/checkpoints?pageSize=200")
    assert status == 200
    rows = {row["name"].rsplit("/", 1)[-1]: row["checkpointType"] for row in body["checkpoints"]}
    assert rows == {
        "step-10": "CHECKPOINT_TYPE_TRAINING",
        "mine": "CHECKPOINT_TYPE_INFERENCE_LORA",
    }
    assert (await gateway.call("GET", f"{JOBS}/nobody/checkpoints"))[0] == 404


# -- deployments ---------------------------------------------------------------------------------


async def test_a_deployment_from_creation_to_its_end(
    gateway: Gateway, folders: PlatformFolders
) -> None:
    fields = {
        "forTraining": True,
        "minReplicaCount": 2,
        "maxReplicaCount": 2,
        "hotLoadBucketType": "FW_HOSTED",
        "hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/j1",
        "hotLoadTransitionType": "sync",
        "annotations": {"owner": "me"},
        "deploymentShape": "accounts/fireworks/deploymentShapes/big/versions/7",
    }
    row = await gateway.deployment(**fields)
    assert row["name"] == "accounts/local/deployments/d1"
    assert row["replicaCount"] == 2
    assert row["hotLoadTransitionType"] == "SYNC"
    assert row["hotLoadTrainerJob"] == fields["hotLoadTrainerJob"]
    assert row["annotations"] == {"owner": "me"}
    assert row["hotLoadBucketUrl"]
    assert "deploymentShapes/big" in row["statusMessage"]
    live = gateway.registry.deployments[row["name"]]
    assert (live.transition, len(live.engines), live.state) == ("SYNC", 2, "READY")
    told = gateway.spawner.living("engine")[0].settings
    assert told["model_path"] == str(folders.model_dir)
    assert told["max_slots"] == MAX_SLOTS
    path = f"{DEPLOYMENTS}?deploymentId=d1"
    assert (await gateway.call("POST", path, {"baseModel": MODEL}))[0] == 409
    query = "ignoreChecks=true&hard=true"
    assert await gateway.call("DELETE", f"{DEPLOYMENTS}/d1?{query}") == (200, {})
    assert gateway.spawner.living("engine") == []
    assert gateway.registry.deployments == {}
    assert (await gateway.call("GET", f"{DEPLOYMENTS}/d1"))[0] == 404


async def test_a_soft_delete_leaves_a_tombstone_that_can_be_replaced(gateway: Gateway) -> None:
    await gateway.deployment()
    await gateway.call("DELETE", f"{DEPLOYMENTS}/d1")
    assert (await gateway.call("GET", f"{DEPLOYMENTS}/d1"))[1]["state"] == "DELETED"
    assert (await gateway.call("GET", DEPLOYMENTS))[1]["deployments"] == []
    assert (await gateway.call("PATCH", f"{DEPLOYMENTS}/d1", {"maxReplicaCount": 1}))[0] == 409
    await gateway.deployment()


async def test_scale_to_zero_and_wake(gateway: Gateway) -> None:
    row = await gateway.deployment(minReplicaCount=2, maxReplicaCount=2)
    name = row["name"]
    gateway.deployments.record_loaded(name, "step-1")
    body = {"maxReplicaCount": 0, "minReplicaCount": 0}
    status, _ = await gateway.call("PATCH", f"{DEPLOYMENTS}/d1", body)
    assert status == 200
    row = await gateway.until("deployments/d1", "READY")
    assert row["replicaCount"] == 0
    assert gateway.spawner.living("engine") == []
    await gateway.deployments.wake(name)
    row = (await gateway.call("GET", f"{DEPLOYMENTS}/d1"))[1]
    assert (row["state"], row["replicaCount"], row["maxReplicaCount"]) == ("READY", 2, 2)
    assert [engine.loads for engine in gateway.engines[2:]] == [["step-1"], ["step-1"]]
    await gateway.deployments.wake(name)
    assert len(gateway.spawner.living("engine")) == 2
    with pytest.raises(LookupError):
        await gateway.deployments.wake(f"{name}x")


async def test_a_patch_changes_what_its_mask_names(gateway: Gateway) -> None:
    job = "accounts/local/rlorTrainerJobs/j9"
    await gateway.deployment(displayName="kept")
    body = {"hotLoadTrainerJob": job, "hotLoadTransitionType": "SYNC", "displayName": "not named"}
    mask = "hot_load_trainer_job,hot_load_transition_type"
    status, row = await gateway.call("PATCH", f"{DEPLOYMENTS}/d1?updateMask={mask}", body)
    assert status == 200
    assert (row["hotLoadTrainerJob"], row["hotLoadTransitionType"]) == (job, "SYNC")
    assert row["displayName"] == "kept"
    live = gateway.registry.deployments["accounts/local/deployments/d1"]
    assert live.transition == "SYNC"
    status, row = await gateway.call(
        "PATCH", f"{DEPLOYMENTS}/d1?updateMask=max_replica_count", {"maxReplicaCount": 2}
    )
    assert status == 200
    await eventually(lambda: len(live.engines) == 2, "the second engine")
    for body, mask in (
        ({"baseModel": "x"}, ""),
        ({}, "deployment_shape"),
        ({"hotLoadTransitionType": "SOON"}, ""),
        ({"minReplicaCount": 3, "maxReplicaCount": 1}, ""),
        ({"hotLoadTrainerJob": "j9"}, ""),
    ):
        path = f"{DEPLOYMENTS}/d1?updateMask={mask}"
        assert (await gateway.call("PATCH", path, body))[0] == 400


async def test_a_dead_engine_is_replaced_and_holds_the_last_snapshot(gateway: Gateway) -> None:
    row = await gateway.deployment()
    live = gateway.registry.deployments[row["name"]]
    assert gateway.engines[0].loads == []
    gateway.deployments.record_loaded(row["name"], "step-7")
    gateway.engines[0].die()
    await eventually(lambda: not live.engines, "the death is noticed")
    assert live.state == "UPDATING"
    await eventually(lambda: live.engines, "a new engine")
    assert gateway.engines[1].loads == ["step-7"]
    await gateway.until("deployments/d1", "READY")


async def test_an_engine_that_joined_during_a_hot_load_catches_up(gateway: Gateway) -> None:
    row = await gateway.deployment(minReplicaCount=2, maxReplicaCount=2)
    gateway.deployments.record_loaded(row["name"], "step-1")
    gateway.engines[1].die()
    await eventually(lambda: len(gateway.engines) == 3, "a new engine")
    await gateway.until("deployments/d1", "READY")
    # The other engine was asked for step-2 before the new one joined.
    gateway.deployments.record_loaded(row["name"], "step-2")
    await eventually(lambda: gateway.engines[2].loads == ["step-1", "step-2"], "catching up")
    # One that took part in the hot load itself is left alone.
    gateway.deployments.record_loaded(row["name"], "step-3")
    assert gateway.engines[2].loads == ["step-1", "step-2"]


async def test_an_engine_that_dies_again_and_again_is_given_up(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fireworks_training.local.processes.restarts.FIRST_DELAY_S", 0.0)
    row = await gateway.deployment()
    gateway.deployments.record_loaded(row["name"], "step-1")
    monkeypatch.setattr(
        "tests.local.gateway.platform_fakes.LoadEnded", lambda _: LoadEnded("failed", "it is gone")
    )
    gateway.engines[0].die()
    row = await gateway.until("deployments/d1", "FAILED")
    assert row["statusMessage"] == "the engine can't load step-1: it is gone"
    assert gateway.spawner.living("engine") == []
    with pytest.raises(RuntimeError, match="it is gone"):
        await gateway.deployments.wake(row["name"])
    assert (await gateway.call("DELETE", f"{DEPLOYMENTS}/d1?hard=true"))[0] == 200


async def test_the_engine_rounds_as_its_trainer_does(gateway: Gateway) -> None:
    await gateway.job(extraValues={"snapshot_dtype": "float32"})
    await gateway.deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    await gateway.deployment("d2")
    dtypes = [p.settings["snapshot_dtype"] for p in gateway.spawner.living("engine")]
    assert dtypes == ["float32", "bfloat16"]


# -- restarts ------------------------------------------------------------------------------------


async def test_a_new_gateway_finds_the_workers(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        trainer = await gateway.job()
        row = await gateway.deployment()
        gateway.deployments.record_loaded(row["name"], "step-1")
        before = list(gateway.spawner.processes)
    assert all(process.running for process in before)
    async with folders.gateway() as gateway:
        await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")
        await gateway.until("deployments/d1", "READY")
        assert gateway.spawner.processes == before
        path = "/training/v1/rlorTrainerJobs/local/j1/api/v1/echo"
        async with gateway.session.post(
            f"{gateway.base_url}{path}", headers={"X-API-Key": "tml-test-key"}, data=b"x"
        ) as response:
            assert response.status == 207
        trainer.die()
        await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")


async def test_a_worker_that_died_meanwhile_is_noticed(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        trainer = await gateway.job()
        await gateway.deployment()
    trainer.die()
    folders.engines[0].die()
    async with folders.gateway() as gateway:
        row = await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_FAILED")
        assert "while the gateway was restarting" in row["statusMessage"]
        await gateway.until("deployments/d1", "READY")
        assert len(gateway.spawner.living("engine")) == 1


async def test_a_spawn_that_was_cut_off_is_taken_up(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        gateway.spawner.silent = True
        await gateway.call("POST", f"{JOBS}?rlorTrainerJobId=j1", JOB)
        await eventually(lambda: gateway.spawner.processes, "the spawn")
    folders.spawner.silent = False
    (process,) = folders.spawner.processes
    await process.serve()
    async with folders.gateway() as gateway:
        await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")
        assert gateway.spawner.processes == [process]


async def test_a_new_platform_on_an_old_state(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        await gateway.job()
        row = await gateway.deployment()
        gateway.deployments.record_loaded(row["name"], "step-1")
    await folders.end()
    later = PlatformFolders(lifetime.make_runtime_dir(), folders.state_dir, folders.model_dir)
    try:
        async with later.gateway() as gateway:
            row = (await gateway.call("GET", f"{JOBS}/j1"))[1]
            assert row["state"] == "JOB_STATE_PAUSED"
            assert ":resume" in row["statusMessage"]
            await gateway.until("deployments/d1", "READY")
            assert gateway.engines[0].loads == ["step-1"]
            assert (await gateway.call("POST", f"{JOBS}/j1:resume"))[0] == 200
            await gateway.until("rlorTrainerJobs/j1", "JOB_STATE_RUNNING")
    finally:
        await later.end()


async def test_workers_that_nobody_claims_are_ended(folders: PlatformFolders) -> None:
    async with folders.gateway() as gateway:
        trainer = await gateway.job()
    # As after a gateway that died between the tombstone and the end of the worker.
    database = Database(folders.state_dir / "state.db")
    (row,) = database.rows("job")
    database.update(replace(row, state="JOB_STATE_DELETED"))
    database.close()
    async with folders.gateway():
        assert not trainer.running
