"""Provisioning on a platform that is short of capacity, slow, or failing."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fireworks_training import AsyncControlPlane, ProvisioningError
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._core.ledger import fold
from tests.conftest import RunningPlatform
from tests.end_to_end.support import service_on

ROOT = Path(__file__).parent.parent.parent
SOON = 10.0
"""Seconds for a process to end: one is the promise, the rest is for a machine under load."""


@asynccontextmanager
async def fault(platform: RunningPlatform, resource: str, **fields: Any) -> AsyncIterator[None]:
    """A fault of one resource, while the block lasts."""
    url, headers = f"{platform.base_url}/local/v1/faults", {"X-API-Key": platform.api_key}
    body = {"resource": f"accounts/local/{resource}", **fields}
    async with aiohttp.ClientSession(headers=headers, raise_for_status=True) as session:
        await session.post(url, json=body)
        try:
            yield
        finally:
            await session.delete(url, params={"resource": body["resource"]})


@asynccontextmanager
async def control_plane(platform: RunningPlatform) -> AsyncIterator[AsyncControlPlane]:
    async with AsyncControlPlane.connect(
        base_url=platform.base_url, api_key=platform.api_key
    ) as plane:
        yield plane


async def until_pending(plane: AsyncControlPlane, job_id: str) -> None:
    """Polls: the client under test is another process."""
    async with asyncio.timeout(60):
        while True:
            job = await plane.get_job(job_id)
            if job is not None and job.state == "JOB_STATE_PENDING":
                return


@pytest.mark.as_cloud
async def test_the_trainer_fails_while_the_deployment_would_take_an_hour(
    platform: RunningPlatform,
) -> None:
    async with (
        fault(platform, "rlorTrainerJobs/doomed", fail="no such image"),
        fault(platform, "deployments/slow", delayS=3600),
        control_plane(platform) as plane,
        asyncio.timeout(60),
    ):
        service = service_on(
            platform, create_deployment=True, trainer_job_id="doomed", deployment_id="slow"
        )
        with pytest.raises(ProvisioningError, match="no such image") as failure:
            await service.create_training_client()
        assert failure.value.resource == "accounts/local/rlorTrainerJobs/doomed"
        assert "slow" not in {row.deployment_id for row in await plane.list_deployments()}
        assert "doomed" not in {row.job_id for row in await plane.list_jobs()}
        await service.close()


class Heard(logging.Handler):
    """Sets an event when something is logged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self.event = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self.event.set()


@pytest.mark.as_cloud
async def test_a_wait_for_capacity_says_why_and_ends_when_there_is_some(
    platform: RunningPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fireworks_training.provisioning")
    heard = Heard("JOB_STATE_PENDING: all places are taken")
    logging.getLogger("fireworks_training.provisioning").addHandler(heard)
    service = service_on(platform, trainer_job_id="queued")
    try:
        async with fault(platform, "rlorTrainerJobs/queued", pending="all places are taken"):
            call = asyncio.ensure_future(service.create_training_client())
            async with asyncio.timeout(60):
                await heard.event.wait()
        await call
    finally:
        logging.getLogger("fireworks_training.provisioning").removeHandler(heard)
        await service.close()


SCRIPTS = {
    "blocking": """
from fireworks_training import FiretitanServiceClient
with FiretitanServiceClient.from_firetitan_config(**OPTIONS) as service:
    service.create_training_client()
""",
    "blocking, never closed": """
from fireworks_training import FiretitanServiceClient
FiretitanServiceClient.from_firetitan_config(**OPTIONS).create_training_client()
""",
    "async": """
import asyncio
from fireworks_training import AsyncFiretitanServiceClient
async def main():
    async with AsyncFiretitanServiceClient.from_firetitan_config(**OPTIONS) as service:
        await service.create_training_client()
asyncio.run(main())
""",
}


def start(source: str, platform: RunningPlatform) -> subprocess.Popen[str]:
    """A script in a process of its own, which Ctrl-C reaches also where it starts ignored."""
    return subprocess.Popen(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FIREWORKS_API_KEY": platform.api_key},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(
    "script",
    [pytest.param("blocking", marks=pytest.mark.slow), "blocking, never closed", "async"],
)
async def test_ctrl_c_while_waiting_for_capacity(
    platform: RunningPlatform, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    job_id = "waits-" + script.replace(",", "").replace(" ", "-")
    options = {
        "base_url": platform.base_url,
        "base_model": platform.model,
        "training_shape_id": platform.training_shape,
        "trainer_job_id": job_id,
        "cleanup_deployment_on_close": "delete",
        "cleanup_trainer_on_close": True,
    }
    source = f"import json\nOPTIONS = json.loads({json.dumps(options)!r})\n{SCRIPTS[script]}"
    async with (
        fault(platform, f"rlorTrainerJobs/{job_id}", pending="full"),
        control_plane(platform) as plane,
    ):
        before = {row.name for row in await plane.list_deployments()}
        process = start(source, platform)
        try:
            await until_pending(plane, job_id)
            process.send_signal(signal.SIGINT)
            _, errors = await asyncio.to_thread(process.communicate, timeout=SOON)
        finally:
            process.kill()
            process.wait()
        assert "KeyboardInterrupt" in errors
        assert "was not cleaned up" not in errors
        assert job_id not in {row.job_id for row in await plane.list_jobs()}
        assert {row.name for row in await plane.list_deployments()} <= before
        assert fold(LedgerFile().read()) == []
