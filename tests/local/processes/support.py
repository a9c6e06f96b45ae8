"""Helpers of the tests of real processes: waiting for them, and requests over a Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WITHIN_S = 30.0


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until a condition holds; processes give no event to wait for."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {WITHIN_S} s"
        time.sleep(0.005)


def running(pid: int) -> bool:
    """Whether a process runs; a dead one that nobody has reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter: gone between open and read
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def descendants(pid: int) -> set[int]:
    """The processes below one, from the kernel's table."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {p for p, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("worker", timeout=WITHIN_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def get_json(socket_path: str, path: str) -> Any:
    """GET over a worker's Unix socket, once it serves."""
    eventually(lambda: Path(socket_path).exists(), f"{socket_path} is served")
    connection = UnixConnection(socket_path)

    def answers() -> bool:
        try:
            connection.request("GET", path)
        except ConnectionRefusedError:
            connection.close()
            return False
        return True

    eventually(answers, f"{socket_path} takes connections")
    body = json.loads(connection.getresponse().read())
    connection.close()
    return body
