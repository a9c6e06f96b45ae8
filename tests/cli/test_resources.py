"""The commands that show resources, against a platform."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fireworks_training import ControlPlane
from fireworks_training.cli import doctor as doctor_module
from fireworks_training.cli import main
from tests.conftest import RunningPlatform

Run = Callable[..., Result]


@pytest.fixture
def run(platform: RunningPlatform) -> Run:
    environment = {
        "FIREWORKS_BASE_URL": platform.base_url,
        "FIREWORKS_API_KEY": platform.api_key,
        "COLUMNS": "240",
    }

    def invoke(*arguments: str, **changes: str) -> Result:
        return CliRunner().invoke(main, arguments, env={**environment, **changes})

    return invoke


def rows(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return list(json.loads(result.output))


@pytest.fixture(scope="module")
def resources(platform: RunningPlatform) -> Any:
    """A job and a deployment, and their ids."""
    with ControlPlane.connect(base_url=platform.base_url, api_key=platform.api_key) as plane:
        plane.create_job("cli-job", {"trainingConfig": {"baseModel": platform.model}})
        plane.create_deployment("cli-deployment", {"baseModel": platform.model})
        yield plane
        plane.delete_job("cli-job")
        plane.delete_deployment("cli-deployment")


def test_shapes(run: Run, platform: RunningPlatform) -> None:
    (row,) = rows(run("shapes", "--json"))
    assert row["name"] == f"{platform.training_shape}/versions/1"
    assert rows(run("shapes", platform.training_shape, "--json")) == [row]
    table = run("shapes").output
    assert "POLICY_TRAINER" in table
    assert "DEPLOYMENT SHAPE" in table
    wrong = run("shapes", "cpu")
    assert (wrong.exit_code, "full name" in wrong.output) == (1, True)


@pytest.mark.usefixtures("resources")
def test_jobs_and_deployments(run: Run, platform: RunningPlatform) -> None:
    found = {row["job_id"]: row for row in rows(run("jobs", "--json"))}
    assert found["cli-job"]["base_model"] == platform.model
    assert "cli-job" in run("jobs").output
    deployed = {row["deployment_id"]: row for row in rows(run("deployments", "--json"))}
    assert deployed["cli-deployment"]["max_replica_count"] == 1
    assert "cli-deployment" in run("deployments").output


@pytest.mark.usefixtures("resources")
def test_checkpoints(run: Run, platform: RunningPlatform) -> None:
    folder = platform.state_dir / "jobs" / "cli-job" / "states" / "step-1"
    folder.mkdir(parents=True)
    (row,) = rows(run("checkpoints", "list", "cli-job", "--json"))
    assert (row["name"].rsplit("/", 1)[-1], row["promotable"]) == ("step-1", False)
    assert "CHECKPOINT_TYPE_TRAINING" in run("checkpoints", "list", "cli-job").output
    assert run("checkpoints", "list", "cli-job", "--promotable").output == "no checkpoints\n"
    arguments = ("checkpoints", "promote", row["name"], "cli-model", "--base-model", platform.model)
    refused = run(*arguments)
    assert (refused.exit_code, "no snapshot 'step-1'" in refused.output) == (1, True)
    nobody = run("checkpoints", "list", "nobody")
    assert (nobody.exit_code, "`fireworks-training jobs` shows" in nobody.output) == (1, True)
    half = run("checkpoints", "promote", "step-1", "cli-model", "--base-model", platform.model)
    assert (half.exit_code, "NAME is a full one" in half.output) == (1, True)


def on_terminal(platform: RunningPlatform, columns: int, *arguments: str) -> str:
    """The output of a command on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fireworks_training.cli", *arguments],
        env={
            **environment,
            "FIREWORKS_BASE_URL": platform.base_url,
            "FIREWORKS_API_KEY": platform.api_key,
        },
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # how a terminal says on Linux that its program has ended
        pass
    os.close(ours)
    assert process.wait() == 0
    return said.decode().replace("\r\n", "\n")


