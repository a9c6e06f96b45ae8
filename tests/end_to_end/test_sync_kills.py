"""kill -9 at every stage of a sync: the next one succeeds, on the right weights."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest

from fireworks_training import FireworksTrainingError, TrainerLost
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, service_on

SMALL = ADAM.model_copy(update={"learning_rate": 2e-5})
STAGES = ["asked", "writing", "written", "live"]
SOON = 90.0


def workers(platform: RunningPlatform, name: str) -> list[int]:
    """Processes of the platform whose command line holds `name`."""
    family = psutil.Process(platform.process.pid).children(recursive=True)
    return sorted(p.pid for p in family if name in " ".join(p.cmdline()) or p.name() == name)


def snapshots(platform: RunningPlatform) -> set[str]:
    folder = platform.state_dir / "snapshots"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


async def step(client: Any, seed: int) -> None:
    client.forward_backward(datums(4, seed=seed), "cross_entropy")
    await client.optim_step(SMALL)


async def reached(platform: RunningPlatform, stage: str, before: set[str], sync: Any) -> None:
    """Returns when a sync has come to a stage, or is over."""

    def there() -> bool:
        new = snapshots(platform) - before
        return sync.done() or (bool(new) if stage == "writing" else any(n[0] != "." for n in new))

    if stage == "live":
        await sync
    elif stage != "asked":
        while not there():  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", ["fwt-engine", "fwt-trainer", "fireworks_training.local.gateway"]
)
async def test_the_next_sync_succeeds(victim: str, own_platform: Any) -> None:
    with own_platform() as platform:
        async with service_on(platform, create_deployment=True) as service:
            client = await service.create_training_client()
            await client.weight_sync(on_drift="raise", drift_bound=1e-3)
            for number, stage in enumerate(STAGES):
                await step(client, number)
                await client.save_state(f"state-{number}")
                before = snapshots(platform)
                sync = client.weight_sync()
                async with asyncio.timeout(SOON):
                    await reached(platform, stage, before, sync)
                    (pid,) = workers(platform, victim)
                    os.kill(pid, signal.SIGKILL)
                    (ended,) = await asyncio.gather(sync, return_exceptions=True)
                    if isinstance(ended, BaseException):
                        assert isinstance(ended, FireworksTrainingError)
                        assert victim == "fwt-trainer", (stage, ended)
                    if victim == "fwt-trainer":
                        with pytest.raises(TrainerLost):
                            await client.forward(datums(1))
                        client = await service.recover_training_client()
                    await step(client, 10 + number)
                    result = await client.weight_sync(on_drift="raise", drift_bound=1e-3)
                assert result.drift is not None, stage
                sampler = await service.create_deployment_sampler()
                (one,) = await sampler.sample_with_prompt_tokens([40, 41], max_tokens=1)
                assert one.snapshot_identity == result.identity


CLIENT = """
    import asyncio, sys
    from tests.end_to_end.support import datums
    from tests.end_to_end.test_sync_kills import SMALL
    from fireworks_training import AsyncFiretitanServiceClient

    async def main():
        service = AsyncFiretitanServiceClient.from_firetitan_config(
            base_url=sys.argv[1], api_key=sys.argv[2], base_model=sys.argv[3],
            training_shape_id=sys.argv[4], trainer_job_id="j", deployment_id="d")
        client = await service.create_training_client()
        while True:
            client.forward_backward(datums(4), "cross_entropy")
            client.optim_step(SMALL)
            result = await client.weight_sync()
            print(result.identity, flush=True)

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_a_client_that_is_killed_leaves_nothing_that_a_new_one_trips_over(
    own_platform: Any,
) -> None:
    with own_platform() as platform:
        for delay in (0.0, 0.03, 0.08, 0.15):
            process = subprocess.Popen(  # noqa: ASYNC220 - it is waited for in a thread
                [
                    *(sys.executable, "-c", textwrap.dedent(CLIENT)),
                    *(platform.base_url, platform.api_key, platform.model),
                    platform.training_shape,
                ],
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            assert process.stdout is not None
            for _ in range(2):
                assert await asyncio.to_thread(process.stdout.readline)
            await asyncio.sleep(delay)  # somewhere in the sync after these
            process.kill()
            await asyncio.to_thread(process.wait)
            process.stdout.close()
            options = {"trainer_job_id": "j", "deployment_id": "d", "create_deployment": True}
            async with service_on(platform, **options) as service:
                client = await service.create_training_client()
                for number in range(2):
                    await step(client, number)
                    result = await client.weight_sync(on_drift="raise", drift_bound=1e-3)
                    assert result.snapshot.kind == ("base", "delta")[number]
                    assert result.drift is not None
