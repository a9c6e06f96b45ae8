"""A platform of its own with one deployment, for the benchmarks that sample over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from fireworks_training import AsyncControlPlane, DeploymentSampler, FixedConcurrencyController

MODEL = "accounts/local/models/tiny-qwen3"


@dataclass(frozen=True)
class Served:
    """A deployment that is READY."""

    base_url: str
    api_key: str
    deployment: str
    state_dir: Path
    process: subprocess.Popen[bytes]

    @property
    def resource(self) -> str:
        """The deployment's name for requests."""
        return f"accounts/local/deployments/{self.deployment}"

    def sampler(self, controller: object = None) -> DeploymentSampler:
        """A sampler of its own for the deployment; 512 requests in flight unless told otherwise."""
        return DeploymentSampler(
            self.base_url,
            self.resource,
            self.api_key,
            concurrency_controller=controller or FixedConcurrencyController(512),
            integer_stops=True,
        )


@asynccontextmanager
async def served(
    *options: str, model: str = MODEL, replicas: int = 1, deployment: str = "bench", **extra: object
) -> AsyncIterator[Served]:
    """`fireworks-training serve`, and a deployment of `model` in it; gone at the end.

    Args:
        options: more options of `serve`.
        model: what the deployment serves.
        replicas: its engines.
        deployment: its id.
        extra: more fields of its body.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fireworks_training.cli", "serve", "--json", "--until-eof"]
        # Starting it may block: nothing else runs yet.
        process = subprocess.Popen(  # noqa: ASYNC220
            [*command, "--state-dir", folder, *options],
            stdin=subprocess.PIPE,  # closed with this process, whatever ends it
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            url, key = ready["base_url"], ready["api_key"]
            body = {"baseModel": model, "maxReplicaCount": replicas, **extra}
            async with AsyncControlPlane.connect(api_key=key, base_url=url) as plane:
                await plane.create_deployment(deployment, body)
                with anyio.fail_after(120):
                    while True:
                        info = await plane.get_deployment(deployment)
                        if info is not None and info.state in ("READY", "FAILED"):
                            break
                        await anyio.sleep(0.1)
            if info.state != "READY":
                raise RuntimeError(f"the deployment failed: {info}")
            yield Served(url, key, deployment, Path(folder), process)
        finally:
            process.terminate()
            process.wait(30)
