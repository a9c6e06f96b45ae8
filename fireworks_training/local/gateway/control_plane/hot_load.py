"""`/hot_load/v1/models/hot_load`: hot-loads a snapshot into a deployment, and shows what it serves.

Knows which deployment is meant and that every replica has to take the snapshot. Does not read
snapshots: the engines do the loading, and refuse what they can't vouch for.

A GET of the status may wait (`?wait_for=<identity>&timeout_s=<seconds>`) until a load of that
snapshot, if one is under way, has ended on every replica.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from fireworks_training.local.gateway.inference.engine_client import EngineClient, LoadEnded
from fireworks_training.local.gateway.inference.engine_stream import EngineGone
from fireworks_training.local.gateway.inference.registry import LiveDeployment, ServingRegistry
from fireworks_training.local.gateway.inference.serving import (
    REGISTRY,
    RETRY_SOON,
    add_waking,
    find_deployment,
    ready_engines,
)
from fireworks_training.local.gateway.web.bodies import invalid_body, parse_object, read_bytes
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.gateway.web.tasks import RunningTasks
from fireworks_training.local.store.snapshots import InvalidName, check_name

log = logging.getLogger(__name__)

PATH = "/hot_load/v1/models/hot_load"
DEPLOYMENT_HEADER = "fireworks-deployment"

LONGEST_WAIT_S = 25.0
"""Seconds that a GET of the status may wait."""

NOTICE_AFTER: web.AppKey[Callable[[int], float]] = web.AppKey("notice_after")
"""Seconds after which a replica, by its place, notices a hot load; at once where it isn't set."""

ASKED: web.AppKey[dict[str, str]] = web.AppKey("asked", dict)
"""The snapshot that each deployment was asked for last, where replicas notice late."""

RECORDING: web.AppKey[RunningTasks[tuple[str, str]]] = web.AppKey("recording_loads", RunningTasks)
"""The loads under way, by deployment and identity."""


