"""The servers as a user's tests drive them: a whole service on them, and no platform."""

from __future__ import annotations

import runpy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tinker

from fireworks_training import (
    AsyncFiretitanServiceClient,
    FiretitanServiceClient,
    HotLoadTimeout,
    ProvisioningError,
    RequestFailed,
    TrainerLost,
    supervised_datum,
)
from fireworks_training.testing import (
    CharacterTokenizer,
    CompletionsServer,
    ControlPlaneServer,
    TrainerServer,
)
from fireworks_training.testing.control_plane_server import DEPLOYMENTS, JOBS

EXAMPLE = Path(__file__).parents[2] / "examples" / "04_test_your_loop.py"
ADAM = tinker.AdamParams(learning_rate=1e-5)
DATUM = supervised_datum([1, 2, 3], [0, 1, 1])
OPTIONS: dict[str, Any] = {
    "api_key": "any",
    "base_model": "accounts/me/models/any",
    "cleanup_trainer_on_close": True,
    "cleanup_deployment_on_close": "delete",
}


def service_on(platform: ControlPlaneServer, **options: Any) -> AsyncFiretitanServiceClient:
    return AsyncFiretitanServiceClient.from_firetitan_config(
        base_url=platform.url, **OPTIONS | options
    )


async def test_the_example_holds() -> None:
    await runpy.run_path(str(EXAMPLE))["test_the_loop"]()


async def test_a_loop_against_the_three_servers() -> None:
    trainer, completions = TrainerServer(), CompletionsServer()
    async with ControlPlaneServer(trainer, completions, replicas=2) as platform:
        async with service_on(platform) as service:
            client = await service.create_training_client()
            for step in range(3):
                client.forward_backward([DATUM, DATUM], "cross_entropy")
                await client.optim_step(ADAM)
                saved = await client.save_weights_for_sampler(f"step-{step}")
                sampler = await service.create_deployment_sampler(
                    model_path=saved.path, tokenizer=CharacterTokenizer()
                )
                (answer,) = await sampler.sample_with_prompt_tokens([5], max_tokens=2)
                assert answer.completion_tokens == [6, 7]
                assert answer.snapshot_identity == saved.snapshot.identity == platform.loads[-1]
        assert trainer.steps == [2, 2, 2]
        assert [name for name, _ in trainer.applied] == [
            "forward_backward",
            "optim_step",
            "save_weights_for_sampler",
        ] * 3
        assert len(platform.loads) == len(completions.bodies) == 3
        assert platform.left() == []


def test_a_blocking_loop_with_servers_in_a_thread() -> None:
    before = set(threading.enumerate())
    with (
        ControlPlaneServer(TrainerServer(), CompletionsServer()) as platform,
        FiretitanServiceClient.from_firetitan_config(base_url=platform.url, **OPTIONS) as service,
    ):
        client = service.create_training_client()
        client.forward_backward([DATUM], "cross_entropy")
        client.optim_step(ADAM).result()
        synced = client.weight_sync("first").result()
        sampler = service.create_deployment_sampler(
            model_path=synced.identity, tokenizer=CharacterTokenizer()
        )
        hello = [{"role": "user", "content": "hi"}]
        (answer,) = sampler.sample_with_tokens(hello, max_tokens=1).result()
        assert answer.prompt_tokens == [ord(letter) for letter in "user:hi;assistant:"]
    assert platform.left() == []
    assert set(threading.enumerate()) <= before


async def test_an_operation_that_fails() -> None:
    trainer = TrainerServer(failing={1})
    async with ControlPlaneServer(trainer) as platform, service_on(platform) as service:
        client = await service.create_training_client()
        with pytest.raises(RequestFailed, match="scripted failure"):
            await client.forward_backward([DATUM], "cross_entropy")
    assert trainer.steps == []


async def test_a_trainer_that_dies() -> None:
    trainer = TrainerServer(executing=False)
    async with ControlPlaneServer(trainer) as platform, service_on(platform) as service:
        client = await service.create_training_client()
        operation = client.optim_step(ADAM)
        await trainer.until(lambda: len(trainer.submitted) == 1)
        await trainer.die()
        with pytest.raises(TrainerLost):
            await operation


async def test_a_job_that_fails_and_what_is_left_of_it() -> None:
    async with ControlPlaneServer() as platform:
        platform.states = {
            JOBS: ["JOB_STATE_CREATING", ("JOB_STATE_FAILED", "no such image")],
            DEPLOYMENTS: ["CREATING"],
        }
        async with service_on(platform) as service:
            with pytest.raises(ProvisioningError, match="no such image"):
                await service.create_training_client()
        assert platform.left() == []
        assert len(platform.sent("POST", JOBS)) == 1


async def test_a_hot_load_of_no_replica_is_never_live() -> None:
    """The control: what the servers say is what the service goes by."""
    async with ControlPlaneServer(TrainerServer(), replicas=0) as platform:
        async with service_on(platform, hotload_timeout_s=0.3) as service:
            client = await service.create_training_client()
            with pytest.raises(HotLoadTimeout, match="no replica is up yet"):
                await client.weight_sync("first")
        # It is asked for once all the same: a deployment may come up only by its first load.
        assert len(platform.loads) == 1


def test_the_servers_need_no_pytest() -> None:
    script = "import sys, fireworks_training.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_only_this_machine_can_connect() -> None:
    async with CompletionsServer() as server:
        assert server.url.startswith("http://127.0.0.1:")
