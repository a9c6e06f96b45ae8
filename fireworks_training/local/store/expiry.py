"""When a checkpoint's time is over: a file beside it, so that states and snapshots share one way.

Knows a folder and a time; not what is in the folder, or who removes it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

FILE = "expires_at"
"""Holds the end of a checkpoint's time, in seconds since the epoch, as text."""


def set_expiry(folder: Path, ttl_seconds: int | None) -> None:
    """Give a checkpoint so many seconds from now; None keeps it until somebody removes it."""
    if ttl_seconds is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    draft = folder / f"{FILE}.new"
    draft.write_text(f"{time.time() + ttl_seconds:.3f}")
    os.replace(draft, folder / FILE)  # noqa: PTH105 - the name says what happens


def expiry_of(folder: Path) -> float | None:
    """Read the end of a checkpoint's time; None for one that has none, or none that can be read."""
    try:
        return float((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
