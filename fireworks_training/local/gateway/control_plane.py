"""The control plane's routes: accounts, models, training shapes, trainer jobs, deployments.

Turns requests into calls of `TrainerJobs` and `Deployments`, and their rows into answers. It holds
no state; a request that is cut off half-way leaves no half-done change, since changes that take
time run in tasks of their own.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from aiohttp import web

from fireworks_training.local.database import Body
from fireworks_training.local.gateway import resources
from fireworks_training.local.gateway.checkpoints import list_checkpoints
from fireworks_training.local.gateway.deployments import Deployments
from fireworks_training.local.gateway.problems import Problem
from fireworks_training.local.gateway.registry import (
    REGISTRY,
    STAND_IN_PREFIX,
    Registry,
    UnknownModel,
)
from fireworks_training.local.gateway.trainers import TrainerJobs
from fireworks_training.local.settings import ACCOUNT, TRAINING_SHAPE, is_resource_id

MAX_BODY_BYTES = 1 << 20
MAX_PAGE = 200
LATEST = "latest"


@dataclass(slots=True, eq=False)
class ControlPlane:
    """What the routes act on.

    Attributes:
        jobs: the trainer jobs.
        deployments: the deployments.
        snapshots_dir: folder of the sampler snapshots.
    """

    jobs: TrainerJobs
    deployments: Deployments
    snapshots_dir: Path
    _detached: set[asyncio.Task[None]] = field(default_factory=set)

    async def finish(self, work: Coroutine[None, None, None]) -> None:
        """Run a change to its end, also when the request that asked for it is cut off."""
        task = asyncio.create_task(work)
        self._detached.add(task)
        task.add_done_callback(self._detached.discard)
        await asyncio.shield(task)


CONTROL_PLANE: web.AppKey[ControlPlane] = web.AppKey("control_plane", ControlPlane)


def add_routes(app: web.Application) -> None:
    """Register the routes; the app holds `CONTROL_PLANE` and `REGISTRY`."""
    account = "/v1/accounts/{account}"
    job = f"{account}/rlorTrainerJobs/{{job}}"
    deployment = f"{account}/deployments/{{deployment}}"
    shape = f"{account}/trainingShapes/{{shape}}"
    app.add_routes(
        [
            web.get("/v1/accounts", list_accounts),
            web.get(account, get_account),
            web.get(f"{account}/models", list_models),
            web.get(f"{account}/models/{{model}}", get_model),
            web.get(f"{account}/trainingShapes", list_shapes),
            web.get(shape, get_shape),
            web.get(f"{shape}/versions", list_shape_versions),
            web.get(f"{shape}/versions/{{version}}", get_shape_version),
            web.get(f"{account}/rlorTrainerJobs", list_jobs),
            web.post(f"{account}/rlorTrainerJobs", create_job),
            web.get(job, get_job),
            web.delete(job, delete_job),
            web.post(f"{job}:resume", resume_job),
            web.get(f"{job}/checkpoints", list_job_checkpoints),
            web.get(f"{account}/deployments", list_deployments),
            web.post(f"{account}/deployments", create_deployment),
            web.get(deployment, get_deployment),
            web.patch(deployment, patch_deployment),
            web.delete(deployment, delete_deployment),
        ]
    )


# -- requests ------------------------------------------------------------------------------------


async def read_object(request: web.Request) -> Mapping[str, object]:
    """The JSON object of a request's body; an absent body is an empty one."""
    length = request.content_length or 0
    raw = b"" if length > MAX_BODY_BYTES else await request.read()
    if max(length, len(raw)) > MAX_BODY_BYTES:
        raise Problem(413, f"the body is over {MAX_BODY_BYTES} bytes")
    if not raw.strip():
        return {}
    try:
        body: object = json.loads(raw)
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Problem(400, "the body is not a JSON object")
    return cast("dict[str, object]", body)


