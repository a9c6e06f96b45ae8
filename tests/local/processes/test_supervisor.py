"""Whole platforms as processes: they start, survive deaths of their parts, and leave nothing.

The workers are stand-ins without torch, so that a start costs a second.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from resource import RLIMIT_NOFILE
from typing import Any

import pytest

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes import lifetime
from fireworks_training.local.processes.report import last_lines, ready_text
from fireworks_training.local.processes.restarts import RestartPolicy
from fireworks_training.local.settings import PlatformSettings, dump, parse
from tests.local.gateway.platform_fakes import write_model
from tests.local.processes.support import descendants, eventually, running

JOBS = "/v1/accounts/local/rlorTrainerJobs"
STANDIN = "tests.local.processes.standin_worker:main"


@dataclass
class Started:
    """A platform under test, and everything it has started so far."""

    process: subprocess.Popen[bytes]
    ready: dict[str, str]
    runtime_dir: Path
    seen: set[int] = field(default_factory=set)

    def look(self) -> set[int]:
        """The processes below the supervisor; remembered for the end."""
        found = descendants(self.process.pid)
        self.seen |= found
        return found

    def child(self, module: str) -> int:
        """The process of a module."""
        for pid in self.look():
            if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                comm = Path(f"/proc/{pid}/comm").read_text()
                if not comm.startswith("fwt-"):
                    return pid
        raise LookupError(module)

    def worker(self) -> int:
        """The only worker process."""
        (pid,) = [p for p in self.look() if Path(f"/proc/{p}/comm").read_text() == "fwt-trainer\n"]
        return pid

    def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.ready["base_url"] + path,
            method=method,
            data=json.dumps(body).encode(),
            headers={"X-API-Key": self.ready["api_key"]},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def state(self, job: str = "j1") -> str:
        return str(self.call("GET", f"{JOBS}/{job}")[1]["state"])

    def make_job(self, job: str = "j1") -> None:
        body = {"trainingConfig": {"baseModel": self.ready["model"]}}
        status, answer = self.call("POST", f"{JOBS}?rlorTrainerJobId={job}", body)
        assert status == 200, answer
        eventually(lambda: self.state(job) == "JOB_STATE_RUNNING", "the job runs")
        self.look()

    def ended_without_a_trace(self) -> None:
        eventually(lambda: not [p for p in self.seen if running(p)], "every process ends")
        eventually(lambda: not self.runtime_dir.exists(), "the runtime folder goes")


@pytest.fixture(autouse=True)
def _short_temporary(tmp_path: Path) -> Iterator[None]:
    """A temporary folder of the test's own, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        (tmp_path / "tmp").symlink_to(folder)
        yield


def _temporary(tmp_path: Path) -> Path:
    return (tmp_path / "tmp").readlink()


def _settings(tmp_path: Path, **more: object) -> dict[str, object]:
    model = tmp_path / "model"
    if not model.exists():
        write_model(model)
    return {
        "models": {"tiny": str(model)},
        "preload": [],
        "entry_points": {"trainer": STANDIN, "engine": STANDIN},
        **more,
    }


