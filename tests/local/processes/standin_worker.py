"""A worker without torch: an aiohttp app on the worker's Unix socket that fails on request."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from aiohttp import web


def main(settings: dict[str, object]) -> None:
    """Serve health, alive, an echo and facts about the process."""
    asyncio.run(_serve(str(settings["socket"]), settings))


def failing(settings: dict[str, object]) -> None:
    """Fail before serving."""
    raise RuntimeError("the model file is damaged")


def start_thread() -> None:
    """What a module that starts a thread at import does to the template."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()


async def _serve(socket: str, settings: dict[str, object]) -> None:
    app = web.Application()
    app["settings"] = settings
    app.router.add_get("/api/v1/healthz", _health)
    app.router.add_get("/internal/alive", _alive)
    app.router.add_get("/api/v1/facts", _facts)
    app.router.add_post("/api/v1/hang", _hang)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, socket).start()
    await asyncio.Event().wait()


async def _health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _alive(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"\n")
    await asyncio.Event().wait()
    return response


async def _hang(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


async def _facts(_: web.Request) -> web.Response:
    return web.json_response(facts())


def facts() -> dict[str, object]:
    """What the process has open, and who it belongs to."""
    open_files = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            open_files.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    names = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    return {
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "files": open_files,
        "environment": {name: os.environ.get(name) for name in names},
    }
