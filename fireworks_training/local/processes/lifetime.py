"""Life and death of the platform's processes: lifetime pipe, runtime folder, process identities.

The supervisor alone holds the write end of the lifetime pipe, so its death by any cause is an EOF
in every other process. Each of those also holds a shared lock on `<runtime>/alive`; whoever gets
the exclusive lock is the last one and removes the folder.

Knows pipes, file locks, signals and process numbers. Does not know what the processes do.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

RUNTIME_PREFIX = "fwt-"
ALIVE_FILE = "alive"
# A path of a Unix socket over 103 (macOS) or 107 (Linux) bytes can't be bound.
MAX_RUNTIME_PATH = 80
# Younger folders may belong to a platform that has not taken its lock yet.
STALE_AFTER_S = 60.0
EXIT_GRACE_S = 2.0


# -- the runtime folder --------------------------------------------------------------------------


def make_runtime_dir() -> Path:
    """Make a new runtime folder with a short path, which only this user can read."""
    folder = Path(tempfile.mkdtemp(prefix=RUNTIME_PREFIX, dir=_base()))
    (folder / ALIVE_FILE).touch(mode=0o600)
    return folder


def _base() -> Path:
    """Return the folder of runtime folders: the system's temporary one, if its path is short."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > MAX_RUNTIME_PATH - 20:
        base = "/tmp"  # noqa: S108 - mkdtemp makes a folder that nobody else can enter
    return Path(base)


def hold_alive(runtime_dir: Path) -> int:
    """Take the shared lock of this process; the descriptor holds it until the process ends."""
    fd = os.open(runtime_dir / ALIVE_FILE, os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def remove_when_last(runtime_dir: Path, alive_fd: int | None, timeout_s: float) -> bool:
    """Give up the shared lock, and remove the folder once no other process holds it.

    Several processes may try at once: the kernel lets one in after the other, and a folder that is
    gone already is no error. Returns False when the others did not end in time.
    """
    if alive_fd is not None:
        os.close(alive_fd)
    try:
        fd = os.open(runtime_dir / ALIVE_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    deadline = time.monotonic() + timeout_s
    try:
        while not _try_exclusive(fd):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        shutil.rmtree(runtime_dir, ignore_errors=True)
    finally:
        os.close(fd)
    return True


def remove_stale_runtime_dirs() -> list[Path]:
    """Remove the folders that a crash of a whole platform left behind; returns them."""
    removed: list[Path] = []
    for folder in _base().glob(f"{RUNTIME_PREFIX}*"):
        try:
            status = folder.lstat()
            mine = status.st_uid == os.getuid() and (folder / ALIVE_FILE).is_file()
            old = time.time() - status.st_mtime > STALE_AFTER_S
            if mine and old and not folder.is_symlink() and remove_when_last(folder, None, 0.0):
                removed.append(folder)
        except OSError:
            continue  # another platform is removing it at the same moment
    return removed


def lock_exclusively(path: Path) -> int | None:
    """Take a lock file for this process; None when another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _try_exclusive(fd):
        return fd
    os.close(fd)
    return None


def _try_exclusive(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# -- the lifetime pipe ---------------------------------------------------------------------------


def end_with_pipe(lifetime_fd: int, grace_s: float = EXIT_GRACE_S) -> None:
    """End this process when the supervisor is gone: SIGTERM first, `os._exit` after the grace.

    The watcher is a thread, so it also ends a process whose main thread is deep in a computation.
    """

    def watch() -> None:
        while os.read(lifetime_fd, 1):
            continue
        # To the process, not by raise(): the main thread has to run the handler.
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="lifetime", daemon=True).start()


# -- processes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Names a process so that a later one with the same number is not taken for it.

    Attributes:
        pid: process id.
        started: start time in the system's own notation, from `started_at`.
    """

    pid: int
    started: str

    def alive(self) -> bool:
        """Tell whether this very process still runs; one that is dead but not reaped does not."""
        return started_at(self.pid) == self.started

    def send(self, signum: int) -> bool:
        """Send a signal to this very process; False when it is gone."""
        if sys.platform == "linux":
            return self._send_by_handle(signum)
        else:
            try:
                if not self.alive():
                    return False
                os.kill(self.pid, signum)
            except ProcessLookupError:
                return False
            return True

    if sys.platform == "linux":

        def _send_by_handle(self, signum: int) -> bool:
            """Send by a handle taken before the check: the number can't change hands in between."""
            try:
                handle = os.pidfd_open(self.pid)
            except ProcessLookupError:
                return False
            try:
                if not self.alive():
                    return False
                signal.pidfd_send_signal(handle, signum)
            except ProcessLookupError:
                return False
            finally:
                os.close(handle)
            return True


def started_at(pid: int) -> str | None:
    """Return when a process started, in the system's notation; None when it is gone or dead."""
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The second field is the name in brackets, which may hold anything, brackets too.
        state, *rest = stat.rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    else:
        answer = subprocess.run(  # noqa: S603 - a fixed program and a number
            ["/bin/ps", "-o", "state=,lstart=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        state, _, started = answer.stdout.strip().partition(" ")
        return None if answer.returncode != 0 or state.startswith("Z") else started.strip()


def identify(pid: int) -> ProcessIdentity | None:
    """Return the identity of a running process; None when it is gone."""
    started = started_at(pid)
    return None if started is None else ProcessIdentity(pid, started)
