"""Whether the platform offers what only it has, beyond the interface that clouds share.

Knows one switch, set when the application is made. What each part leaves out without it is decided
in that part, or in `gateway.cloud`.
"""

from __future__ import annotations

from aiohttp import web

EXTENSIONS: web.AppKey[bool] = web.AppKey("extensions", bool)
"""False where the platform stands in for a cloud (`serve --as-cloud`)."""


def are_offered(app: web.Application) -> bool:
    """Return whether the platform offers its extensions; True unless it was started otherwise."""
    return app.get(EXTENSIONS, True)
