"""Scripts of the `tinker` client that end without a word: the next ones run all the same."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from tests.conftest import RunningPlatform
from tests.end_to_end.support import model_folder

SCRIPTS = 10


async def _script(platform: RunningPlatform, seed: int) -> float:
    """Run one script as a process, and return the loss that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.end_to_end.tinker_script",
        str(model_folder()),
        str(seed),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"TINKER_BASE_URL": platform.base_url, "TINKER_API_KEY": platform.api_key},
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]
    return float(output)


@pytest.mark.slow
async def test_ten_scripts_one_after_another(platform: RunningPlatform) -> None:
    losses = [await _script(platform, seed) for seed in range(SCRIPTS)]
    assert max(losses) - min(losses) < 1e-3  # fresh adapters change nothing yet


@pytest.mark.slow
async def test_ten_scripts_at_once(platform: RunningPlatform) -> None:
    losses = await asyncio.gather(*(_script(platform, seed) for seed in range(SCRIPTS)))
    assert max(losses) - min(losses) < 1e-3
