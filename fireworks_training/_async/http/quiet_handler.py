"""aiohttp's connection pool and connections, without a call for each chunk that is read.

It knows which calls of aiohttp's flow control have no effect, and nothing of what is sent.
"""

from __future__ import annotations

import ssl
from functools import partial
from typing import cast

import aiohttp
from aiohttp.client_proto import ResponseHandler

from fireworks_training._async.http.resolver import Resolver


class QuietResponseHandler(ResponseHandler):
    """Resumes reading from its connection only if that was paused.

    aiohttp 3.14 resumes its connection for each HTTP chunk that a reader takes, and runs the
    parser over no bytes to do so; a server of tokens sends a chunk for each few of them. Where
    nothing was paused there is nothing to resume.
    """

    paused = False

    def pause_reading(self) -> None:
        """Stop reading from the connection: the reader is behind."""
        self.paused = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Go on reading from the connection, if that was stopped."""
        if self.paused:
            self.paused = False  # before the parser goes on, which may stop it again
            super().resume_reading(resume_parser)


class Connector(aiohttp.TCPConnector):
    """Pools connections with `QuietResponseHandler`, without a limit of its own.

    Args:
        verify: how certificates are checked; False accepts any.
    """

    def __init__(self, verify: ssl.SSLContext | bool = True) -> None:
        super().__init__(limit=0, limit_per_host=0, ssl=verify, resolver=Resolver())  # pyright: ignore[reportUnknownMemberType]
        # aiohttp has no argument for it. A version that makes them elsewhere loses the saving only.
        self._factory = cast(
            "partial[ResponseHandler]", partial(QuietResponseHandler, loop=self._loop)
        )
