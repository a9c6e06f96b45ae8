"""The frame around every worker's work, forked or started anew: signals, lifetime, failure reason.

Knows signals, descriptors and the lifetime pipe. Does not know the work: that is an entry point,
which takes the worker's settings and returns when the worker should end. A worker that fails leaves
the reason in `<socket>.failed` for the gateway, and its traceback in the log.

As a program (`python -m fireworks_training.local.processes.worker_entry`) it reads one JSON line on
stdin: `{"kind", "entry_point", "lifetime_fd", "runtime_dir", "settings"}`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes import lifetime
from fireworks_training.local.settings import ENTRY_POINTS, read_line

WorkerMain = Callable[[dict[str, object]], None]

FAILED_SUFFIX = ".failed"
MAX_REASON_CHARS = 2000


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """Describes one worker to run.

    Attributes:
        kind: "trainer" or "engine".
        entry_point: `module:function` that does the work.
        lifetime_fd: read end of the lifetime pipe.
        runtime_dir: folder of the sockets.
        settings: argument of the entry point; holds at least "socket".
    """

    kind: str
    entry_point: str
    lifetime_fd: int
    runtime_dir: str
    settings: dict[str, object]

    @property
    def socket(self) -> str:
        """Path of the Unix socket that the worker serves."""
        return str(self.settings["socket"])


def load_entry_point(name: str) -> WorkerMain:
    """Import the function behind `module:function`."""
    module, _, function = name.partition(":")
    return cast(WorkerMain, getattr(importlib.import_module(module), function))


def run(order: WorkerOrder) -> int:
    """Run one worker to its end; returns the exit code of its process."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    _name_process(f"fwt-{order.kind}")
    lifetime.hold_alive(Path(order.runtime_dir))
    lifetime.end_with_pipe(order.lifetime_fd)
    try:
        load_entry_point(order.entry_point)(order.settings)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        leave_reason(order.socket, f"{type(error).__name__}: {error}")
        return 1
    return 0


def failure_reason(socket: Path) -> str | None:
    """Read why the worker of a socket failed, in one line; None when it left no reason."""
    try:
        return Path(f"{socket}{FAILED_SUFFIX}").read_text(errors="replace")
    except FileNotFoundError:
        return None


def leave_reason(socket: str, reason: str) -> None:
    """Write why the worker of a socket fails, for `failure_reason`."""
    line = " ".join(reason.split())[:MAX_REASON_CHARS]
    try:
        Path(f"{socket}{FAILED_SUFFIX}").write_text(line)
    except OSError:
        traceback.print_exc()  # the runtime folder is gone: the log is the place that is left


def _name_process(name: str) -> None:
    """Set the name that `ps` and `top` show; only Linux lets a process change it."""
    comm = Path("/proc/self/comm")
    if sys.platform == "linux" and comm.exists():
        comm.write_text(name[:15])


def parse_order(line: bytes) -> WorkerOrder:
    """Read a worker order from one JSON line.

    Raises:
        LocalPlatformError: a field is missing or of a wrong type.
    """
    try:
        raw = cast(dict[str, object], json.loads(line))
        order = WorkerOrder(
            kind=str(raw["kind"]),
            entry_point=str(raw["entry_point"]),
            lifetime_fd=int(cast(int, raw["lifetime_fd"])),
            runtime_dir=str(raw["runtime_dir"]),
            settings=cast(dict[str, object], raw["settings"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise LocalPlatformError(f"worker: the order is not whole ({error!r})") from error
    if order.kind not in ENTRY_POINTS or "socket" not in order.settings:
        raise LocalPlatformError("worker: the order names no known kind, or no socket")
    return order


def main() -> None:
    """Run the worker that stdin describes."""
    code = run(parse_order(read_line(0)))
    # The entry point has closed what it owns; leftover threads of libraries must not hold the exit.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
