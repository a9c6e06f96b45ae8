"""Identifies processes across runs, and finds out whether one still runs.

A process number alone identifies nothing: the system uses it again. Together with the time at which
the process started, the machine and the machine's boot it does. It knows `psutil` and `/proc`; who
asks, and why, it does not know.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from fireworks_training._core.ledger import Owner

if TYPE_CHECKING:
    import psutil

_PROC = Path("/proc")


@functools.lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """Find the machine's name, with the namespace of its process numbers, and its boot."""
    node, boot = platform.node(), ""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        node = f"{node} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        pass  # not Linux: the name has to do
    return node, boot


def _running(pid: int) -> psutil.Process | None:
    """Find the process of a number; None if there is none, or it is a zombie."""
    import psutil  # takes 5 ms, which a service that holds nothing need not spend

    try:
        process = psutil.Process(pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.Error, ValueError, OverflowError):  # one that is hidden is of another user
        return None
    return None if ended else process


def start_of(pid: int) -> str | None:
    """Find when a process started; None if it does not run.

    On Linux this counts clock ticks since the machine's boot, so that setting the clock does not
    change it; elsewhere it is Unix time in seconds.
    """
    import psutil

    boot, process = psutil.boot_time(), _running(pid)
    if process is None:
        return None
    created = process.create_time()
    if not psutil.LINUX:
        return str(round(created))
    if psutil.boot_time() != boot:  # the clock was corrected while these were read
        return start_of(pid)
    return str(round((created - boot) * os.sysconf("SC_CLK_TCK")))


@functools.lru_cache(maxsize=1)
def _owner(pid: int) -> Owner:
    return Owner(*_machine(), pid, start_of(pid) or "")


def this_process() -> Owner:
    """Identify the calling process, also after a fork."""
    return _owner(os.getpid())


def is_alive(owner: Owner) -> bool | None:
    """Whether a process still runs; None where this can't be known from here.

    That holds for a process of another machine, and for a start that an older version has written
    in words ("Tue Oct  7 ..."), where the number is in use.
    """
    machine, boot = _machine()
    if owner.machine != machine:
        return None
    started = start_of(owner.pid) if owner.boot == boot else None
    if started is None or started == owner.started:
        return started is not None
    return None if " " in owner.started else False


def has_run_since(pid: int, moment: float) -> bool:
    """Whether the process that had a number at some moment (Unix time) still runs.

    A process that started later has the number again.
    """
    process = _running(pid)
    return process is not None and process.create_time() <= moment
