"""The examples run, as scripts, against the session's platform."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningPlatform

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_prints_its_scores(platform: RunningPlatform, example: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", str(example)],
        env={
            **os.environ,
            "FIREWORKS_BASE_URL": platform.base_url,
            "FIREWORKS_API_KEY": platform.api_key,
            "PYTHONPATH": str(example.parent.parent),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    rows = [ast.literal_eval(line) for line in finished.stdout.splitlines() if "step" in line]
    steps = [row["step"] for row in rows if "step" in row]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 5
    assert all(0 <= row["eval_score"] <= 1 for row in rows if "step" in row)
    assert "Traceback" not in finished.stderr
    assert "nclosed" not in finished.stderr  # sessions and sockets
