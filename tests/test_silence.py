"""README's short programs with a fault in them: none ends as if all had gone well.

Each runs in a process of its own, on a platform that the session shares, with its futures dropped
as the README shows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import RunningPlatform

ROOT = Path(__file__).parent.parent

TRAINING = """
for index in range(4):
    tokens = FAULTY if FAULT == "third pass" and index == 2 else TOKENS
    name = "cross_entropyy" if FAULT == "loss name" else "cross_entropy"
    rate = -1.0 if FAULT == "learning rate" else 1e-4
    client.forward_backward([supervised_datum(tokens, [1.0] * len(tokens))], name)
    client.optim_step(tinker.AdamParams(learning_rate=rate))
"""

HEAD = """
import asyncio, tinker
from fireworks_training import (
    AsyncFiretitanServiceClient, FiretitanServiceClient, supervised_datum
)
TOKENS, FAULTY = [1, 2, 3, 4, 5], [1, 99999, 3]
OPTIONS = dict(
    base_model="accounts/local/models/tiny-qwen3", create_deployment=False,
    cleanup_trainer_on_close=True,
)
"""

CLOSED = (
    "with FiretitanServiceClient.from_firetitan_config(**OPTIONS) as service:\n"
    "    client = service.create_training_client()\n"
    "{training}"
    "    print('saved', client.save_state('end').result().path)\n"
)
LEFT_OPEN = (
    "if True:\n"
    "    service = FiretitanServiceClient.from_firetitan_config(**OPTIONS)\n"
    "    client = service.create_training_client()\n"
    "{training}"
    "    print('done')\n"
)
ASYNC = (
    "async def main():\n"
    "    service = AsyncFiretitanServiceClient.from_firetitan_config(**OPTIONS)\n"
    "    client = await service.create_training_client()\n"
    "{training}"
    "    print('done')\n"
    "asyncio.run(main())\n"
)


def run(platform: RunningPlatform, program: str, fault: str) -> subprocess.CompletedProcess[str]:
    body = program.format(training=textwrap.indent(TRAINING, "    "))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FIREWORKS_BASE_URL": platform.base_url,
        "FIREWORKS_API_KEY": platform.api_key,
    }
    return subprocess.run(
        [sys.executable, "-c", f"{HEAD}\nFAULT = {fault!r}\n{body}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("program", [CLOSED, LEFT_OPEN, ASYNC], ids=["closed", "open", "asyncio"])
@pytest.mark.parametrize("fault", ["learning rate", "loss name", "third pass"])
def test_a_program_with_a_fault_does_not_end_in_silence(
    platform: RunningPlatform, program: str, fault: str
) -> None:
    ended = run(platform, program, fault)
    assert ended.returncode != 0 or ended.stderr.strip(), (ended.stdout, ended.stderr)
    if fault == "learning rate":
        assert "adam_params.learning_rate is -1.0" in ended.stderr
    if fault == "loss name":
        assert "did you mean 'cross_entropy'" in ended.stderr
    if program is CLOSED:
        assert ended.returncode != 0


@pytest.mark.parametrize("program", [LEFT_OPEN, ASYNC], ids=["open", "asyncio"])
def test_futures_that_are_dropped_at_the_end_are_told(
    platform: RunningPlatform, program: str
) -> None:
    ended = run(platform, program, "none")
    assert "given up" in ended.stderr or "OwnerLoopGone" in ended.stderr, ended.stderr


def test_a_program_without_a_fault_is_quiet(platform: RunningPlatform) -> None:
    """The negative control."""
    ended = run(platform, CLOSED, "none")
    assert ended.returncode == 0, ended.stderr
    assert "failed" not in ended.stderr
    assert "given up" not in ended.stderr
