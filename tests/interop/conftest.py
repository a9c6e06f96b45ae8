"""Interpreters with the official clients, a platform whose key they take, and their scripts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningPlatform, running_platform
from tests.end_to_end.support import model_folder
from tests.interop.environments import interpreter

RUN_WITHIN_S = 300.0

OFFICIAL_KEY = "fw_interop_test_key"


@pytest.fixture(scope="session")
def official_python() -> str:
    """An interpreter that has the official Fireworks training SDK."""
    return interpreter("official")


@pytest.fixture(scope="session")
def official_platform(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningPlatform]:
    """A platform with a key as the official SDK wants it: it refuses those that begin with tml-.

    A test that names options (by `indirect`) gets one that was started with them.
    """
    options: tuple[str, ...] = getattr(request, "param", ())
    state = tmp_path_factory.mktemp("official")
    with running_platform(state, "--api-key", OFFICIAL_KEY, *options) as running:
        yield running


Peer = Callable[..., Awaitable[dict[str, Any]]]


@pytest.fixture
def peer(platform: RunningPlatform, tmp_path: Path) -> Peer:
    """`await peer("tinker", "script.py", *arguments)`: what a script of `peers/` saw."""

    shared = platform

    def blocking(
        name: str,
        script: str,
        *arguments: str,
        platform: RunningPlatform = shared,
        base_url: str | None = None,
    ) -> dict[str, Any]:
        url = base_url or platform.base_url
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("FIREWORKS_", "TINKER_", "PYTHON", "VIRTUAL_ENV"))
        }
        environment |= {
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": platform.api_key,
            "FIREWORKS_BASE_URL": url,
            # That client takes no key of the other's form; the platform knows both spellings.
            "FIREWORKS_API_KEY": f"fw_{platform.api_key.removeprefix('tml-')}",
            "TOKENIZER": str(model_folder()),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [interpreter(name), str(Path(__file__).parent / "peers" / script), *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=RUN_WITHIN_S,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        seen: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return seen

    async def run(*arguments: str, **options: Any) -> dict[str, Any]:
        return await asyncio.to_thread(blocking, *arguments, **options)

    return run