@pytest.mark.usefixtures("resources")
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_row_is_one_line_with_its_id_whole_at_every_width(
    platform: RunningPlatform, columns: int
) -> None:
    for command, name, state in (
        ("jobs", "cli-job", "JOB_STATE_"),
        ("deployments", "cli-deployment", "DEPLOYMENT_STATE_"),
    ):
        text = on_terminal(platform, columns, command)
        (row,) = (line for line in text.splitlines() if name in line)
        assert state in row or state.removeprefix("DEPLOYMENT_STATE_") in row
        table = [line for line in text.splitlines() if not line.startswith("left out:")]
        assert max(map(len, table)) <= columns
        assert ("left out: " in text) == (columns < 200)
        wide = on_terminal(platform, columns, command, "--wide")
        assert "left out: " not in wide
        assert len([line for line in wide.splitlines() if name in line]) == 1


@pytest.mark.usefixtures("resources")
def test_a_pipe_gets_every_column_on_one_line_a_row(run: Run) -> None:
    piped = run("jobs", COLUMNS="20").output
    (row,) = (line for line in piped.splitlines() if "cli-job" in line)
    assert "JOB_STATE_" in row
    assert "MESSAGE" in piped


def test_ps_without_a_key_asks_this_machine_and_speaks_to_a_shell(tmp_path: Path) -> None:
    bare = {"FIREWORKS_API_KEY": "", "FIREWORKS_BASE_URL": "", "XDG_STATE_HOME": str(tmp_path)}
    asked = CliRunner().invoke(main, ["ps"], env=bare)
    assert asked.exit_code == 0, asked.output
    assert "only platforms of this machine are asked" in asked.output
    refused = CliRunner().invoke(main, ["jobs"], env=bare)
    assert (refused.exit_code, "set FIREWORKS_API_KEY" in refused.output) == (1, True)
    assert "api_key=" not in refused.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    made = CliRunner().invoke(main, ["completion", shell])
    assert (made.exit_code, "_FIREWORKS_TRAINING_COMPLETE" in made.output) == (0, True)
    assert CliRunner().invoke(main, ["completion"], env={"SHELL": f"/bin/{shell}"}).output == (
        made.output
    )
    assert CliRunner().invoke(main, ["completion"], env={"SHELL": "/bin/none"}).exit_code == 2


def test_doctor_is_content(run: Run, platform: RunningPlatform) -> None:
    found = {row["check"]: row for row in rows(run("doctor", "--json"))}
    assert found.keys() >= {"python", "tinker", "key taken", "clock", "account", "control plane"}
    assert all(row["ok"] for row in found.values())
    assert found["control plane"]["ms"] > 0
    text = run("doctor").output
    assert "median of 5" in text
    assert platform.api_key not in text


def test_doctor_says_what_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_key = run("doctor", "--json", FIREWORKS_API_KEY="tml-wrong-key")
    assert wrong_key.exit_code == 1
    found = {row["check"]: row for row in json.loads(wrong_key.output)}
    assert (found["reachable"]["ok"], found["key taken"]["ok"]) == (True, False)
    nobody = run("doctor", "--json", FIREWORKS_BASE_URL="http://127.0.0.1:1")
    found = {row["check"]: row for row in json.loads(nobody.output)}
    assert (nobody.exit_code, found["reachable"]["ok"]) == (1, False)
    monkeypatch.setattr(doctor_module.time, "time", lambda: 1e9)
    late = run("doctor", "--json")
    found = {row["check"]: row for row in json.loads(late.output)}
    assert (late.exit_code, found["clock"]["ok"]) == (1, False)
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    old = run("doctor", "--json")
    found = {row["check"]: row for row in json.loads(old.output)}
    assert (old.exit_code, "pip install" in found["tinker"]["detail"]) == (1, True)


def test_doctor_walks_the_whole_loop(run: Run, platform: RunningPlatform) -> None:
    found = rows(run("doctor", "--end-to-end", "--base-model", platform.model, "--json"))
    names = [row["check"] for row in found]
    for name in ("provision", "forward_backward", "hot load", "sample a token"):
        assert found[names.index(name)]["ms"] > 0
    failed = run("doctor", "--end-to-end", "--base-model", "accounts/local/models/none", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.output)[-1]["check"] == "end to end"