def page(request: web.Request, rows: Sequence[Body], name: str) -> web.Response:
    """One page of a list; tokens are offsets."""
    try:
        size = min(int(request.query.get("pageSize") or MAX_PAGE), MAX_PAGE)
        start = int(request.query.get("pageToken") or 0)
    except ValueError:
        raise Problem(400, "pageSize and pageToken must be numbers") from None
    if size < 1 or start < 0:
        raise Problem(400, "pageSize must be at least 1, and pageToken one that a page gave")
    more = start + size < len(rows)
    return web.json_response(
        {
            name: rows[start : start + size],
            "nextPageToken": str(start + size) if more else "",
            "totalSize": len(rows),
        }
    )


def _ids(request: web.Request, kind: str) -> str:
    resources.check_account(request.match_info["account"])
    return resources.check_id(request.match_info[kind], f"{kind} id")


def _plane(request: web.Request) -> ControlPlane:
    return request.app[CONTROL_PLANE]


# -- accounts, models, shapes --------------------------------------------------------------------

_ACCOUNT: Body = {"name": f"accounts/{ACCOUNT}", "displayName": "local", "state": "READY"}


async def list_accounts(request: web.Request) -> web.Response:
    """GET /v1/accounts: there is one."""
    return page(request, [_ACCOUNT], "accounts")


