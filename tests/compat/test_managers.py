"""The managers of the official SDK's names, against the platform over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import fireworks_training
from fireworks_training import compat
from fireworks_training.compat import (
    DeploymentConfig,
    DeploymentManager,
    FireworksClient,
    TrainerJobConfig,
    TrainerJobManager,
    TrainingShapeProfile,
    WeightSyncer,
    validate_output_model_id,
)
from fireworks_training.errors import (
    ClientClosed,
    HotLoadTimeout,
    InvalidArgument,
    ProvisioningError,
    ProvisioningTimeout,
)
from tests.conftest import RunningPlatform

ABSENT = "accounts/local/trainingShapes/nothing"


@pytest.fixture
def trainers(platform: RunningPlatform) -> Iterator[TrainerJobManager]:
    with TrainerJobManager(platform.api_key, platform.base_url) as manager:
        yield manager


@pytest.fixture
def deployments(platform: RunningPlatform) -> Iterator[DeploymentManager]:
    with DeploymentManager(platform.api_key, platform.base_url) as manager:
        yield manager


async def set_fault(platform: RunningPlatform, **fields: Any) -> None:
    url, headers = f"{platform.base_url}/local/v1/faults", {"X-API-Key": platform.api_key}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(url, json=fields) as answer,
    ):
        assert answer.status == 200, await answer.text()


def job_name(id_: str) -> str:
    return f"accounts/local/rlorTrainerJobs/{id_}"


# -- shapes and models ---------------------------------------------------------------------------


def test_shapes_and_models(platform: RunningPlatform) -> None:
    with FireworksClient(platform.api_key, platform.base_url) as client:
        assert client.account_id == "local"
        profile = client.resolve_training_profile(platform.training_shape)
        assert isinstance(profile, TrainingShapeProfile)
        assert profile.training_shape == platform.training_shape
        assert profile.deployment_shape == "accounts/local/deploymentShapes/cpu/versions/1"
        assert not profile.supports_lora
        assert client.model_is_moe(platform.model) is False
        with pytest.raises(compat.ModelDetailsUnavailableError) as caught:
            client.model_is_moe("accounts/local/models/nothing")
        assert caught.value.status_code == 404
        for wrong in ("cpu", "accounts/local/trainingShapes/"):
            with pytest.raises(ValueError, match="full name"):
                client.resolve_training_profile(wrong)
        with pytest.raises(RuntimeError, match="404"):
            client.resolve_training_profile(ABSENT)


def test_the_key_stays_out_of_the_repr(platform: RunningPlatform) -> None:
    with TrainerJobManager(platform.api_key, platform.base_url) as manager:
        assert platform.api_key not in repr(manager)


def test_ids_of_models_are_checked() -> None:
    assert validate_output_model_id("my-model") == []
    for wrong in (None, "", "Big", "a" * 64, "-a"):
        assert len(validate_output_model_id(wrong)) == 1


# -- trainers ------------------------------------------------------------------------------------


async def test_a_trainer_from_creation_to_its_end(
    platform: RunningPlatform, trainers: TrainerJobManager
) -> None:
    config = TrainerJobConfig(
        base_model=platform.model,
        training_shape_ref=platform.training_shape,
        display_name="managers",
        requested_job_id="compat-life",
        inactivity_timeout=timedelta(minutes=30),
    )
    endpoint = trainers.create_and_wait(config)
    assert endpoint.job_name == job_name("compat-life")
    assert endpoint.base_url.endswith("/training/v1/rlorTrainerJobs/local/compat-life")
    assert endpoint.max_context_length
    assert trainers.boot_time_s is not None
    row = trainers.get("compat-life")
    assert (row["displayName"], row["inactivityTimeout"]) == ("managers", "1800s")
    # Repeated, it finds what is there.
    assert trainers.create(config).job_id == "compat-life"
    assert trainers.wait_for_existing("compat-life") == endpoint

    await set_fault(platform, resource=job_name("compat-life"), fail="out of memory")
    with pytest.raises(ProvisioningError, match="out of memory"):
        while trainers.wait_for_ready("compat-life"):
            pass
    assert trainers.reconnect_and_wait("compat-life") == endpoint
    with pytest.raises(RuntimeError, match="409"):
        trainers.resume_and_wait("compat-life")

    trainers.delete("compat-life")
    with pytest.raises(ProvisioningError, match="can't be used again"):
        trainers.wait_for_ready("compat-life")
    with pytest.raises(ProvisioningError, match="can't be used again"):
        trainers.create(config)
    trainers.delete("never-was")  # logged, not raised
    assert trainers.try_get("never-was") is None
    with pytest.raises(RuntimeError, match="404"):
        trainers.get("never-was")


async def test_capacity_and_readiness_have_budgets_of_their_own(
    platform: RunningPlatform, trainers: TrainerJobManager
) -> None:
    config = TrainerJobConfig(base_model=platform.model, requested_job_id="compat-budget")
    await set_fault(platform, resource=job_name("compat-budget"), pending="no H200 is free")
    created = trainers.create(config)
    with pytest.raises(ProvisioningTimeout, match="no H200 is free"):
        trainers.wait_for_ready(created.job_id, timeout_s=600, pending_timeout_s=0.2)
    await set_fault(platform, resource=job_name("compat-budget"), delayS=3600)
    with pytest.raises(TimeoutError, match="JOB_STATE_CREATING"):
        trainers.wait_for_ready(created.job_id, timeout_s=0.2)
    with pytest.raises(TimeoutError, match="neither be used nor resumed"):
        trainers.reconnect_and_wait(created.job_id, max_wait_for_resumable_s=0.2)
    trainers.delete(created.job_id)


def test_a_config_that_no_server_would_take_is_refused() -> None:
    config = TrainerJobConfig(
        base_model="",
        training_shape_ref=ABSENT,
        auto_select_training_shape=True,
        node_count=2,
        accelerator_type="X",
        gradient_accumulation_steps=4,
        projection_head_dim=-1,
        display_name="x" * 64,
        inactivity_timeout=timedelta(hours=4),
    )
    with pytest.raises(InvalidArgument) as caught:
        config.validate()
    for part in ("base_model", "node_count", "accelerator_type", "not both", "display_name"):
        assert part in caught.value.message
    for part in ("gradient_accumulation", "projection_head_dim", "3 hours"):
        assert part in caught.value.message
    with pytest.raises(InvalidArgument, match="timedelta"):
        TrainerJobConfig(base_model="m", inactivity_timeout="soon").validate()


def test_the_managers_take_no_account(platform: RunningPlatform) -> None:
    for manager in (TrainerJobManager, DeploymentManager):
        with pytest.raises(ValueError, match="leave it out"):
            manager(platform.api_key, platform.base_url, account_id="local")
        with pytest.raises(TypeError, match="color"):
            manager(platform.api_key, platform.base_url, color="red")


# -- deployments ---------------------------------------------------------------------------------


async def test_a_deployment_from_creation_to_its_end(
    platform: RunningPlatform, trainers: TrainerJobManager, deployments: DeploymentManager
) -> None:
    profile = trainers.resolve_training_profile(platform.training_shape)
    config = DeploymentConfig.from_training_profile(
        deployment_id="compat-d1",
        base_model=platform.model,
        profile=profile,
        annotations={"owner": "test"},
        hot_load_transition_type="sync",
    )
    created = deployments.create_or_get(config)
    ready = deployments.wait_for_ready("compat-d1")
    assert ready.state == "READY"
    assert ready.annotations == {"owner": "test"}
    assert ready.inference_model == created.name == "accounts/local/deployments/compat-d1"
    assert deployments.create_or_get(config).create_time == ready.create_time
    assert deployments.warmup(ready.name, max_retries=2)
    assert not deployments.warmup("accounts/local/deployments/none", 2, retry_interval_s=0.01)

    attached = deployments.reattach_trainer(
        "compat-d1",
        base_model=platform.model,
        trainer_job_name=job_name("compat-j9"),
        timeout_s=60,
        hot_load_transition_type="ASYNC",
    )
    assert attached.hot_load_trainer_job == job_name("compat-j9")
    assert attached.hot_load_transition_type == "ASYNC"
    again = deployments.reattach_trainer(
        attached, base_model="", trainer_job_name=job_name("compat-j9"), timeout_s=60
    )
    assert again == attached

    changed = deployments.update("compat-d1", {"displayName": "new"}, ["display_name"])
    assert changed.deployment_id == "compat-d1"
    deployments.scale_to_zero("compat-d1")
    found = deployments.get("compat-d1")
    assert found is not None
    assert found.max_replica_count == 0

    fresh = deployments.create_or_get(config, force_recreate=True)
    assert fresh.create_time != ready.create_time
    await set_fault(platform, resource=fresh.name, fail="image pull failed")
    with pytest.raises(ProvisioningError, match="image pull failed"):
        deployments.wait_for_ready("compat-d1")
    # One that failed is replaced.
    assert deployments.create_or_get(config).state == "CREATING"
    deployments.delete("compat-d1")
    assert deployments.get("compat-d1") is None
    with pytest.raises(RuntimeError, match="404"):
        deployments.wait_for_ready("compat-d1")


async def test_a_warm_up_spaces_its_attempts() -> None:
    """Also where a deployment refuses at once: they are to last until it is up."""
    loop, asked = asyncio.get_running_loop(), list[float]()

    async def busy(request: web.Request) -> web.Response:
        asked.append(loop.time())
        return web.Response(status=503)

    app = web.Application()
    app.router.add_post("/inference/v1/completions", busy)

    def warm_up(url: str) -> bool:
        with DeploymentManager("key", url) as manager:
            return manager.warmup("accounts/a/deployments/d", 3, retry_interval_s=0.2)

    async with TestServer(app) as server:
        assert not await asyncio.to_thread(warm_up, str(server.make_url("")).rstrip("/"))
    assert len(asked) == 3
    assert min(asked[1] - asked[0], asked[2] - asked[1]) >= 0.19


async def test_a_deployment_that_takes_too_long(
    platform: RunningPlatform, deployments: DeploymentManager
) -> None:
    name = "accounts/local/deployments/compat-d2"
    await set_fault(platform, resource=name, delayS=3600)
    deployments.create_or_get(DeploymentConfig("compat-d2", platform.model))
    with pytest.raises(TimeoutError, match="CREATING"):
        deployments.wait_for_ready("compat-d2", timeout_s=0.2)
    deployments.delete("compat-d2")


def test_a_config_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="ASYNC or SYNC"):
        DeploymentConfig("d", "m", hot_load_transition_type="soon")
    with pytest.raises(ValueError, match="not both"):
        DeploymentConfig("d", "m", deployment_shape="s", accept_shapeless_risk=True).validate()
    with pytest.raises(ValueError, match="linked to"):
        DeploymentConfig("d", "m", deployment_shape="s", expected_deployment_shape="t").validate()
    with pytest.raises(ValueError, match="no deployment shape"):
        DeploymentConfig.from_training_profile(deployment_id="d", base_model="m", profile=object())


# -- snapshots -----------------------------------------------------------------------------------


def test_without_a_deployment_it_only_saves() -> None:
    class Client:
        def save_weights_for_sampler_ext(self, name: str, checkpoint_type: Any = None) -> Any:
            return saved_snapshot(f"{name}-{checkpoint_type}")

    syncer = WeightSyncer(Client())
    assert syncer.save_and_hotload("a") == "a-base"
    assert syncer.save_and_hotload("b") == "b-delta"
    assert syncer.hotload("a-base", "base") is False
    with pytest.raises(ValueError, match="deploy_mgr"):
        syncer.get_deployment_sampler()
    assert WeightSyncer(Client(), lora_rank=8).save_only("a") == "a-base"
    delta = WeightSyncer(Client(), first_checkpoint_type="delta")
    assert delta.save_only("a") == "a-delta"
    delta.lora_rank = 8
    assert delta.save_only("b") == "b-base"


def saved_snapshot(name: str) -> Any:
    return type("Saved", (), {"snapshot_name": name})()


async def test_waits_for_hot_loads_end_and_say_why(
    platform: RunningPlatform, deployments: DeploymentManager
) -> None:
    await set_fault(platform, resource="accounts/local/deployments/compat-d3", delayS=3600)
    deployments.create_or_get(DeploymentConfig("compat-d3", platform.model))
    assert not deployments.wait_for_hotload("compat-d3", platform.model, "s1", timeout_seconds=0)
    assert deployments.last_hotload_error_message is not None
    assert "LOADING: 0: no snapshot" in deployments.last_hotload_error_message
    syncer = WeightSyncer(nothing_to_save(), deployments, "compat-d3", platform.model)
    syncer.wait_for_hotload_ready(timeout_s=0)
    deployments.delete("compat-d3")
    with pytest.raises(HotLoadTimeout, match="NOT_THERE"):
        syncer.wait_for_hotload_ready(timeout_s=0)
    with pytest.raises(RuntimeError, match="404"):
        deployments.wait_for_hotload("compat-d3", platform.model, "s1")


def nothing_to_save() -> Any:
    return object()


# -- names ---------------------------------------------------------------------------------------


def test_every_name_is_there_and_is_what_it_says() -> None:
    for name in compat.__all__:
        assert getattr(compat, name) is not None
    assert compat.ServiceClient is compat.FiretitanServiceClient
    assert issubclass(compat.ServiceClient, fireworks_training.FiretitanServiceClient)
    assert compat.APIStatusError is fireworks_training.ApiStatusError
    assert set(dir(compat)) == set(compat.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = compat.nothing  # type: ignore[attr-defined]


def test_close_is_idempotent(platform: RunningPlatform) -> None:
    with FireworksClient(platform.api_key, platform.base_url) as client:
        assert client.account_id == "local"
    client.close()
    with pytest.raises(ClientClosed):
        client.list_checkpoints("j1")
    FireworksClient(platform.api_key, platform.base_url).close()
