"""The ledger's file: appended to under a lock, read whole, never rewritten.

One line an entry (`_core.ledger`), in the user's state folder, so that what a killed run has made
can be found again. A line that a crash tore is skipped, and the next one starts on a line of its
own. Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Generator, Sequence
from pathlib import Path

from fireworks_training._core.ledger import Entry, decode, encode
from fireworks_training.config import state_dir

logger = logging.getLogger("fireworks_training.ledger")

NAME = "ledger.jsonl"


class LedgerFile:
    """The ledger of a user.

    Args:
        path: the file; default `ledger.jsonl` in the user's state folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else state_dir() / NAME

    def append(self, entries: Sequence[Entry]) -> None:
        """Write entries, all or (if this process dies) a part; on the disk when it returns.

        Raises:
            OSError: the folder can't be written.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(os.O_RDWR | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as file:
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            data = (b"\n" if torn else b"") + b"".join(map(encode, entries))
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)

    def read(self) -> list[Entry]:
        """All entries, in order; none where there is no file."""
        try:
            with self._locked(os.O_RDONLY, fcntl.LOCK_SH) as file:
                size = os.fstat(file).st_size
                data = bytearray()
                while len(data) < size and (part := os.pread(file, size - len(data), len(data))):
                    data += part
        except FileNotFoundError:
            return []
        entries = list[Entry]()
        for number, line in enumerate(bytes(data).splitlines(), 1):
            entry = decode(line)
            if entry is not None:
                entries.append(entry)
            elif line.strip():
                logger.warning("%s:%d can't be read; it is skipped", self.path, number)
        return entries

    @contextlib.contextmanager
    def _locked(self, flags: int, lock: int) -> Generator[int]:
        file = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, lock)
            yield file
        finally:
            os.close(file)  # gives the lock back
