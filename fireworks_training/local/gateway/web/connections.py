"""The gateway's connections: how many there may be, and how long one may be silent.

A connection that sends no request, or stops in the middle of one, is ended after `SILENT_S`; where
as many are open as there may be, the oldest one without a request makes room for a new one at once.
So whoever has no key can't keep out those who have one. What is no HTTP is answered without its
bytes, which may be a key.

Knows connections, not requests' contents; `watch_middleware` tells it which connection is at work.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from fireworks_training.local.gateway.web.problems import HttpProblem, render
from fireworks_training.local.gateway.web.seldom import SeldomLog

log = logging.getLogger(__name__)

SILENT_S = 25.0
LOOK_S = 5.0
"""With `SILENT_S`, a silent connection is gone within 30 s."""
MOST_CONNECTIONS = 16_384
SHARE = 0.75
"""Part of the descriptors that clients' connections may take; the rest is for workers and files."""
BACKLOG = 1024
ACCEPTS = 16
"""Connections that the event loop takes in one go: each that fails is reported by itself."""
NOT_HTTP = "what was sent is not an HTTP request that this server can read"


def most_connections(descriptors: int) -> int:
    """Return how many connections there may be at a limit of open files."""
    return max(8, min(MOST_CONNECTIONS, int(descriptors * SHARE)))


class Connection(web.RequestHandler):
    """Serves one connection, and notes what it does for `Connections`.

    Attributes:
        owner: told of its beginning and end.
        request: the request that is at work; None while it waits for one.
        heard: time of the last bytes, or of the end of the last request.
    """

    __slots__ = ("heard", "owner", "request")

    def __init__(self, owner: Connections, server: web.Server, **options: Any) -> None:
        super().__init__(server, **options)
        self.owner = owner
        self.request: web.BaseRequest | None = None
        self.heard = owner.now()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many."""
        super().connection_made(transport)
        self.owner.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End."""
        super().connection_lost(exc)
        self.owner.closed(self)

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client. Bytes of a head don't count: it has to come in time, whole."""
        if self.request is not None:
            self.heard = self.owner.now()
        super().data_received(data)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be read, without a byte of it in the answer or the log."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        self.owner.unreadable()
        response = render(HttpProblem(status, NOT_HTTP))
        response.force_close()
        return response

    def silent_since(self) -> float | None:
        """Return since when its client should have sent something; None if it need not."""
        if self.request is None:
            return self.heard
        # One that we don't read from is waiting for us.
        reading = isinstance(self.transport, asyncio.ReadTransport) and self.transport.is_reading()
        return self.heard if reading and not self.request.content.is_eof() else None


class Connections:
    """Makes the connections of a server, and ends those that are silent or too many.

    Args:
        server: the application's, which answers the requests.
        most: how many there may be.
        options: of `aiohttp.web.RequestHandler`.
    """

    def __init__(self, server: web.Server, most: int, **options: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._most = most
        self._options = options
        self._seldom = SeldomLog(log, self._loop.time)
        self._open: set[Connection] = set()
        # Both in the order in which they began to wait: those without any request go first.
        self._fresh: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._look = self._loop.call_later(LOOK_S, self._end_silent)

    def __len__(self) -> int:
        return len(self._open)

    def now(self) -> float:
        """Return the time, on the event loop's clock."""
        return self._loop.time()

    async def listen(self, listener: socket.socket) -> asyncio.Server:
        """Take connections of a bound socket; the answer's `close` ends that."""
        server = await self._loop.create_server(self._make, sock=listener, backlog=ACCEPTS)
        # The number above also bounds how many wait in the kernel; that one may be large.
        listener.listen(BACKLOG)
        self._loop.set_exception_handler(self._failed)
        return server

    def close(self) -> None:
        """Look no more."""
        self._look.cancel()

    def _make(self) -> Connection:
        return Connection(self, self._server, loop=self._loop, **self._options)

    # -- told by connections ---------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        """Note a new connection; end the oldest that waits where there are too many."""
        self._open.add(connection)
        self._fresh[connection] = None
        if len(self._open) <= self._most:
            return
        # Where every other one is at work, that is the new one.
        victim = next(
            iter(self._idle if next(iter(self._fresh)) is connection else self._fresh), None
        )
        self._abort(victim or connection)
        self._seldom.say(
            f"{self._most} connections are open, which is the most: those that wait longest are"
            " ended for new ones"
        )

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._fresh.pop(connection, None)
        self._idle.pop(connection, None)

    def began(self, connection: Connection, request: web.BaseRequest) -> None:
        """Note that a connection is at work."""
        self._fresh.pop(connection, None)
        self._idle.pop(connection, None)
        connection.request, connection.heard = request, self.now()

    def ended(self, connection: Connection) -> None:
        """Note that a connection waits for its next request."""
        connection.request, connection.heard = None, self.now()
        if connection in self._open:
            self._idle[connection] = None

    def unreadable(self) -> None:
        """Note that a client sent what is no HTTP."""
        self._seldom.say("a client sent what is no HTTP request; it was answered with an error")

    # -- bounds ----------------------------------------------------------------------------------

    def _abort(self, connection: Connection) -> None:
        self.closed(connection)
        if isinstance(connection.transport, asyncio.WriteTransport):
            connection.transport.abort()

    def _end_silent(self) -> None:
        self._look = self._loop.call_later(LOOK_S, self._end_silent)
        now = self.now()
        for connection in tuple(self._open):
            since = connection.silent_since()
            if since is not None and now - since > SILENT_S:
                self._abort(connection)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report what the event loop could not do; accepts that fail come by the thousand."""
        if "socket" in context and isinstance(context.get("exception"), OSError):
            self._seldom.say("a connection could not be accepted: too many files are open")
        else:
            loop.default_exception_handler(context)


@web.middleware
async def watch_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Tell `Connections` that a connection is at work; the outermost middleware."""
    connection = request.protocol
    if not isinstance(connection, Connection):
        return await handler(request)
    connection.owner.began(connection, request)
    try:
        return await handler(request)
    finally:
        connection.owner.ended(connection)
