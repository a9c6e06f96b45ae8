"""The state folder of a platform: made, or taken up where it is a platform's, and locked.

Knows which names a platform puts into its folder. Does not know what is in the files. A folder that
was there before keeps its mode, and one with other things in it is refused and left as it was: a
path that was mistyped may be anybody's.
"""

from __future__ import annotations

from pathlib import Path

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes import lifetime

STATE_LOCK = "lock"
DATABASE = "state.db"
OWN_NAMES = frozenset(
    {STATE_LOCK, "platform.log", "reserve", "snapshots", "jobs", "models", "tinker", "lost+found"}
)
"""What a platform makes, beside its database; a new file system brings the last one."""


def open_state_folder(folder: Path) -> int:
    """Make the folder if it is missing, and lock it; return the descriptor that holds the lock.

    Raises:
        LocalPlatformError: it can't be used, holds what no platform has put there, or another
            platform has it.
    """
    try:
        if _is_foreign(folder):
            raise LocalPlatformError(
                f"the state folder {folder} holds other things than a platform's state, and was"
                " left as it is; choose an empty or a new folder, or one that a platform made"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = lifetime.lock_exclusively(folder / STATE_LOCK)
    except OSError as error:
        raise LocalPlatformError(f"the state folder {folder} can't be used: {error}") from error
    if lock is None:
        raise LocalPlatformError(
            f"the state folder {folder} is in use by another platform; stop that one,"
            " or choose another folder"
        )
    return lock


def _is_foreign(folder: Path) -> bool:
    """Return whether a folder has entries, none of which shows that a platform made it."""
    if not folder.is_dir():
        return False  # what is there instead is refused by mkdir
    names = {entry.name for entry in folder.iterdir()}
    if DATABASE in names and STATE_LOCK in names:
        return False
    return any(name not in OWN_NAMES and not name.startswith(DATABASE) for name in names)
