"""The template process: imports torch and the workers' modules once, and forks workers on request.

Knows modules, children and one Unix socket that the supervisor made. Does not know jobs,
deployments or HTTP. It runs a single thread and no event loop, since a fork copies only the thread
that calls it: a lock that another thread held would stay locked in the child for ever.

Requests are one JSON line on a connection of their own, answers one JSON line:
`{"op": "ping"}` -> `{"ok": true}`; `{"op": "spawn", "kind", "settings"}` -> `{"pid", "started"}`;
`{"op": "kill", "pid", "signal"}` -> `{"ok": bool}`, for its own children only. A spawn for a socket
whose worker still runs answers with that worker, so that it may be repeated. A failure answers
`{"error"}`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn, cast

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes import lifetime
from fireworks_training.local.processes.worker_entry import (
    FAILED_SUFFIX,
    WorkerOrder,
    leave_reason,
    run,
)
from fireworks_training.local.settings import TemplateSettings, parse, read_line

MAX_REQUEST_BYTES = 1 << 20
REQUEST_TIMEOUT_S = 5.0
CHILDREN_GRACE_S = lifetime.EXIT_GRACE_S + 0.5


class NotSingleThreaded(LocalPlatformError):
    """Raised where a fork would copy locks that another thread may hold."""


def thread_count() -> int:
    """Count the threads of this process, those of C libraries too."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def require_single_thread(count: Callable[[], int] = thread_count) -> None:
    """Refuse to fork when a library has started a thread.

    Raises:
        NotSingleThreaded: there is more than one.
    """
    if (threads := count()) != 1:
        raise NotSingleThreaded(
            f"the template has {threads} threads and can't fork a worker safely: a preloaded module"
            " started one; take it out of `preload`, or set worker_start to 'exec'"
        )


