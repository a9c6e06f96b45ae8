"""Which process this is, and whether another one still runs.

A process number alone is no identity: it is used again. With the time of its start, the machine and
the machine's boot it is one.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

from fireworks_training._core.ledger import Owner

_PROC = Path("/proc")


@functools.lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """This machine's name with the namespace of its process numbers, and its boot."""
    node, boot = platform.node(), ""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        node = f"{node} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        pass  # not Linux: the name has to do
    return node, boot


def start_of(pid: int) -> str | None:
    """When a process started, as the system writes it; None if there is none (or it has ended)."""
    if (_PROC / "self/stat").exists():
        try:
            stat = (_PROC / str(pid) / "stat").read_text()
        except OSError:
            return None
        # The name in parentheses may hold anything; the fields begin after its end.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    shown = subprocess.run(  # noqa: S603 - a number and fixed words
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    state, _, started = shown.partition(" ")
    return started.strip() or None if state and "Z" not in state else None


def this_process() -> Owner:
    """The process that calls."""
    machine, boot = _machine()
    return Owner(machine, boot, os.getpid(), start_of(os.getpid()) or "")


def is_alive(owner: Owner) -> bool | None:
    """Whether a process still runs; None for one of another machine."""
    machine, boot = _machine()
    if owner.machine != machine:
        return None
    return owner.boot == boot and start_of(owner.pid) == owner.started
