"""Stores the ledger in a file: appends under a lock, reads it whole, compacts it when most is past.

The file has one line per entry and lies in the user's state folder, so that the resources of a
killed run can be found again. A line that a crash tore is skipped, and the next one starts on a
line of its own. When closed claims dominate, a file without them replaces this one, under its lock:
a process that has waited for the lock finds that its file is no longer the ledger, and opens the
new one. Everything here blocks on the disk: call it in a thread. It knows files and locks; the
entries are `_core.ledger`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from pathlib import Path

from fireworks_training._core.ledger import LedgerEntry, compact, decode, encode
from fireworks_training.config import state_dir
from fireworks_training.errors import LedgerUnavailable

_FRESH = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC

logger = logging.getLogger("fireworks_training.ledger")

NAME = "ledger.jsonl"

COMPACT_EVERY = 64 << 10
"""Bytes by which the file grows between two checks whether to compact it."""


SAY_AFTER = 5.0
"""Seconds after which a wait for the lock is logged."""

LOCK_PATIENCE = 25.0
"""Seconds for which the lock is waited for."""


class LedgerFile:
    """Reads and appends to the ledger of a user.

    Args:
        path: the file; default `ledger.jsonl` in the user's state folder.
        clock: gives seconds of a steady clock.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._path = path
        self._clock = clock
        self._sleep = sleep

    @cached_property
    def path(self) -> Path:
        """The file."""
        return state_dir() / NAME if self._path is None else self._path

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Append entries; they are on the disk when this returns.

        If this process dies meanwhile, a part of them may be there.

        Raises:
            LedgerUnavailable: it can't be written, or its lock was not to be had in time.
        """
        with self._typed("written"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._append(entries)

    def _append(self, entries: Sequence[LedgerEntry]) -> None:
        with self._locked(os.O_RDWR | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as file:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + b"".join(map(encode, entries))
            end = size + len(data)
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
            if size // COMPACT_EVERY != end // COMPACT_EVERY:
                self._compact(file)

    def read(self) -> list[LedgerEntry]:
        """Read all entries, in order; none where there is no file.

        Raises:
            LedgerUnavailable: it can't be read, or its lock was not to be had in time.
        """
        with self._typed("read"):
            try:
                with self._locked(os.O_RDONLY, fcntl.LOCK_SH) as file:
                    data = _whole(file)
            except FileNotFoundError:
                return []
        entries = list[LedgerEntry]()
        for number, line in enumerate(data.splitlines(), 1):
            entry = decode(line)
            if entry is not None:
                entries.append(entry)
            elif line.strip():
                logger.warning("%s:%d can't be read; it is skipped", self.path, number)
        return entries

    def _compact(self, file: int) -> None:
        """Replace the file, which is locked, if more than half of its lines are past."""
        lines = [line for line in _whole(file).splitlines() if line.strip()]
        kept = compact(lines)
        if 2 * len(kept) > len(lines):
            return
        fresh = self.path.with_suffix(".new")
        try:
            with os.fdopen(os.open(fresh, _FRESH, 0o600), "wb") as new:
                new.writelines(line + b"\n" for line in kept)
                new.flush()
                os.fsync(new.fileno())
            fresh.replace(self.path)
        except OSError as error:
            # The old file has all entries.
            logger.warning("the ledger %s could not be compacted: %s", self.path, error)

    @contextlib.contextmanager
    def _locked(self, flags: int, lock: int) -> Generator[int]:
        while True:
            file = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
            try:
                self._lock(file, lock)
                if self._is_ledger(file):
                    yield file
                    return
            finally:
                os.close(file)  # releases the lock

    def _lock(self, file: int, lock: int) -> None:
        """Take the lock of an open file; say when that takes long, and end.

        Raises:
            TimeoutError: another process keeps it.
        """
        began, said, pause = self._clock(), False, 0.005
        while True:
            try:
                fcntl.flock(file, lock | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                waited = self._clock() - began
            if waited >= LOCK_PATIENCE:
                raise TimeoutError(f"another process has kept its lock for {waited:.0f} s")
            if waited >= SAY_AFTER and not said:
                said = True
                logger.warning(
                    "the ledger %s is locked by another process; this waits up to %.0f s",
                    self.path,
                    LOCK_PATIENCE,
                )
            self._sleep(pause)
            pause = min(2 * pause, 0.25)

    @contextlib.contextmanager
    def _typed(self, done: str) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise LedgerUnavailable(
                f"the ledger {self.path} can't be {done}: {error}. It must be a file of yours, "
                "which no other process keeps locked (`lsof` names who does)",
                cause=error,
            ) from error

    def _is_ledger(self, file: int) -> bool:
        """Whether an open file is still the one under the ledger's name."""
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(os.fstat(file), named)


def _whole(file: int) -> bytes:
    size, data = os.fstat(file).st_size, bytearray()
    while len(data) < size and (part := os.pread(file, size - len(data), len(data))):
        data += part
    return bytes(data)
