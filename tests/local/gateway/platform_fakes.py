"""A gateway in this process: real routes, database and Unix sockets; pretended workers.

A pretended trainer is an aiohttp app on the worker's socket; to die, it drops its connections as a
killed process does. A pretended engine remembers what it was asked to load.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
from aiohttp import web

from fireworks_training.local.gateway.app import Parts, create_app, make_runner
from fireworks_training.local.gateway.control_plane.deployments import Deployments
from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.control_plane.workers import WorkerFailed
from fireworks_training.local.gateway.inference.engine_client import EngineClient, LoadEnded
from fireworks_training.local.gateway.inference.registry import ServingRegistry
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.model.promotion import Order
from fireworks_training.local.processes import lifetime
from fireworks_training.local.settings import GatewaySettings

KEY = "tml-test-key"
MODEL = "accounts/local/models/tiny"
HTTP = "/v1/accounts/local"


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Let the loop run until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - conditions of any kind, some of them outside
            await asyncio.sleep(0.001)
    assert condition(), what


@dataclass(eq=False)
class FakeProcess:
    """A worker process that is a server in this loop."""

    pid: int
    kind: str
    settings: dict[str, Any]
    started: str = "now"
    running: bool = True
    stubborn: bool = False
    signals: list[int] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    runner: web.AppRunner | None = None

    def alive(self) -> bool:
        return self.running

    def send(self, signum: int, /) -> bool:
        self.signals.append(signum)
        if self.running and (signum == signal.SIGKILL or not self.stubborn):
            self.die()
        return True

    def fail(self, reason: str) -> None:
        """End as a worker does that raises."""
        Path(f"{self.settings['socket']}.failed").write_text(reason)
        self.die()

    def die(self) -> None:
        """What the kernel does when a process is killed: every connection ends at once."""
        self.running = False
        if self.runner is not None and self.runner.server is not None:
            for site in list(self.runner.sites):
                cast(Any, site)._server.close()
            for connection in list(self.runner.server.connections):
                transport = cast(Any, connection).transport
                if transport is not None:
                    transport.abort()

    async def serve(self) -> None:
        """Serve as a trainer does."""
        app = web.Application()
        app.router.add_get("/api/v1/healthz", _health)
        app.router.add_get("/internal/alive", _alive)
        app.router.add_route("*", "/api/v1/hang", self._hang)
        app.router.add_route("*", "/api/v1/break", self._break)
        app.router.add_route("*", "/api/v1/stream", self._stream)
        app.router.add_route("*", "/api/v1/{rest:.*}", self._echo)
        self.runner = web.AppRunner(
            app, handler_cancellation=True, auto_decompress=False, shutdown_timeout=0.1
        )
        await self.runner.setup()
        await web.UnixSite(self.runner, str(self.settings["socket"])).start()

    async def _echo(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.requests.append((request.raw_path, dict(request.headers), body))
        headers = {"X-Answer": "yes", "Keep-Alive": "timeout=5", "Content-Type": "x/echo"}
        return web.Response(body=body, status=207, headers=headers)

    async def _hang(self, request: web.Request) -> web.Response:
        await request.read()
        self.arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        return web.Response()

    async def _break(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for chunk in request.content.iter_any():
            await response.write(chunk)
        return response


async def _health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _alive(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"\n")
    await asyncio.Event().wait()
    return response


@dataclass(eq=False)
class FakeSpawner:
    """Makes pretended workers."""

    processes: list[FakeProcess] = field(default_factory=list)
    failure: str | None = None
    silent: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def spawn(self, kind: str, settings: dict[str, object]) -> FakeProcess:
        await self.gate.wait()
        if self.failure is not None:
            raise WorkerFailed(self.failure)
        for process in self.processes:
            if process.running and process.settings["socket"] == settings["socket"]:
                return process
        process = FakeProcess(1000 + len(self.processes), kind, dict(settings))
        self.processes.append(process)
        if kind == "trainer" and not self.silent:
            await process.serve()
        return process

    def find(self, pid: int, started: str) -> FakeProcess:
        for process in self.processes:
            if (process.pid, process.started) == (pid, started):
                return process
        return FakeProcess(pid, "gone", {}, started, running=False)

    def living(self, kind: str) -> list[FakeProcess]:
        return [p for p in self.processes if p.running and p.kind == kind]


class FakeEngine:
    """An engine's client without an engine."""

    def __init__(self, process: FakeProcess, name: str) -> None:
        self.name = name
        self.process = process
        self.loads: list[str] = []
        self.outcome = LoadEnded("loaded")
        self._closed = asyncio.Event()

    @property
    def closed(self) -> Awaitable[object]:
        return self._closed.wait()

    async def load(self, identity: str) -> LoadEnded:
        self.loads.append(identity)
        return self.outcome

    async def close(self) -> None:
        self._closed.set()

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def die(self) -> None:
        self.process.die()
        self._closed.set()


