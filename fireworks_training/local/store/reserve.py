"""Room that is kept for a full disk: a file that is given up so that what frees room can be noted.

A platform whose disk is full must still be able to delete, to note that a worker has ended, and to
start again. Its database needs some room for each of these; this file is that room. Knows a file of
a fixed size. Does not know what is written in its place.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fireworks_training.errors import LocalPlatformError

FILE = "reserve"
BYTES = 1 << 20
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DiskFull(LocalPlatformError):
    """Raised where there is no room on the disk for something new."""

    def __init__(self) -> None:
        super().__init__(
            "the disk of the state folder is full: nothing new can be kept there. Delete"
            " checkpoints, jobs or deployments, or make room on the disk, and try again"
        )


def is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that the disk is full."""
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


class Reserve:
    """Keeps the file of one folder, and gives it up when there is no other room."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE

    def held(self) -> bool:
        """Return whether the room is kept."""
        try:
            return self._path.stat().st_size >= BYTES
        except OSError:
            return False

    def fill(self) -> bool:
        """Keep the room, if it is not kept yet; return whether it is.

        What is written does not compress, so that a file system that does keeps it all.
        """
        if self.held():
            return True
        draft = self._path.with_suffix(".new")
        try:
            draft.write_bytes(os.urandom(BYTES))
            draft.replace(self._path)
        except OSError:
            draft.unlink(missing_ok=True)
            return False
        return True

    def give_up(self) -> bool:
        """Free the room; return whether there was any."""
        held = self.held()
        self._path.unlink(missing_ok=True)
        return held