@dataclass(slots=True)
class Template:
    """Makes, signals and reaps the workers of one platform: the children of this process.

    Attributes:
        settings: as the supervisor wrote them.
        listener: the Unix socket that requests arrive on.
        alive_fd: the shared lock of this process.
        children: kind and socket of each living child, by pid.
    """

    settings: TemplateSettings
    listener: socket.socket
    alive_fd: int
    children: dict[int, tuple[str, str]] = field(default_factory=dict[int, tuple[str, str]])

    # -- requests --------------------------------------------------------------------------------

    def answer(self, line: bytes) -> dict[str, object]:
        """Carry out one request, and return its answer."""
        try:
            request = cast(dict[str, object], json.loads(line))
            match request["op"]:
                case "ping":
                    return {"ok": True}
                case "spawn":
                    settings = cast(dict[str, object], request["settings"])
                    return self.spawn(str(request["kind"]), settings)
                case "kill":
                    pid, signum = cast(int, request["pid"]), cast(int, request["signal"])
                    return {"ok": self.kill(int(pid), int(signum))}
                case other:
                    return {"error": f"unknown op {other!r}"}
        except (ValueError, KeyError, TypeError, OSError, LocalPlatformError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    def spawn(self, kind: str, settings: dict[str, object]) -> dict[str, object]:
        """Start a worker, or find the one that serves this socket already."""
        order = WorkerOrder(
            kind=kind,
            entry_point=self.settings.entry_points[kind],
            lifetime_fd=self.settings.lifetime_fd,
            runtime_dir=self.settings.runtime_dir,
            settings=settings,
        )
        self.reap()
        pids = [pid for pid, (_, path) in self.children.items() if path == order.socket]
        if pids:
            pid = pids[0]
        else:
            Path(f"{order.socket}{FAILED_SUFFIX}").unlink(missing_ok=True)
            pid = self._fork(order) if self.settings.worker_start == "fork" else _start(order)
            self.children[pid] = (kind, order.socket)
            _log(f"{kind} worker {pid} started on {Path(order.socket).name}")
        # A child that died within the call is a zombie until it is reaped: still safe to name.
        return {"pid": pid, "started": lifetime.started_at(pid) or "gone"}

    def kill(self, pid: int, signum: int) -> bool:
        """Signal a child, never another process: a child's pid is ours until we reap it."""
        self.reap()
        if pid not in self.children:
            return False
        os.kill(pid, signum)
        return True

    def reap(self) -> None:
        """Collect the children that have ended."""
        for pid in list(self.children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                kind, path = self.children.pop(pid)
                code = os.waitstatus_to_exitcode(status)
                _log(f"{kind} worker {pid} on {Path(path).name} ended with {_exit_text(code)}")

    def end_children(self, grace_s: float) -> None:
        """End every child: SIGTERM, and SIGKILL for those that take longer than the grace."""
        for pid in self.children:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while self.children and time.monotonic() < deadline:
            self.reap()
            time.sleep(0.01)
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            os.waitpid(pid, 0)
        self.children.clear()

    def _fork(self, order: WorkerOrder) -> int:
        require_single_thread()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            # The lifetime pipe and the log stay; sockets, locks and pollers are the template's.
            _close_descriptors_but({0, 1, 2, order.lifetime_fd})
            signal.set_wakeup_fd(-1)
            code = run(order)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _start(order: WorkerOrder) -> int:
    """Start a worker as a new process in this process group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fireworks_training.local.processes.worker_entry"],
        stdin=subprocess.PIPE,
        pass_fds=(order.lifetime_fd,),
    )
    line = json.dumps(asdict(order)).encode() + b"\n"
    assert process.stdin is not None
    try:
        process.stdin.write(line)
        process.stdin.close()
    except BrokenPipeError:
        _log(f"worker {process.pid} ended before it read its order")
    process.returncode = 0  # reaped by `Template.reap`, not by the Popen object
    return process.pid


def _close_descriptors_but(kept: set[int]) -> None:
    """Close the descriptors that a fork copied: a lock or a connection would outlive its owner."""
    directory = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    for fd in [int(name) for name in os.listdir(directory)]:  # noqa: PTH208 - numbers, not paths
        if fd not in kept:
            try:
                os.close(fd)
            except OSError:
                continue  # the listing's own descriptor, closed when the listing ended


def _exit_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def _log(text: str) -> None:
    print(f"template: {text}", file=sys.stderr, flush=True)


def preload(settings: TemplateSettings) -> None:
    """Import the modules of all workers once, so that their memory is shared."""
    if settings.worker_start != "fork":
        return
    entry_modules = [name.partition(":")[0] for name in settings.entry_points.values()]
    for module in [*settings.preload, *entry_modules]:
        importlib.import_module(module)
    require_single_thread()
    gc.collect()
    # Frozen objects are not visited by later collections, so their pages stay shared.
    gc.freeze()


def serve(template: Template) -> None:
    """Answer requests until the lifetime pipe ends."""
    # SIGTERM ended it at once while it imported; now that it may have children, the pipe decides.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    template.listener.setblocking(False)
    # A handler has to exist for the wake-up byte to be written; the loop does the reaping.
    signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    with selectors.DefaultSelector() as selector:
        selector.register(template.settings.lifetime_fd, selectors.EVENT_READ, "lifetime")
        selector.register(wake_read, selectors.EVENT_READ, "signal")
        selector.register(template.listener, selectors.EVENT_READ, "request")
        while True:
            for key, _ in selector.select():
                if key.data == "request":
                    _serve_one(template)
                elif key.data == "signal":
                    os.read(wake_read, 4096)
                    template.reap()
                elif not os.read(template.settings.lifetime_fd, 1):
                    return


def _serve_one(template: Template) -> None:
    """Answer one request at a time: only the supervisor and the gateway send any."""
    try:
        connection, _ = template.listener.accept()
    except BlockingIOError:
        return  # a template that is about to die took it
    with connection:
        connection.settimeout(REQUEST_TIMEOUT_S)
        try:
            line = _read_request(connection)
            if line:
                connection.sendall(json.dumps(template.answer(line)).encode() + b"\n")
        except OSError as error:
            _log(f"a caller went away: {error}")


def _read_request(connection: socket.socket) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        chunk = connection.recv(65536)
        if not chunk:
            return b""
        line += chunk
        if len(line) > MAX_REQUEST_BYTES:
            raise OSError(f"a request over {MAX_REQUEST_BYTES} bytes")
    return bytes(line)


def main() -> NoReturn:
    """Read the settings on stdin, import, serve, and leave nothing behind."""
    settings = parse(TemplateSettings, read_line(0))
    runtime_dir = Path(settings.runtime_dir)
    alive_fd = lifetime.hold_alive(runtime_dir)
    try:
        preload(settings)
    except ImportError as error:
        reason = (
            f"{error}; the embedded platform needs the 'local' extra:"
            " pip install 'fireworks-training[local]'"
        )
        _log(reason)
        leave_reason(str(runtime_dir / "template"), reason)
        os._exit(3)
    template = Template(settings, socket.socket(fileno=settings.socket_fd), alive_fd)
    serve(template)
    template.end_children(CHILDREN_GRACE_S)
    lifetime.remove_when_last(runtime_dir, alive_fd, CHILDREN_GRACE_S)
    os._exit(0)


if __name__ == "__main__":
    main()