@contextmanager
def _process(
    tmp_path: Path, settings: dict[str, object], descriptors: tuple[int, int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with (tmp_path / "stderr").open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fireworks_training.local"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(_temporary(tmp_path))},
            preexec_fn=lambda: descriptors and resource.setrlimit(RLIMIT_NOFILE, descriptors),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait(30)


@contextmanager
def started(
    tmp_path: Path, descriptors: tuple[int, int] | None = None, **more: object
) -> Iterator[Started]:
    with _process(tmp_path, _settings(tmp_path, **more), descriptors) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert "error" not in ready, ready
        (runtime_dir,) = _temporary(tmp_path).iterdir()
        platform = Started(process, ready, runtime_dir)
        platform.look()
        yield platform


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_kill_9_of_the_supervisor_leaves_nothing(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        assert set(platform.ready) == {
            "base_url",
            "api_key",
            "account",
            "model",
            "training_shape",
            "tokenizer",
        }
        assert platform.ready["model"] == "accounts/local/models/tiny"
        assert platform.ready["api_key"].startswith("tml-")
        assert _mode(platform.runtime_dir) == 0o700
        assert _mode(platform.runtime_dir / "state") == 0o700
        platform.make_job()
        assert len(platform.seen) == 3
        for pid in {platform.process.pid, *platform.seen}:
            for name in ("cmdline", "environ"):
                assert platform.ready["api_key"] not in Path(f"/proc/{pid}/{name}").read_text()
        platform.process.kill()
        platform.ended_without_a_trace()


def test_a_lasting_state_is_locked_kept_and_taken_up(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with started(tmp_path, state_dir=str(state)) as platform:
        platform.make_job()
        assert _mode(state) == 0o700
        with _process(tmp_path, _settings(tmp_path, state_dir=str(state))) as second:
            assert second.stdout is not None
            answer = json.loads(second.stdout.readline())
            assert "in use by another platform" in answer["error"]
            assert second.wait(30) == 1
        # A trainer that is killed is noticed at once, also by a request that waits for it.
        data = "/training/v1/rlorTrainerJobs/local/j1/api/v1/hang"
        answers: list[tuple[int, Any]] = []
        waiting = threading.Thread(target=lambda: answers.append(platform.call("POST", data, {})))
        waiting.start()
        worker = platform.worker()
        os.kill(worker, signal.SIGKILL)
        waiting.join(30)
        ((status, body),) = answers
        assert (status, body["error_class"]) == (410, "ModelLost")
        assert platform.state() == "JOB_STATE_FAILED"
        platform.make_job("j2")
        platform.process.send_signal(signal.SIGTERM)
        assert platform.process.wait(30) == 0
        platform.ended_without_a_trace()
    with started(tmp_path, state_dir=str(state)) as platform:
        assert platform.state() == "JOB_STATE_FAILED"
        assert platform.state("j2") == "JOB_STATE_PAUSED"


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o755)
    with started(tmp_path, state_dir=str(state)) as platform:
        assert _mode(state) == 0o755
        platform.process.kill()
        platform.ended_without_a_trace()


def test_it_mends_itself_and_ends_with_its_client(tmp_path: Path) -> None:
    with started(tmp_path, embedded=True) as platform:
        platform.make_job()
        worker = platform.worker()
        for module in (
            "fireworks_training.local.gateway",
            "fireworks_training.local.processes.template",
        ):
            pid = platform.child(module)
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not running(pid), "it dies")  # type: ignore[misc]
            # The socket is the supervisor's: this waits for the new gateway instead of failing.
            eventually(lambda: platform.state() == "JOB_STATE_RUNNING", "the job is found again")
        assert running(worker)
        platform.seen.add(worker)
        platform.make_job("j2")
        platform.look()
        # Killed by hand, a worker that is nobody's child any more is noticed all the same.
        assert platform.call("DELETE", f"{JOBS}/j1")[0] == 200
        assert not running(worker)
        log = platform.runtime_dir / "state" / "platform.log"
        assert "starting it again" in log.read_text()
        assert platform.ready["api_key"] not in log.read_text()
        assert (tmp_path / "stderr").read_bytes() == b""
        assert platform.process.stdin is not None
        platform.process.stdin.close()
        assert platform.process.wait(30) == 0
        platform.ended_without_a_trace()


def test_a_start_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    settings = _settings(tmp_path, embedded=True, preload=["no_such_module"])
    with _process(tmp_path, settings) as process:
        assert process.stdout is not None
        error = json.loads(process.stdout.readline())["error"]
        assert "template process ended with code 3" in error
        assert "No module named 'no_such_module'" in error
        assert "fireworks-training[local]" in error
        assert process.wait(30) == 1
    assert list(_temporary(tmp_path).iterdir()) == []


def test_sigterm_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    settings = _settings(tmp_path, preload=["tests.local.processes.endless_module"])
    with _process(tmp_path, settings) as process:
        eventually(lambda: len(descendants(process.pid)) == 2, "gateway and template start")
        children = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""
        assert not [pid for pid in children if running(pid)]
    assert list(_temporary(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"host": ""}, "host is empty"),
        ({"port": 70000}, "port 70000"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"port": "1"}, "'port' is not of type int"),
        ({"embedded": 1}, "'embedded' is not of type bool"),
        ({"port": True}, "'port' is not of type int"),
        ({"models": {"../x": "/"}}, "'../x' is not 1 to 63"),
        ({"models": {"a": 1}}, "'models' is not"),
        ({"api_key": "short"}, "8 to 512 printable"),
        ({"api_key": "with a space"}, "8 to 512 printable"),
        ({"output": "xml"}, "'xml'"),
        ({"worker_start": "thread"}, "'thread'"),
        ({"entry_points": {"trainer": "a:b"}}, "entry_points"),
        ({"offers": ["pickle"]}, "none of batch-polling, zstd"),
        ([], "not a JSON object"),
    ],
)
def test_settings_are_checked(line: object, says: str) -> None:
    with pytest.raises(LocalPlatformError, match=says.replace("[", r"\[")) as caught:
        parse(PlatformSettings, json.dumps(line))
    assert "with a space" not in str(caught.value)


def test_settings_pass_through_a_pipe_unchanged() -> None:
    settings = PlatformSettings(port=8000, models={"a": "/m"}, preload=("x", "y"))
    assert parse(PlatformSettings, dump(settings)) == settings
    assert parse(PlatformSettings, b'{"api_key": null, "port": null}').port == 0
    assert settings.api_key not in repr(settings)
    with pytest.raises(LocalPlatformError, match="not JSON"):
        parse(PlatformSettings, b"{")


def test_restarts_back_off_and_give_up() -> None:
    policy = RestartPolicy(quick_s=10.0, max_quick_deaths=3)
    delays = [policy.died(0.1) for _ in range(3)]
    assert delays == sorted(delays, key=lambda delay: delay or 0.0)
    assert delays[0] is not None
    assert delays[0] > 0
    assert policy.died(0.1) is None
    # A long life forgives what was before.
    assert policy.died(11.0) == 0.0
    assert policy.died(0.1) == delays[0]


