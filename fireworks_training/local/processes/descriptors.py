"""The descriptor limit of the platform's processes: as high as the system lets this user have it.

Knows the limit alone. A process inherits it, so the supervisor raises it before it starts any.
"""

from __future__ import annotations

import resource

ENOUGH = 1 << 20
"""Asked for where the hard limit is "unlimited", which not every system grants."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one; return the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            return soft  # a system with a lower ceiling of its own: the limit stays as it was
    return descriptor_limit()


def descriptor_limit() -> int:
    """Return how many files this process may have open at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH if soft == resource.RLIM_INFINITY else soft
