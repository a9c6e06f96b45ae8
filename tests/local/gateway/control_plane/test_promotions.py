"""Snapshots that become models: which can, how long it takes, and what a restart makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fireworks_training.local.model.promotion import Order
from tests.local.gateway.platform_fakes import (
    HTTP,
    MODEL,
    Gateway,
    PlatformFolders,
    eventually,
)

MODELS = f"{HTTP}/models"
JOB_NAME = "accounts/local/rlorTrainerJobs/j1"
PROMOTED = "accounts/local/models/my-model"
BODY: dict[str, Any] = {
    "output_model": PROMOTED,
    "trainer_job_id": JOB_NAME,
    "base_model": MODEL,
    "async_promotion": True,
}


def snapshot(folders: PlatformFolders, name: str, kind: str = "base", job: str = "j1") -> Path:
    folder = folders.state_dir / "snapshots" / name
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {"job": job, "kind": kind, "base_model": MODEL}
    if kind == "lora":
        manifest["lora"] = {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj"]}
    if kind == "delta":
        manifest["predecessor"] = "step-0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def account_path(name: str) -> str:
    return f"{HTTP}/checkpoints/{name}:promote"


async def until_done(gateway: Gateway, name: str) -> dict[str, Any]:
    async def done() -> bool:
        return bool((await gateway.call("GET", f"/v1/{name}"))[1]["done"])

    while not await done():
        await eventually(lambda: True, "the loop runs")
    return (await gateway.call("GET", f"/v1/{name}"))[1]


async def test_a_snapshot_becomes_a_model(gateway: Gateway, folders: PlatformFolders) -> None:
    await gateway.job("j1")
    snapshot(folders, "step-1")
    rows = (await gateway.call("GET", f"{HTTP}/rlorTrainerJobs/j1/checkpoints"))[1]["checkpoints"]
    assert [row["promotable"] for row in rows] == [True]
    folders.promotion_gate.clear()
    status, answer = await gateway.call("POST", account_path("step-1"), BODY)
    assert status == 200, answer
    operation = answer["operation"]
    assert (operation["done"], answer["model"]) == (False, None)
    assert operation["metadata"]["statusMessage"] == f"making {PROMOTED} of step-1"
    # Not there before it is whole.
    assert (await gateway.call("GET", f"/v1/{PROMOTED}"))[0] == 404
    assert (await gateway.call("POST", account_path("step-1"), BODY))[0] == 409
    assert (await gateway.call("DELETE", f"{MODELS}/my-model"))[0] == 409
    folders.promotion_gate.set()
    ended = await until_done(gateway, operation["name"])
    assert ended["response"]["name"] == PROMOTED
    assert (ended["response"]["state"], ended["response"]["kind"]) == ("READY", "HF_BASE_MODEL")
    listed = (await gateway.call("GET", MODELS))[1]["models"]
    assert {row["name"] for row in listed} == {MODEL, PROMOTED}
    assert folders.orders == [
        Order(
            str(folders.state_dir / "snapshots"),
            "step-1",
            MODEL,
            str(folders.model_dir),
            str(folders.state_dir / "models" / "my-model"),
        )
    ]


async def test_it_serves_and_trains_like_any_model(
    gateway: Gateway, folders: PlatformFolders
) -> None:
    await gateway.job("j1")
    snapshot(folders, "step-1")
    body = {**BODY, "async_promotion": False}
    status, answer = await gateway.call("POST", account_path("step-1"), body)
    assert (status, answer["model"]["name"]) == (200, PROMOTED)
    await gateway.deployment("d1", baseModel=PROMOTED)
    (engine,) = gateway.spawner.living("engine")
    assert engine.settings["model_path"] == str(folders.state_dir / "models" / "my-model")
    status, answer = await gateway.call("DELETE", f"{MODELS}/my-model")
    assert (status, "d1" in answer["error"]["message"]) == (409, True)
    await gateway.call("DELETE", f"{HTTP}/deployments/d1?hard=true")
    assert (await gateway.call("DELETE", f"{MODELS}/my-model"))[0] == 200
    assert (await gateway.call("GET", f"/v1/{PROMOTED}"))[0] == 404
    assert not (folders.state_dir / "models" / "my-model").exists()
    # What came with the platform stays.
    assert (await gateway.call("DELETE", f"{MODELS}/tiny"))[0] == 404


async def test_an_adapter_says_what_it_was(gateway: Gateway, folders: PlatformFolders) -> None:
    await gateway.job("j1")
    snapshot(folders, "step-1", "lora")
    path = f"{HTTP}/rlorTrainerJobs/j1/checkpoints/step-1:promote"
    body = {"outputModel": "my-model", "baseModel": "accounts/fireworks/models/qwen3-8b"}
    status, answer = await gateway.call("POST", path, body)
    assert status == 200, answer
    assert answer["model"]["kind"] == "HF_PEFT_ADDON"
    assert answer["model"]["peftDetails"] == {
        "baseModel": MODEL,
        "r": 8,
        "targetModules": ["q_proj"],
    }


async def test_a_failed_promotion_says_why_and_leaves_the_name_free(
    gateway: Gateway, folders: PlatformFolders
) -> None:
    await gateway.job("j1")
    snapshot(folders, "step-1")
    folders.promotion_failure = "the disk is full"
    answer = (await gateway.call("POST", account_path("step-1"), BODY))[1]
    ended = await until_done(gateway, answer["operation"]["name"])
    assert ended["error"]["message"] == "the disk is full"
    assert "response" not in ended
    body = {**BODY, "async_promotion": False}
    status, answer = await gateway.call("POST", account_path("step-1"), body)
    assert (status, answer["error"]["message"]) == (500, "the disk is full")
    folders.promotion_failure = ""
    assert (await gateway.call("POST", account_path("step-1"), body))[0] == 200


@pytest.mark.parametrize(
    ("checkpoint", "changes", "status", "says"),
    [
        ("nothing", {}, 404, "no snapshot"),
        ("theirs", {}, 404, "no snapshot"),
        ("diff", {}, 400, "base snapshot"),
        ("a..%2Fb", {}, 404, "can't name"),
        ("good", {"trainer_job_id": "accounts/local/rlorTrainerJobs/j9"}, 404, "j9"),
        ("good", {"trainer_job_id": ""}, 400, "trainer_job_id"),
        ("good", {"output_model": "accounts/other/models/x"}, 400, "output_model"),
        ("good", {"output_model": "accounts/local/models/Big"}, 400, "output_model"),
        ("good", {"output_model": MODEL}, 409, "exists"),
        ("good", {"base_model": "accounts/local/models/x"}, 400, "base_model"),
        ("good", {"base_model": 3}, 400, "base_model"),
    ],
)
async def test_what_can_not_be_promoted(
    gateway: Gateway,
    folders: PlatformFolders,
    checkpoint: str,
    changes: dict[str, Any],
    status: int,
    says: str,
) -> None:
    await gateway.job("j1")
    snapshot(folders, "good")
    snapshot(folders, "theirs", job="j2")
    snapshot(folders, "diff", "delta")
    answer = await gateway.call("POST", account_path(checkpoint), {**BODY, **changes})
    assert answer[0] == status, answer
    assert says in answer[1]["error"]["message"]
    assert folders.orders == []
    assert (await gateway.call("GET", f"/v1/{PROMOTED}"))[0] == 404


async def test_a_restart_keeps_models_and_goes_on_with_promotions(
    folders: PlatformFolders,
) -> None:
    async with folders.gateway() as gateway:
        await gateway.job("j1")
        snapshot(folders, "step-1")
        snapshot(folders, "step-2")
        body = {**BODY, "async_promotion": False}
        assert (await gateway.call("POST", account_path("step-1"), body))[0] == 200
        await gateway.deployment("d1", baseModel=PROMOTED)
        folders.promotion_gate.clear()
        body = {**BODY, "output_model": "accounts/local/models/second"}
        operation = (await gateway.call("POST", account_path("step-2"), body))[1]["operation"]
        await eventually(lambda: len(folders.orders) == 2, "the promotion began")
    folders.promotion_gate.set()
    async with folders.gateway() as gateway:
        ended = await until_done(gateway, operation["name"])
        assert ended["response"]["name"] == "accounts/local/models/second"
        assert (await gateway.call("GET", f"/v1/{PROMOTED}"))[0] == 200
        await gateway.until("deployments/d1", "READY")


async def test_an_unknown_operation_is_not_found(gateway: Gateway) -> None:
    assert (await gateway.call("GET", f"{HTTP}/operations/nothing"))[0] == 404
