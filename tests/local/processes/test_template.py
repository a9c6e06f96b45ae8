"""The template as a process: it forks and signals workers, and leaves none when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fireworks_training.local.processes import lifetime
from fireworks_training.local.processes.template import NotSingleThreaded, require_single_thread
from fireworks_training.local.processes.worker_entry import failure_reason
from fireworks_training.local.settings import TemplateSettings, dump
from tests.local.processes.support import eventually, get_json, running

STANDIN = "tests.local.processes.standin_worker:main"
FAILING = "tests.local.processes.standin_worker:failing"


@dataclass
class RunningTemplate:
    process: subprocess.Popen[bytes]
    runtime_dir: Path
    lifetime_write: int

    def ask(self, request: object) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.runtime_dir / "template.sock"))
            connection.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(connection.makefile().readline())

    def spawn(self, name: str = "w.sock", kind: str = "trainer") -> Any:
        settings = {"socket": str(self.runtime_dir / name)}
        return self.ask({"op": "spawn", "kind": kind, "settings": settings})

    def end_supervisor(self) -> None:
        """What the death of the supervisor looks like from below."""
        os.close(self.lifetime_write)
        self.lifetime_write = -1


@contextmanager
def running_template(
    start: Literal["fork", "exec"], preload: tuple[str, ...] = ()
) -> Iterator[RunningTemplate]:
    runtime_dir = lifetime.make_runtime_dir()
    read_end, write_end = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / "template.sock"))
        listener.listen(8)
        settings = TemplateSettings(
            socket_fd=listener.fileno(),
            lifetime_fd=read_end,
            runtime_dir=str(runtime_dir),
            worker_start=start,
            entry_points={"trainer": STANDIN, "engine": FAILING},
            preload=preload,
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "fireworks_training.local.processes.template"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(listener.fileno(), read_end),
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        os.close(read_end)
        assert process.stdin is not None
        process.stdin.write(dump(settings))
        process.stdin.close()
        template = RunningTemplate(process, runtime_dir, write_end)
        try:
            yield template
        finally:
            if template.lifetime_write >= 0:
                template.end_supervisor()
            process.wait(30)
            assert process.stderr is not None
            process.stderr.close()
    # Whoever ends last removes the folder; without a template that is this test.
    lifetime.remove_when_last(runtime_dir, None, 10.0)


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_a_worker_serves_and_ends_with_the_supervisor(start: Literal["fork", "exec"]) -> None:
    with running_template(start) as template:
        assert template.ask({"op": "ping"}) == {"ok": True}
        spawned = template.spawn()
        facts = get_json(str(template.runtime_dir / "w.sock"), "/api/v1/facts")
        assert facts["pid"] == spawned["pid"]
        assert facts["environment"]["OMP_NUM_THREADS"] == "1"
        # One process group, so that the supervisor can kill template and workers at once.
        assert facts["group"] == template.process.pid
        # A spawn may be repeated: the socket names the worker.
        assert template.spawn()["pid"] == spawned["pid"]
        template.end_supervisor()
        template.process.wait(30)
        assert not running(spawned["pid"])
        assert not template.runtime_dir.exists()


def test_a_forked_worker_holds_nothing_of_the_template() -> None:
    with running_template("fork") as template:
        template.spawn()
        path = template.runtime_dir / "w.sock"
        facts = get_json(str(path), "/api/v1/facts")
        sockets = [name for name in facts["files"] if name.startswith("socket:")]
        template_fds = Path(f"/proc/{template.process.pid}/fd")
        of_template = [str(fd.readlink()) for fd in template_fds.iterdir()]
        shared = set(sockets) & set(of_template)
        assert sockets
        assert not shared
        # Its lock is its own, so that the template's end does not free it.
        assert sum(name.endswith("/alive") for name in facts["files"]) == 1


def test_kill_is_for_its_own_children_only() -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with running_template("fork") as template:
        foreign = {"op": "kill", "pid": bystander.pid, "signal": signal.SIGKILL}
        assert template.ask(foreign) == {"ok": False}
        assert running(bystander.pid)
        child = template.spawn()["pid"]
        own = {"op": "kill", "pid": child, "signal": signal.SIGKILL}
        assert template.ask(own) == {"ok": True}
        eventually(lambda: template.ask(own) == {"ok": False}, "the child is reaped")
    assert bystander.stdin is not None
    bystander.stdin.close()
    bystander.wait()


def test_a_failing_worker_leaves_its_reason() -> None:
    with running_template("fork") as template:
        pid = template.spawn("e.sock", "engine")["pid"]
        eventually(lambda: not running(pid), "the worker ends")
        reason = failure_reason(template.runtime_dir / "e.sock")
        assert reason == "RuntimeError: the model file is damaged"


@pytest.mark.parametrize(
    "request_", [{"op": "dance"}, {}, {"op": "spawn", "kind": "cook", "settings": {}}, [1], "x"]
)
def test_a_bad_request_is_answered_with_an_error(request_: object) -> None:
    with running_template("exec") as template:
        assert "error" in template.ask(request_)
        assert template.ask({"op": "ping"}) == {"ok": True}


def test_it_refuses_to_fork_with_a_second_thread() -> None:
    require_single_thread(lambda: 1)
    with pytest.raises(NotSingleThreaded, match="2 threads"):
        require_single_thread(lambda: 2)


def test_a_preloaded_module_with_a_thread_is_refused_at_the_start() -> None:
    with running_template("fork", ("tests.local.processes.threaded_module",)) as template:
        assert template.process.wait(30) != 0
        assert template.process.stderr is not None
        assert b"a preloaded module started one" in template.process.stderr.read()


def test_workers_outlive_the_template() -> None:
    with running_template("fork") as template:
        pid = template.spawn()["pid"]
        path = str(template.runtime_dir / "w.sock")
        get_json(path, "/api/v1/healthz")
        process = lifetime.identify(pid)
        assert process is not None
        template.process.kill()
        template.process.wait()
        assert get_json(path, "/api/v1/healthz") == {"status": "ok"}
        # Nobody's child any more, and still ended safely: by number and start time.
        assert not lifetime.ProcessIdentity(pid, "0").send(signal.SIGKILL)
        assert running(pid)
        assert process.send(signal.SIGKILL)
        eventually(lambda: not process.alive(), "the worker ends")
        assert not process.send(signal.SIGKILL)