async def get_account(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>."""
    resources.check_account(request.match_info["account"])
    return web.json_response(_ACCOUNT)


def _registry(request: web.Request) -> Registry:
    return request.app[REGISTRY]


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/models."""
    resources.check_account(request.match_info["account"])
    models = _registry(request).models
    rows = [resources.show_model(name, entry, None) for name, entry in sorted(models.items())]
    return page(request, rows, "models")


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/models/<m>; a name of the cloud answers with its stand-in."""
    name = f"accounts/{request.match_info['account']}/models/{request.match_info['model']}"
    try:
        entry, notice = _registry(request).find_model(name)
    except UnknownModel as error:
        raise Problem(404, str(error)) from None
    return web.json_response(resources.show_model(name, entry, notice))


def _shape(request: web.Request) -> tuple[str, str]:
    """Name of the shape that a path asks for, and the notice for it."""
    account, shape = request.match_info["account"], request.match_info["shape"]
    name = f"accounts/{account}/trainingShapes/{shape}"
    notices = resources.Notices()
    try:
        resources.shape_field(name, TRAINING_SHAPE, notices)
    except Problem as problem:
        raise Problem(404, problem.message) from None
    return name, notices.text()


async def list_shapes(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/trainingShapes."""
    resources.check_account(request.match_info["account"])
    return page(request, [resources.show_shape(TRAINING_SHAPE, "")], "trainingShapes")


async def get_shape(request: web.Request) -> web.Response:
    """GET a training shape."""
    return web.json_response(resources.show_shape(*_shape(request)))


def _shape_version(request: web.Request, version: str) -> Body:
    name, notice = _shape(request)
    registry = _registry(request)
    # The shape goes with every model: what any of them can take.
    longest = max((model.max_context_length for model in registry.models.values()), default=0)
    if name.startswith(STAND_IN_PREFIX) and registry.default_model is not None:
        longest = registry.models[registry.default_model].max_context_length
    return resources.show_shape_version(name, version, longest, notice)


async def list_shape_versions(request: web.Request) -> web.Response:
    """GET the versions of a shape; `filter=latest_validated=true` gives the one there is."""
    wanted = request.query.get("filter", "").replace(" ", "")
    rows = [_shape_version(request, resources.SHAPE_VERSION)]
    if wanted not in ("", "latest_validated=true", "latestValidated=true", "public=true"):
        raise Problem(400, f"filter {wanted[:80]!r} is not known; use latest_validated=true")
    return page(request, rows, "trainingShapeVersions")


async def get_shape_version(request: web.Request) -> web.Response:
    """GET one version of a shape; the cloud's version names go with the cloud's shape names."""
    version = request.match_info["version"]
    known = version in (resources.SHAPE_VERSION, LATEST)
    if not known and request.match_info["account"] == ACCOUNT:
        raise Problem(404, f"no version {version[:80]!r}; there is {resources.SHAPE_VERSION!r}")
    shown = resources.SHAPE_VERSION if version == LATEST else version
    return web.json_response(_shape_version(request, shown))


# -- trainer jobs --------------------------------------------------------------------------------


async def create_job(request: web.Request) -> web.Response:
    """POST rlorTrainerJobs?rlorTrainerJobId=<id>[&trainingShape=<shape>]."""
    resources.check_account(request.match_info["account"])
    given = request.query.get("rlorTrainerJobId")
    id_ = resources.check_id(given or f"job-{secrets.token_hex(4)}", "rlorTrainerJobId")
    body = await read_object(request)
    shape = request.query.get("trainingShape") or resources.text_field(body, "trainingShape")
    stored, notice = resources.job_body(body, shape, _registry(request))
    return web.json_response(resources.show_job(_plane(request).jobs.create(id_, stored, notice)))


async def get_job(request: web.Request) -> web.Response:
    """GET a job; a deleted one shows JOB_STATE_DELETED."""
    return web.json_response(resources.show_job(_plane(request).jobs.get(_ids(request, "job"))))


async def list_jobs(request: web.Request) -> web.Response:
    """GET the jobs that are not deleted, oldest first."""
    resources.check_account(request.match_info["account"])
    rows = [resources.show_job(row) for row in _plane(request).jobs.rows()]
    return page(request, rows, "rlorTrainerJobs")


async def resume_job(request: web.Request) -> web.Response:
    """POST <job>:resume: a new worker with an empty memory; its saved states are there."""
    row = _plane(request).jobs.resume(_ids(request, "job"))
    return web.json_response(resources.show_job(row))


async def delete_job(request: web.Request) -> web.Response:
    """DELETE a job; returns when its worker is gone."""
    plane = _plane(request)
    await plane.finish(plane.jobs.delete(_ids(request, "job")))
    return web.json_response({})


async def list_job_checkpoints(request: web.Request) -> web.Response:
    """GET the saved states and snapshots of a job, of a deleted one too."""
    plane, id_ = _plane(request), _ids(request, "job")
    plane.jobs.get(id_)
    states = plane.jobs.states_dir(id_)
    rows = await asyncio.to_thread(list_checkpoints, id_, states, plane.snapshots_dir)
    return page(request, rows, "checkpoints")


# -- deployments ---------------------------------------------------------------------------------


def _shown(plane: ControlPlane, id_: str) -> web.Response:
    row = plane.deployments.get(id_)
    return web.json_response(resources.show_deployment(row, plane.deployments.replicas(id_)))


async def create_deployment(request: web.Request) -> web.Response:
    """POST deployments?deploymentId=<id>."""
    resources.check_account(request.match_info["account"])
    given = request.query.get("deploymentId")
    id_ = resources.check_id(given or f"deployment-{secrets.token_hex(4)}", "deploymentId")
    stored, notice = resources.deployment_body(await read_object(request), _registry(request))
    plane = _plane(request)
    plane.deployments.create(id_, stored, notice)
    return _shown(plane, id_)


async def get_deployment(request: web.Request) -> web.Response:
    """GET a deployment."""
    id_ = _ids(request, "deployment")
    if not is_resource_id(id_):
        raise Problem(404, "no such deployment")
    return _shown(_plane(request), id_)


async def list_deployments(request: web.Request) -> web.Response:
    """GET the deployments that are not deleted, oldest first."""
    resources.check_account(request.match_info["account"])
    deployments = _plane(request).deployments
    rows = [
        resources.show_deployment(row, deployments.replicas(row.id)) for row in deployments.rows()
    ]
    return page(request, rows, "deployments")


async def patch_deployment(request: web.Request) -> web.Response:
    """PATCH a deployment[?updateMask=<snake_case,...>]: scale, transition, linked trainer."""
    id_, plane = _ids(request, "deployment"), _plane(request)
    body = await read_object(request)
    mask = request.query.get("updateMask", "")
    changed = resources.deployment_patch(plane.deployments.get(id_).body, body, mask)
    plane.deployments.patch(id_, changed)
    return _shown(plane, id_)


async def delete_deployment(request: web.Request) -> web.Response:
    """DELETE a deployment[?hard=true]; returns when its engines are gone."""
    id_, plane = _ids(request, "deployment"), _plane(request)
    hard = request.query.get("hard", "").lower() == "true"
    await plane.finish(plane.deployments.delete(id_, hard=hard))
    return web.json_response({})
