"""The demo: its arithmetic, its files, a run against a platform, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fireworks_training import InvalidArgument, SampledCompletion
from fireworks_training.cli.demo import SHIPPED_PROBLEMS, demo, run
from fireworks_training.cli.demo_loop import (
    Plan,
    Problem,
    Score,
    advantages,
    load_problems,
    reward,
    split,
)
from fireworks_training.cli.demo_report import wilson
from tests.conftest import RunningPlatform
from tests.test_exit import SOON, runtime_folders


def completion(text: str) -> SampledCompletion:
    return SampledCompletion(text, [1, 2], 1, "stop", 1)


@pytest.mark.parametrize(
    ("text", "right"),
    [("3+4=7. #### 7", 1), ("#### 7", 1), ("#### 8 #### 7", 1), ("7", 0), ("#### 77", 0), ("", 0)],
)
def test_the_last_marked_number_counts(text: str, right: int) -> None:
    assert reward(completion(text), Problem("?", "7")) == right


def test_advantages_are_relative_to_their_group() -> None:
    assert advantages([1, 0, 1, 0, 1, 1, 1, 1], 4) == [1, -1, 1, -1, 0, 0, 0, 0]


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_interval_holds_the_share(right: int, extra: int) -> None:
    score = Score(right, right + extra)
    low, high = wilson(score)
    assert 0 <= low <= score.accuracy <= high <= 1


def test_the_last_problems_are_held_out() -> None:
    problems = load_problems(SHIPPED_PROBLEMS)
    training, held_out = split(problems, Plan())
    assert [*training, *held_out] == problems
    assert len(held_out) == 400
    assert len(split(problems[:3], Plan())[0]) == 2
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}


@pytest.mark.parametrize("line", ["not json", "[1]", '{"prompt": "x"}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": 1}\n' + line + "\n")
    with pytest.raises(InvalidArgument, match="line 2"):
        load_problems(data)
    result = CliRunner().invoke(demo, ["--data", str(data), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "line 2" in result.output


async def test_a_short_run_writes_its_files(platform: RunningPlatform, tmp_path: Path) -> None:
    output = io.StringIO()
    plan = Plan(steps=2, prompts=4, samples=4, held_out=20, score_every=1)
    summary = await run(
        Console(file=output, width=200),
        load_problems(SHIPPED_PROBLEMS),
        plan,
        tmp_path,
        platform.base_url,
        platform.api_key,
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["steps"] == 2
    assert summary["drift_mean_abs"] <= 1e-4  # type: ignore[operator]
    assert summary["drift_max_abs"] <= 1e-2  # type: ignore[operator]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["held_out_accuracy"] is not None
    assert rows[1]["snapshot"].startswith("step-00000-")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "step   1" in output.getvalue()
    assert "Held-out problems solved" in output.getvalue()


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    before = runtime_folders()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fireworks_training.cli", "demo", "--out", str(tmp_path)),
            *("--prompts", "2", "--samples", "2", "--held-out", "4"),
        ],
        env={k: v for k, v in os.environ.items() if not k.startswith("FIREWORKS_")},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step   2"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.stdout.read()
        assert process.wait(SOON) == 130
    finally:
        process.kill()
        process.communicate()
    assert not psutil.wait_procs(children, timeout=15)[1]
    assert runtime_folders() <= before
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 2
