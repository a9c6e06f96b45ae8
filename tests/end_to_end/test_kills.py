"""kill -9 of the client anywhere between its first create and the end of its close, then `reap`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import AsyncControlPlane
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._async.runtime.processes import this_process
from fireworks_training._core.ledger import LedgerEntry, fold
from tests.conftest import RunningPlatform
from tests.end_to_end.support import service_on

ROOT = Path(__file__).parent.parent.parent
POINTS = 20

# Counts every exchange and every line of the ledger, before and after, from the first intent on,
# and kills itself at one of them.
CLIENT = """
import asyncio, os, signal, sys
from fireworks_training import AsyncFiretitanServiceClient, supervised_datum
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._async.http.transport import Transport

point, seen = int(sys.argv[1]), 0

def pass_by():
    global seen
    seen += 1
    if seen == point:
        os.kill(os.getpid(), signal.SIGKILL)

exchange, append = Transport.exchange, LedgerFile.append

async def counted_exchange(self, *args, **options):
    if seen:
        pass_by()
    answer = await exchange(self, *args, **options)
    if seen:
        pass_by()
    return answer

def counted_append(self, entries):
    pass_by()
    append(self, entries)
    pass_by()

Transport.exchange, LedgerFile.append = counted_exchange, counted_append

async def main():
    service = AsyncFiretitanServiceClient.from_firetitan_config(
        base_model=sys.argv[2],
        training_shape_id=sys.argv[3],
        deployment_id=sys.argv[4],
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )
    async with service:
        client = await service.create_training_client()
        import tinker
        await client.forward_backward([supervised_datum([5, 6, 7], [0, 1, 1])], "cross_entropy")
        await client.optim_step(tinker.AdamParams())
        saved = await client.save_weights_for_sampler("s")
        sampler = await service.create_deployment_sampler(saved.path)
        await sampler.sample_with_prompt_tokens([5, 6], max_tokens=1)
    print(seen, flush=True)

asyncio.run(main())
"""


def client(platform: RunningPlatform, point: int, state: Path) -> subprocess.CompletedProcess[str]:
    """The client's run up to a point."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_STATE_HOME": str(state),
        "FIREWORKS_BASE_URL": platform.base_url,
        "FIREWORKS_API_KEY": platform.api_key,
    }
    arguments = [str(point), platform.model, platform.training_shape, f"killed-{point}"]
    return subprocess.run(
        [sys.executable, "-c", CLIENT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def reap(platform: RunningPlatform, state: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "fireworks_training.cli", "reap", "--json"],
        env={
            **os.environ,
            "XDG_STATE_HOME": str(state),
            "FIREWORKS_BASE_URL": platform.base_url,
            "FIREWORKS_API_KEY": platform.api_key,
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


async def there(platform: RunningPlatform) -> set[str]:
    async with AsyncControlPlane.connect(
        base_url=platform.base_url, api_key=platform.api_key
    ) as plane:
        jobs, deployments = await plane.list_jobs(), await plane.list_deployments()
        return {row.name for row in [*jobs, *deployments]}


@pytest.mark.slow
async def test_nothing_of_a_killed_run_is_left_and_nothing_else_is_touched(
    platform: RunningPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    whole = client(platform, 0, tmp_path)
    assert whole.returncode == 0, whole.stderr
    last = int(whole.stdout)
    ledger = LedgerFile()
    usual = LedgerEntry(
        at=time.time(),
        event="intent",
        kind="deployment",
        resource_id="before-the-intent",
        account="local",
        base_url=platform.base_url,
        nonce="0" * 12,
        owner=replace(this_process(), started="before"),
    )
    async with (
        AsyncControlPlane.connect(base_url=platform.base_url, api_key=platform.api_key) as plane,
        service_on(platform) as alive,
    ):
        await alive.create_training_client()
        await plane.create_deployment(usual.resource_id, {"baseModel": platform.model})
        untouched = await there(platform)
        killed = 0
        for number in range(POINTS):
            ledger.append([usual, replace(usual, event="created", account="somebody-else")])
            point = 1 + round(number * (last - 1) / (POINTS - 1))
            run = client(platform, point, tmp_path)
            assert run.returncode in (-signal.SIGKILL, 0), run.stderr
            killed += run.returncode == -signal.SIGKILL
            reap(platform, tmp_path)
            assert await there(platform) == untouched, f"after a kill at point {point} of {last}"
            left = {
                (claim.last.account, claim.last.owner.pid == os.getpid())
                for claim in fold(ledger.read())
                if claim.last.event != "intent"  # nothing came of it, and it may be on its way
            }
            assert left == {("somebody-else", True), ("local", True)}
        # Polls make some runs a little shorter than the first: most kills must still have come.
        assert killed >= POINTS - 3
        await plane.delete_deployment(usual.resource_id)


@pytest.mark.slow
async def test_a_killed_run_is_seen_and_without_a_reap_it_stays(
    platform: RunningPlatform, tmp_path: Path
) -> None:
    """The negative control."""
    before = await there(platform)
    run = client(platform, 30, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = await there(platform) - before
    assert len(left) == 2
    rows = reap(platform, tmp_path)
    assert {row["outcome"] for row in rows} == {"removed"}
    assert await there(platform) == before
