"""Entry point of a trainer worker process: serves the job's HTTP application on a Unix socket.

Knows the socket, signals and the end of the process. Does not know routes, which are in `app`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading

from aiohttp import web

from fireworks_training.local.trainer.app import STOP, create_app
from fireworks_training.local.trainer.settings import TrainerSettings

SHUTDOWN_S = 0.5


def main(settings: dict[str, object]) -> None:
    """Serves one trainer job until SIGTERM or SIGINT.

    Args:
        settings: fields of `TrainerSettings`; unknown keys are refused.
    """
    asyncio.run(serve(TrainerSettings.model_validate(settings)))
    if any(thread.name in ("torch", "export") for thread in threading.enumerate()):
        # An operation is still being computed. The interpreter can't end under native code that
        # may return to it; nothing on disk depends on the operation.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


async def serve(settings: TrainerSettings) -> None:
    """Serves until a signal or a fault ends the process, and removes the socket file."""
    app = create_app(settings)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S, auto_decompress=False)
    await runner.setup()
    try:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, app[STOP].set)
        await web.UnixSite(runner, str(settings.socket)).start()
        await app[STOP].wait()
    finally:
        await runner.cleanup()
        settings.socket.unlink(missing_ok=True)