def test_the_last_one_removes_the_folder() -> None:
    folder = lifetime.make_runtime_dir()
    assert len(str(folder)) < lifetime.MAX_RUNTIME_PATH
    first, second = lifetime.hold_alive(folder), lifetime.hold_alive(folder)
    assert not lifetime.remove_when_last(folder, first, 0.0)
    assert folder.exists()
    assert lifetime.remove_when_last(folder, second, 0.0)
    assert not folder.exists()
    assert lifetime.remove_when_last(folder, None, 0.0)


def test_stale_folders_are_swept_and_living_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _temporary(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    young, living, stale = (lifetime.make_runtime_dir() for _ in range(3))
    foreign = base / "fwt-not-ours"
    foreign.mkdir()
    for folder in (living, stale, foreign):
        os.utime(folder, (1, 1))
    held = lifetime.hold_alive(living)
    assert lifetime.remove_stale_runtime_dirs() == [stale]
    assert young.exists()
    assert living.exists()
    assert foreign.exists()
    os.close(held)


def test_a_process_is_not_mistaken_for_another() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = lifetime.identify(process.pid)
    assert identity is not None
    assert identity.alive()
    impostor = lifetime.ProcessIdentity(process.pid, "1")
    assert not impostor.alive()
    assert not impostor.send(signal.SIGKILL)
    assert process.poll() is None
    assert identity.send(signal.SIGKILL)
    # Dead but not reaped is dead.
    eventually(lambda: not identity.alive(), "it dies")
    assert lifetime.identify(process.pid) is None
    assert not identity.send(signal.SIGKILL)
    process.communicate()


def test_what_a_person_reads(tmp_path: Path) -> None:
    facts = {
        "base_url": "http://127.0.0.1:1",
        "api_key": "tml-x",
        "model": "m",
        "training_shape": "s",
        "tokenizer": "/t",
    }
    assert "export FIREWORKS_BASE_URL=http://127.0.0.1:1" in ready_text(facts, None)
    assert "temporary" in ready_text(facts, None)
    assert "/kept" in ready_text(facts, "/kept")
    log = tmp_path / "log"
    assert last_lines(log) == ""
    log.write_text("\n".join(f"line {n}" for n in range(100)))
    assert last_lines(log).splitlines() == [f"line {n}" for n in range(80, 100)]


def test_a_damaged_database_is_named_by_the_failed_start(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "lock").touch()
    (state / "state.db").write_bytes(b"no database" * 1000)
    answer, code = _refusal(tmp_path, state)
    assert code == 1
    assert "state.db can't be used: file is not a database" in answer


@pytest.mark.parametrize("name", ["other", "Makefile", ".bashrc", "state.txt"])
def test_a_folder_of_somebody_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / name).write_text("mine")
    state.chmod(0o1777)
    before = state.stat()
    answer, code = _refusal(tmp_path, state)
    assert code == 1
    assert "holds other things than a platform's state" in answer
    assert [path.name for path in state.iterdir()] == [name]
    assert (_mode(state), state.stat().st_mtime_ns) == (0o1777, before.st_mtime_ns)


def _refusal(tmp_path: Path, state: Path) -> tuple[str, int]:
    """The error of a start that fails, and its exit code."""
    with _process(tmp_path, _settings(tmp_path, state_dir=str(state))) as process:
        assert process.stdout is not None
        answer = json.loads(process.stdout.readline())
        return str(answer["error"]), process.wait(30)


def test_a_platform_that_gives_up_starts_nothing_into_folders_that_go(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        last = 0
        while platform.process.poll() is None:
            try:
                gateway = platform.child("fireworks_training.local.gateway")
                template = platform.child("fireworks_training.local.processes.template")
            except (LookupError, OSError):
                continue
            if gateway != last:
                last = gateway
                for pid in (gateway, template):
                    os.kill(pid, signal.SIGKILL)
        platform.ended_without_a_trace()
    log = (tmp_path / "stderr").read_text()
    assert "died again and again" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(("soft", "hard", "connections"), [(64, 256, 600), (256, 256, 600)])
def test_idle_connections_lock_nobody_out(
    tmp_path: Path, soft: int, hard: int, connections: int
) -> None:
    with started(tmp_path, descriptors=(soft, hard)) as platform:
        gateway = platform.child("fireworks_training.local.gateway")
        assert resource.prlimit(gateway, RLIMIT_NOFILE) == (hard, hard)
        address = ("127.0.0.1", int(platform.ready["base_url"].rpartition(":")[2]))
        idle = [socket.create_connection(address, 30) for _ in range(connections)]
        try:
            for _ in range(20):
                assert platform.call("GET", "/healthz") == (200, {"status": "ok"})
            open_files = len(list(Path(f"/proc/{gateway}/fd").iterdir()))
            assert open_files < hard
        finally:
            for one in idle:
                one.close()
    log = (tmp_path / "stderr").read_text()
    assert len(log) < 10_000
    assert "Traceback" not in log
