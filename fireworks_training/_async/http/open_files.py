"""Raises the limit of open files, which a thousand streams reach.

Systems start programs with a soft limit (often 1,024, on macOS 256) far below the hard one, for
programs that use select(). asyncio does not.
"""

from __future__ import annotations

import errno
import logging
import resource

logger = logging.getLogger("fireworks_training.transport")

ENOUGH = 65_536
"""The soft limit is raised to this, or as far as the hard limit lets it."""


def exhausted(error: BaseException | None) -> bool:
    """Return whether an error means that this process, or the system, has no descriptor left."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def limit() -> int:
    """Return how many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> bool:
    """Raise the soft limit; False if it is as high as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if wanted <= soft:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):
        return False
    logger.warning(
        "the limit of open files was raised from %d to %d for this process", soft, wanted
    )
    return True


def advice() -> str:
    """Return advice for when the limit can't be raised."""
    return (
        f"this process has reached its limit of {limit()} open files; raise it (`ulimit -n`), or "
        "lower the concurrency"
    )