@dataclass(eq=False)
class Gateway:
    """A gateway that serves, and a client that has the key."""

    app: web.Application
    base_url: str
    session: aiohttp.ClientSession
    spawner: FakeSpawner
    engines: list[FakeEngine]
    background: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def registry(self) -> ServingRegistry:
        return self.app[REGISTRY]

    @property
    def deployments(self) -> Deployments:
        return self.app[CONTROL_PLANE].deployments

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = KEY,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        """One request; returns status and JSON."""
        sent = dict(headers or {}) | ({"X-API-Key": key} if key is not None else {})
        async with self.session.request(
            method, f"{self.base_url}{path}", json=body, headers=sent
        ) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def until(self, path: str, state: str) -> dict[str, Any]:
        """Poll a resource until it has a state."""
        async with asyncio.timeout(20):
            while True:
                status, row = await self.call("GET", f"{HTTP}/{path}")
                assert status == 200, row
                if row["state"] == state:
                    return cast("dict[str, Any]", row)
                await asyncio.sleep(0.002)

    async def job(self, id_: str = "j1", **training: object) -> FakeProcess:
        """A job that is RUNNING, and its trainer."""
        body = {"trainingConfig": {"baseModel": MODEL, **training}}
        path = f"{HTTP}/rlorTrainerJobs?rlorTrainerJobId={id_}"
        status, row = await self.call("POST", path, body)
        assert status == 200, row
        await self.until(f"rlorTrainerJobs/{id_}", "JOB_STATE_RUNNING")
        return next(p for p in self.spawner.living("trainer") if p.settings["job"] == id_)

    async def deployment(self, id_: str = "d1", **fields: object) -> dict[str, Any]:
        """A deployment that is READY."""
        path = f"{HTTP}/deployments?deploymentId={id_}"
        status, row = await self.call("POST", path, {"baseModel": MODEL, **fields})
        assert status == 200, row
        return await self.until(f"deployments/{id_}", "READY")


def _no_routes(_: web.Application) -> None:
    """Completions have tests of their own."""


@dataclass(eq=False)
class PlatformFolders:
    """The folders of one platform; a gateway may be started on them again and again."""

    runtime_dir: Path
    state_dir: Path
    model_dir: Path
    spawner: FakeSpawner = field(default_factory=FakeSpawner)
    engines: list[FakeEngine] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    promotion_failure: str = ""
    promotion_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.promotion_gate.set()

    async def make_model(self, order: Order) -> str:
        """Make a model directory, without weights."""
        self.orders.append(order)
        await self.promotion_gate.wait()
        if not self.promotion_failure:
            write_model(Path(order.target))
        return self.promotion_failure

    async def connect(self, socket: Path, name: str) -> EngineClient:
        for process in self.spawner.living("engine"):
            if process.settings["socket"] == str(socket):
                engine = FakeEngine(process, name)
                self.engines.append(engine)
                return cast(EngineClient, engine)
        raise ConnectionRefusedError(str(socket))

    @asynccontextmanager
    async def gateway(
        self,
        host: str = "127.0.0.1",
        offers: tuple[str, ...] = (),
        *,
        as_cloud: bool = False,
        cloud_pace: float = 1.0,
        trouble: int | None = None,
    ) -> AsyncIterator[Gateway]:
        """A gateway on these folders."""
        settings = GatewaySettings(
            socket_fd=-1,
            lifetime_fd=-1,
            host=host,
            port=0,
            api_key=KEY,
            runtime_dir=str(self.runtime_dir),
            state_dir=str(self.state_dir),
            models={"tiny": str(self.model_dir)},
            default_model="tiny",
            offers=offers,
            as_cloud=as_cloud,
            cloud_pace=cloud_pace,
            trouble=trouble,
        )
        parts = Parts(self.spawner, self.connect, _no_routes, self.make_model)
        app = create_app(settings, parts)
        app.router.add_get("/boom", _boom)
        runner = make_runner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
                base = f"http://127.0.0.1:{port}"
                gateway = Gateway(app, base, session, self.spawner, self.engines)
                try:
                    yield gateway
                finally:
                    for task in gateway.background:
                        task.cancel()
                    await asyncio.gather(*gateway.background, return_exceptions=True)
        finally:
            await runner.cleanup()

    async def end(self) -> None:
        """End the pretended workers."""
        for process in self.spawner.processes:
            if process.runner is not None:
                process.die()
                await process.runner.cleanup()
        lifetime.remove_when_last(self.runtime_dir, None, 0.0)


async def _boom(_: web.Request) -> web.Response:
    raise ZeroDivisionError("secret details")


def write_model(folder: Path) -> Path:
    """What the gateway reads of a model's directory."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder
