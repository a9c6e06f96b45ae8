"""The demo: its arithmetic, its files, a run against a platform, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fireworks_training import InvalidArgument, SampledCompletion, read_evaluation
from fireworks_training.cli.demo import SHIPPED_PROBLEMS, WRITTEN, demo, run
from fireworks_training.cli.demo_loop import LoopPlan, advantages, reward
from fireworks_training.cli.demo_problems import (
    Problem,
    Score,
    StepRecord,
    load_problems,
    split,
)
from fireworks_training.cli.demo_report import Report, draw_curve, sparkline, wilson
from tests.conftest import RunningPlatform
from tests.test_exit import SOON


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a path that leaves room for the names of sockets."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def completion(text: str) -> SampledCompletion:
    return SampledCompletion(text, [1, 2], 1, "stop", 1)


def record(share: float) -> StepRecord:
    return StepRecord(0, share, share, 8, 1e3, 1e-7, 1e-6, 0.5, "step-00000", 1.0)


@pytest.mark.parametrize(
    ("text", "right"),
    [("3+4=7. #### 7", 1), ("#### 7", 1), ("#### 8 #### 7", 1), ("7", 0), ("#### 77", 0), ("", 0)],
)
def test_the_last_marked_number_counts(text: str, right: int) -> None:
    assert reward(completion(text), Problem("?", "7")) == right


def test_advantages_are_relative_to_their_group() -> None:
    assert advantages([1, 0, 1, 0, 1, 1, 1, 1], 4) == [1, -1, 1, -1, 0, 0, 0, 0]


def test_the_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([0.5] * 1000, width=20)) == 20


def test_the_live_view_shows_the_newest_steps(tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True)
    with Report(console, tmp_path, 20) as report:
        for step in range(20):
            report.add(dataclasses.replace(record(0.5), step=step, snapshot=f"step-{step:05d}"))
    shown = output.getvalue()
    assert "20/20" in shown
    assert "step-00019" in shown
    assert "▅" * 20 in shown


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_interval_holds_the_share(right: int, extra: int) -> None:
    score = Score(right, right + extra)
    low, high = wilson(score)
    assert 0 <= low <= score.accuracy <= high <= 1


def test_the_last_problems_are_held_out() -> None:
    problems = load_problems(SHIPPED_PROBLEMS)
    training, held_out = split(problems, LoopPlan().held_out)
    assert [*training, *held_out] == problems
    assert len(held_out) == 400
    assert len(split(problems[:3], 400)[0]) == 2
    assert not {p.prompt for p in training} & {p.prompt for p in held_out}


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[1]",
        b'{"prompt": "x"}',
        b'{"prompt": null, "answer": 1}',
        b'{"prompt": "x", "answer": null}',
        b'{"prompt": "x", "answer": true}',
        b'{"prompt": "x", "answer": " "}',
        b'{"prompt": " ", "answer": 1}',
        b'{"prompt": "\xe9", "answer": 1}',
        b"[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b'{"prompt": "a", "answer": 1}\n' + line + b"\n")
    with pytest.raises(InvalidArgument, match="line 2"):
        load_problems(data)
    result = CliRunner().invoke(demo, ["--data", str(data), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "line 2" in result.output


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "a\u2028b\x85c", "answer": "1 "}, {"prompt": "d", "answer": -2}]
    data.write_text("\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert load_problems(data) == [Problem("a\u2028b\x85c", "1"), Problem("d", "-2")]


def test_a_folder_that_cannot_be_made_is_an_error_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(demo, ["--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_another_run_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(*_: object) -> None:
        raise KeyboardInterrupt

    old = tmp_path / "old"
    old.mkdir()
    (old / WRITTEN[0]).write_text("old\n")
    monkeypatch.setattr("fireworks_training.cli.demo.run", stop)
    refused = CliRunner().invoke(demo, ["--out", str(old)])
    assert (refused.exit_code, "holds another run" in refused.output) == (1, True)
    assert [path.read_text() for path in old.iterdir()] == ["old\n"]
    monkeypatch.chdir(tmp_path)
    for wanted in ("fireworks-demo", "fireworks-demo-2"):
        result = CliRunner().invoke(demo, [])
        assert result.exit_code == 130
        assert "before the first step" in result.output
        assert (tmp_path / wanted).is_dir()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_curve_takes_every_share(tmp_path: Path, share: float) -> None:
    for total in (1, 7, 49, 200, 400):
        score = Score(round(share * total), total)
        draw_curve(tmp_path / "curve.png", [record(share)], score, score)


async def test_a_short_run_writes_its_files(platform: RunningPlatform, tmp_path: Path) -> None:
    output = io.StringIO()
    plan = LoopPlan(steps=2, prompts=4, samples=4, held_out=20, score_every=1)
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
    before, after = (read_evaluation(tmp_path / f"{when}.jsonl") for when in ("before", "after"))
    assert before.mean_score == summary["accuracy_before"]
    assert before.prompts_sha256 == after.prompts_sha256
    assert after.snapshot.startswith("step-00001-")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "step   1" in output.getvalue()
    assert "Held-out problems solved" in output.getvalue()


@pytest.mark.parametrize("impatient", [False, True])
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, temporary: Path, impatient: bool) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fireworks_training.cli", "demo", "--out", str(tmp_path)),
            *("--prompts", "2", "--samples", "2", "--held-out", "4"),
        ],
        env={k: v for k, v in os.environ.items() if not k.startswith("FIREWORKS_")}
        | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background makes SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step   2"):
                break
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        assert list(temporary.glob("fwt*"))
        process.send_signal(signal.SIGINT)
        if impatient:
            while all(child.is_running() for child in children):
                psutil.wait_procs(children, timeout=0.02)
            # The clean-up has begun: a worker has ended.
            process.send_signal(signal.SIGINT)
        assert "interrupted after step" in process.stdout.read()
        assert process.wait(SOON) == 130
    finally:
        process.kill()
        process.communicate()
    assert not psutil.wait_procs(children, timeout=15)[1]
    assert not list(temporary.glob("fwt*"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 2
