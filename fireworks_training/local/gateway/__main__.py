"""`python -m fireworks_training.local.gateway`: the gateway process.

Started by the supervisor, which hands it the listening socket, the lifetime pipe and, on standard
input, its settings.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from aiohttp import web

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.gateway.app import (
    CONNECTION_OPTIONS,
    Parts,
    create_app,
    make_runner,
)
from fireworks_training.local.gateway.control_plane import hot_load
from fireworks_training.local.gateway.control_plane.workers import TemplateSpawner
from fireworks_training.local.gateway.inference import routes as inference
from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.web.connections import Connections, most_connections
from fireworks_training.local.processes import lifetime
from fireworks_training.local.processes.descriptors import descriptor_limit
from fireworks_training.local.processes.worker_entry import leave_reason
from fireworks_training.local.settings import GatewaySettings, parse, read_line


async def connect_engine(engine_socket: Path, name: str) -> EngineClient:
    """Return a connected client of an engine."""
    client = EngineClient(engine_socket, name)
    await client.connect()
    return client


def add_serving_routes(app: web.Application) -> None:
    """Register completions and hot load."""
    inference.add_routes(app)
    hot_load.add_routes(app)


def real_parts(settings: GatewaySettings) -> Parts:
    """Return the parts that make workers in the template process."""
    template = Path(settings.runtime_dir) / "template.sock"
    return Parts(TemplateSpawner(template), connect_engine, add_serving_routes)


async def serve(settings: GatewaySettings) -> bool:
    """Serve until SIGTERM or the end of the lifetime pipe; return whether it was the latter."""
    ending = asyncio.Event()
    orphaned = False
    loop = asyncio.get_running_loop()

    def supervisor_is_gone() -> None:
        nonlocal orphaned
        if not os.read(settings.lifetime_fd, 4096):
            orphaned = True
            loop.remove_reader(settings.lifetime_fd)
            ending.set()

    loop.add_reader(settings.lifetime_fd, supervisor_is_gone)
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    runner = make_runner(create_app(settings, real_parts(settings)))
    await runner.setup()
    listener = socket.socket(fileno=settings.socket_fd)
    assert runner.server is not None, "it was set up"
    connections = Connections(
        runner.server, most_connections(descriptor_limit()), **CONNECTION_OPTIONS
    )
    accepting = await connections.listen(listener)
    await ending.wait()
    accepting.close()
    await runner.cleanup()
    connections.close()
    return orphaned


def main() -> int:
    """Run the gateway; returns the exit code."""
    settings = parse(GatewaySettings, read_line(0))
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s gateway %(levelname)s %(message)s",
    )
    runtime_dir = Path(settings.runtime_dir)
    alive_fd = lifetime.hold_alive(runtime_dir)
    try:
        orphaned = asyncio.run(serve(settings))
    except (LocalPlatformError, OSError) as error:
        reason = error.message if isinstance(error, LocalPlatformError) else str(error)
        print(f"gateway: {reason}", file=sys.stderr, flush=True)
        # For the supervisor, whose own error is what a user sees.
        leave_reason(str(runtime_dir / "gateway"), reason)
        return 1
    if orphaned:
        # The supervisor removes the folder itself, unless it was killed.
        lifetime.remove_when_last(runtime_dir, alive_fd, 2 * lifetime.EXIT_GRACE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
