"""The gateway's application: joins its parts, middlewares, start and end.

Knows which part needs which. Does not know the routes: each module of routes has an `add_routes`,
which `create_app` calls. Tests build the same application with other workers behind it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from aiohttp.typedefs import Handler

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.gateway import cloud, faults, tinker
from fireworks_training.local.gateway.cloud.habits import Habits
from fireworks_training.local.gateway.cloud.middleware import cloud_middleware
from fireworks_training.local.gateway.control_plane import catalog, trainer_proxy
from fireworks_training.local.gateway.control_plane import routes as control_plane
from fireworks_training.local.gateway.control_plane.conditions import Conditions
from fireworks_training.local.gateway.control_plane.deployments import ConnectEngine, Deployments
from fireworks_training.local.gateway.control_plane.promotions import (
    MakeModel,
    Promotions,
    run_promotion,
)
from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE, ControlPlane
from fireworks_training.local.gateway.control_plane.trainer_jobs import TrainerJobs
from fireworks_training.local.gateway.control_plane.workers import Spawner, Workers
from fireworks_training.local.gateway.faults import CONDITIONS, fault_middleware
from fireworks_training.local.gateway.inference import tokenizer_route
from fireworks_training.local.gateway.inference.registry import ModelEntry, ServingRegistry
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.gateway.web.auth import host_middleware, key_middleware
from fireworks_training.local.gateway.web.connections import watch_middleware
from fireworks_training.local.gateway.web.problems import (
    REQUEST_ID,
    STARTED,
    HttpProblem,
    code_of,
    render,
)
from fireworks_training.local.limits import Limits
from fireworks_training.local.model.memory import PageReturn, c_library_trim
from fireworks_training.local.settings import MODEL_PREFIX, GatewaySettings
from fireworks_training.local.store.database import FILE, Database
from fireworks_training.local.store.reserve import DiskFull, is_full

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 << 20
# Long polls are cut when the platform ends; nothing else takes long.
SHUTDOWN_S = 0.5
PAGES_EVERY = 10.0  # seconds
DEFAULT_CONTEXT_LENGTH = 2048
CONNECTION_OPTIONS: dict[str, Any] = {
    "access_log": None,
    # Bodies for a trainer pass through as they are, encoded or not.
    "auto_decompress": False,
}
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Parts:
    """Holds what differs between the platform and a test of its routes.

    Attributes:
        spawner: makes worker processes.
        connect_engine: makes a client of an engine's socket.
        add_serving_routes: registers the routes that use those clients.
        make_model: makes a model directory of a snapshot.
    """

    spawner: Spawner
    connect_engine: ConnectEngine
    add_serving_routes: Callable[[web.Application], None]
    make_model: MakeModel = run_promotion


async def _pages(_: web.Application) -> AsyncIterator[None]:
    """Give freed memory back while the gateway runs: the buffers of a busy hour are large."""
    returned = PageReturn(c_library_trim())

    async def now_and_then() -> None:
        while True:
            await asyncio.sleep(PAGES_EVERY)
            returned.worked(asyncio.get_running_loop().time())

    task = asyncio.create_task(now_and_then(), name="free pages")
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def create_app(settings: GatewaySettings, parts: Parts) -> web.Application:
    """Build the application over one state folder; when it starts, it recovers what is in there.

    Raises:
        LocalPlatformError: the state folder or a model can't be used.
    """
    state_dir, runtime_dir = Path(settings.state_dir), Path(settings.runtime_dir)
    database = Database(state_dir / FILE)
    registry = load_registry(settings)
    habits = Habits(settings.cloud_pace, settings.trouble) if settings.as_cloud else None
    delays = {} if habits is None else habits.limits()
    conditions = Conditions(Limits().changed({**delays, **settings.limits}))
    workers = Workers(database, parts.spawner, runtime_dir, conditions)
    jobs = TrainerJobs(
        database, workers, registry, state_dir, conditions, atomic_steps=not settings.as_cloud
    )
    deployments = Deployments(database, workers, registry, state_dir, parts.connect_engine)
    app = web.Application(
        client_max_size=MAX_BODY_BYTES,
        middlewares=[
            watch_middleware,
            error_middleware,
            host_middleware(settings.host),
            key_middleware(settings.api_key),
            cloud_middleware,
            fault_middleware,
        ],
    )
    if habits is not None:
        cloud.install(app, habits)
    app[REGISTRY] = registry
    app[CONDITIONS] = conditions
    promotions = Promotions(database, registry, state_dir, parts.make_model)
    plane = ControlPlane(jobs, deployments, promotions, state_dir / "snapshots")
    app[CONTROL_PLANE] = plane
    database.on_change = plane.waiters.changed

    async def lifespan(_: web.Application) -> AsyncIterator[None]:
        workers.forget_foreign()
        # First, for jobs and deployments may be of promoted models.
        promotions.recover()
        await jobs.recover()
        await deployments.recover()
        # A template may know workers whose owner was deleted while no gateway ran.
        await workers.end_orphans(jobs.owners() | deployments.owners())
        yield
        await jobs.close()
        await deployments.close()
        await promotions.close()
        database.close()

    app.cleanup_ctx.append(lifespan)
    app.cleanup_ctx.append(_pages)
    app.on_response_prepare.append(_mark_response)
    app.router.add_get("/healthz", healthz)
    catalog.add_routes(app)
    control_plane.add_routes(app)
    faults.add_routes(app)
    tokenizer_route.add_routes(app)
    trainer_proxy.add_routes(app)
    parts.add_serving_routes(app)
    tinker.install(app, state_dir, settings.offers)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """Return the runner with the server options that the routes rely on."""
    return web.AppRunner(
        app,
        **CONNECTION_OPTIONS,
        # A completion or a long poll whose client went away is given up at once.
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
    )


async def healthz(_: web.Request) -> web.Response:
    """GET /healthz: say that the gateway answers."""
    return web.json_response({"status": "ok"})


def load_registry(settings: GatewaySettings) -> ServingRegistry:
    """Return a registry of the models of the settings, with what their config.json says.

    Raises:
        LocalPlatformError: a model's config.json can't be read.
    """
    registry = ServingRegistry(default_model=f"{MODEL_PREFIX}{settings.default_model}")
    for id_, folder in settings.models.items():
        name, path = f"{MODEL_PREFIX}{id_}", Path(folder)
        try:
            config: object = json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError) as error:
            raise LocalPlatformError(
                f"model {id_!r}: config.json can't be read: {error}"
            ) from error
        fields = cast("dict[str, object]", config) if isinstance(config, dict) else {}
        length = fields.get("max_position_embeddings")
        registry.models[name] = ModelEntry(
            name, path, length if isinstance(length, int) else DEFAULT_CONTEXT_LENGTH
        )
    return registry


# -- middlewares ---------------------------------------------------------------------------------


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, and every failure a JSON answer."""
    given = request.headers.get("x-request-id", "")
    request[REQUEST_ID] = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
    try:
        return await handler(request)
    except HttpProblem as problem:
        if request.get(STARTED):
            raise
        return render(problem)
    except web.HTTPException as error:
        if error.status < 400 or request.get(STARTED):
            raise
        if error.content_type == "application/json":
            return error
        text = error.text or error.reason
        return render(HttpProblem(error.status, text, headers=_kept_headers(error)))
    except (asyncio.CancelledError, ConnectionError):
        raise  # the client went away
    except Exception as error:
        if is_full(error) and not request.get(STARTED):
            return render(HttpProblem(507, DiskFull().message))
        log.exception("request %s: %s %s", request[REQUEST_ID], request.method, request.path)
        if request.get(STARTED):
            raise
        text = f"internal error; the platform's log names request {request[REQUEST_ID]}"
        return render(HttpProblem(500, text, code=code_of(500)))


def _kept_headers(error: web.HTTPException) -> dict[str, str]:
    """Return those headers that mean something beside the body, such as Allow and Retry-After."""
    return {name: error.headers[name] for name in ("Allow", "Retry-After") if name in error.headers}


async def _mark_response(request: web.Request, response: web.StreamResponse) -> None:
    """Send the id with the first byte; from then on an error can't be an answer any more."""
    request[STARTED] = True
    response.headers.setdefault("x-request-id", request.get(REQUEST_ID, uuid.uuid4().hex))
