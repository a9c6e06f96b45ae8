"""A platform whose disk is full: it refuses in words, lets deletes through, and ends nobody."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fireworks_training.local.store.reserve import BYTES, FILE
from tests.local.processes.support import eventually
from tests.local.processes.test_supervisor import (
    JOBS,
    Started,
    _process,
    _settings,
    started,
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only a superuser may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("this user may mount no small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(autouse=True)
def _short_temporary(tmp_path: Path) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        (tmp_path / "tmp").symlink_to(folder)
        yield


def _fill(disk: Path) -> None:
    """Take every byte that is left."""
    with (disk / "fill").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


def _gateway(platform: Started) -> int:
    try:
        return platform.child("fireworks_training.local.gateway")
    except (LookupError, OSError):
        return 0  # it has just ended


def _make(platform: Started, job: str) -> tuple[int, str]:
    body = {"trainingConfig": {"baseModel": platform.ready["model"]}}
    status, answer = platform.call("POST", f"{JOBS}?rlorTrainerJobId={job}", body)
    return status, json.dumps(answer)


def test_a_full_disk_refuses_in_words_and_lets_deletes_through(tmp_path: Path, disk: Path) -> None:
    with started(tmp_path, state_dir=str(disk / "state")) as platform:
        platform.make_job("old")
        worker = platform.worker()
        assert (disk / "state" / FILE).stat().st_size == BYTES
        _fill(disk)
        gateway = platform.child("fireworks_training.local.gateway")
        os.kill(gateway, signal.SIGKILL)
        eventually(lambda: _gateway(platform) not in (0, gateway), "the gateway is there again")
        assert platform.call("GET", "/healthz")[0] == 200
        assert platform.worker() == worker
        eventually(lambda: platform.state("old") == "JOB_STATE_RUNNING", "the job is taken up")
        # Negative control: it is the disk that is full, not the room that was kept.
        _fill(disk)
        for _ in range(3):
            status, answer = _make(platform, "new")
            assert status == 507, answer
            assert "is full" in answer
            status, answer = platform.call("POST", "/api/v1/create_session", {})
            assert status == 507, answer
        assert platform.call("DELETE", f"{JOBS}/old")[0] == 200
        eventually(lambda: platform.state("old") == "JOB_STATE_DELETED", "the job is deleted")
        (disk / "fill").unlink()
        assert _make(platform, "new")[0] == 200
        assert (disk / "state" / FILE).stat().st_size == BYTES
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_a_start_on_a_full_disk_says_so(tmp_path: Path, disk: Path) -> None:
    _fill(disk)
    settings = _settings(tmp_path, state_dir=str(disk / "state"))
    with _process(tmp_path, settings) as process:
        assert process.stdout is not None
        error = json.loads(process.stdout.readline())["error"]
        assert process.wait(30) == 1
    assert "full" in error or "No space left" in error, error