class IncrementalMetadata(BaseModel):
    """Parses what a client says about a delta; only the predecessor is compared here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    previous_snapshot_identity: str
    compression_format: str | None = None
    checksum_format: str | None = None


class HotLoadBody(BaseModel):
    """Parses the body of a hot load."""

    model_config = ConfigDict(extra="forbid", strict=True)

    identity: str
    reset_prompt_cache: bool = True
    incremental_snapshot_metadata: IncrementalMetadata | None = None


def add_routes(app: web.Application) -> None:
    """Register the hot load routes; the app holds `REGISTRY`."""
    app[RECORDING] = RunningTasks()
    app[ASKED] = {}
    app.on_cleanup.append(_stop_recording)
    add_waking(app)
    app.router.add_post(PATH, post_hot_load)
    app.router.add_get(PATH, get_hot_load)


async def post_hot_load(request: web.Request) -> web.Response:
    """POST: ask every replica to load; the answer comes before they have."""
    live = _deployment(request)
    body = _parse(await read_bytes(request))
    engines = ready_engines(request.app, live)
    if body.incremental_snapshot_metadata is not None:
        previous = body.incremental_snapshot_metadata.previous_snapshot_identity
        _check_predecessor(engines, body.identity, previous)
    registry, recordings = request.app[REGISTRY], request.app[RECORDING]
    key = (live.resource, body.identity)
    notice_after = request.app.get(NOTICE_AFTER)
    if notice_after is not None:
        asked = request.app[ASKED]
        asked[live.resource] = body.identity
        # Asked twice before it was noticed, it is still one load.
        if recordings.get(key) is None:
            recordings.start(key, _load_late(registry, live, body, asked, notice_after))
    else:
        try:
            loads = [_ask(engine, live, body) for engine in engines]
        except EngineGone as error:
            raise HttpProblem(503, f"{live.resource}: {error}", headers=RETRY_SOON) from error
        recordings.start(key, _record(registry, live, engines, body.identity, loads))
    return web.json_response(
        {"identity": body.identity, "replicas": len(engines), "long_poll": True}
    )


async def get_hot_load(request: web.Request) -> web.Response:
    """GET: show a row for each replica that the deployment should have."""
    live = _deployment(request)
    recording = request.app[RECORDING].get((live.resource, request.query.get("wait_for", "")))
    if recording is not None:
        await asyncio.wait([recording], timeout=_wait_s(request))
    rows = [engine.status() for engine in live.engines]
    absent = max(0, live.desired_replicas - len(rows))
    rows += [_absent_row(live) for _ in range(absent)]
    return web.json_response({"replicas": rows, "long_poll": True})


def _wait_s(request: web.Request) -> float:
    try:
        seconds = float(request.query.get("timeout_s", LONGEST_WAIT_S))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise HttpProblem(400, "timeout_s must be a number of seconds from 0")
    return min(seconds, LONGEST_WAIT_S)


def _deployment(request: web.Request) -> LiveDeployment:
    name = request.headers.get(DEPLOYMENT_HEADER)
    if not name:
        raise HttpProblem(400, f"the header {DEPLOYMENT_HEADER} has to name the deployment")
    return find_deployment(request.app[REGISTRY], name)


def _parse(data: bytes) -> HotLoadBody:
    try:
        body = HotLoadBody.model_validate(parse_object(data))
        check_name(body.identity)
    except InvalidName as error:
        raise HttpProblem(400, f"{error}, field: 'identity'") from None
    except ValidationError as error:
        raise invalid_body(error) from None
    return body


def _check_predecessor(engines: list[EngineClient], identity: str, previous: str) -> None:
    """Check that every engine holds the snapshot that a delta was made against.

    Raises:
        HttpProblem: 409 with what the replica holds.
    """
    for engine in engines:
        held = engine.state.identity
        # The same request may come twice, and the first one have succeeded.
        if held not in (previous, identity):
            raise HttpProblem(
                409,
                f"{identity!r} is a delta to {previous!r}, but {engine.name} holds "
                f"{held or 'the base model'!r}; load the missing snapshots in order, or save a "
                "base snapshot",
                code="FAILED_PRECONDITION",
            )


def _absent_row(live: LiveDeployment) -> dict[str, object]:
    """Show a replica that is not there yet; it loads what the deployment has before it serves."""
    return {
        "current_snapshot_identity": None,
        "readiness": False,
        "load": {"slots": 0, "active": 0, "waiting": 0},
        "loading_state": {
            "stage": "pending",
            "target_snapshot_identity": live.loaded_identity,
        },
        "tensors_sha256": None,
        "loaded_adapters": [],
    }


def _ask(
    engine: EngineClient, live: LiveDeployment, body: HotLoadBody
) -> asyncio.Future[LoadEnded]:
    return engine.request_load(
        body.identity, reset_prompt_cache=body.reset_prompt_cache, transition=live.transition
    )


async def _load_late(
    registry: ServingRegistry,
    live: LiveDeployment,
    body: HotLoadBody,
    asked: Mapping[str, str],
    notice_after: Callable[[int], float],
) -> None:
    """Let one replica after the other notice a load; then record it as any other."""
    engines = [engine for engine in live.engines if not engine.is_closed]
    loads: list[asyncio.Future[LoadEnded]] = []
    waited = 0.0
    for place, engine in enumerate(engines):
        await asyncio.sleep(max(0.0, notice_after(place) - waited))
        waited = notice_after(place)
        if asked[live.resource] != body.identity:
            return  # another one was asked for meanwhile
        try:
            loads.append(_ask(engine, live, body))
        except EngineGone as error:
            log.warning("%s did not notice %s: %s", engine.name, body.identity, error)
            return
    await _record(registry, live, engines, body.identity, loads)


async def _record(
    registry: ServingRegistry,
    live: LiveDeployment,
    engines: list[EngineClient],
    identity: str,
    loads: list[asyncio.Future[LoadEnded]],
) -> None:
    """Record a snapshot once every replica has it; a replica that joins later gets it too."""
    outcomes = await asyncio.gather(*loads)
    if all(ended.outcome == "loaded" for ended in outcomes):
        if registry.deployments.get(live.resource) is live:
            live.keeper.record_loaded(live.resource, identity)
        return
    for engine, ended in zip(engines, outcomes, strict=True):
        if ended.outcome == "failed":
            log.error("%s did not load %s: %s", engine.name, identity, ended.reason)


async def _stop_recording(app: web.Application) -> None:
    await app[RECORDING].close()
