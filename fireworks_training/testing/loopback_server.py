"""The HTTP server that the test servers are built on: loopback only, on a loop or in a thread.

Knows sockets and how to end them; what is answered is for the subclasses to say.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from aiohttp import web
from anyio.from_thread import start_blocking_portal


@dataclass(kw_only=True, eq=False)
class LoopbackServer:
    """A server on a free port of 127.0.0.1; a context manager that may be entered again.

    `async with` serves on the running loop. `with` serves on a loop of its own in a thread, for
    tests that block theirs or have none; the server's events belong to that loop then.

    Attributes:
        url: its base URL, once it was entered; empty before.
    """

    url: str = field(default="", init=False)
    _runner: web.AppRunner | None = field(default=None, init=False, repr=False)
    _thread: ExitStack | None = field(default=None, init=False, repr=False)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request; cancelled when its client goes away.

        Raises:
            NotImplementedError: a subclass forgot to override it.
        """
        raise NotImplementedError

    async def restart(self) -> None:
        """Cut all connections and serve again on the same port; what the server noted stays."""
        port = int(self.url.rpartition(":")[2])
        await self._stop()
        await self._start(port)

    async def _start(self, port: int) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self.handle)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.1, auto_decompress=False
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self._start(0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self))
            self._thread = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()
