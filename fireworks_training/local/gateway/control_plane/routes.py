"""Control-plane routes for trainer jobs and deployments.

Knows how requests become calls of `TrainerJobs` and `Deployments`, and their rows answers. Holds no
state; a request that is cut off half-way leaves no half-done change, since changes that take time
run in tasks of their own (`ControlPlane.finish`).

A new control-plane route takes three steps:

1. Its path and its handler go here, or into `catalog` for what only shows models, shapes and
   operations, or `hot_load` for what an engine loads: one row in that module's `add_routes`, one
   function below. The handler's docstring begins with the method and the path.
2. The check of its body and the form of its answer go into `resources`, as pure functions, with the
   field checks of `web.bodies`.
3. The change itself goes to the owner of the state: `TrainerJobs`, `Deployments` or `Promotions`.

`app.create_app` registers a new module of routes; tests are in `tests/local/gateway/control_plane`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from fireworks_training.local.gateway.control_plane import resources
from fireworks_training.local.gateway.control_plane.checkpoints import (
    delete_checkpoint,
    list_checkpoints,
)
from fireworks_training.local.gateway.control_plane.deployments import Deployments
from fireworks_training.local.gateway.control_plane.promotions import Promotions
from fireworks_training.local.gateway.control_plane.trainer_jobs import TrainerJobs
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.gateway.web.bodies import page, read_object, text_field
from fireworks_training.local.gateway.web.long_polls import Waiters, answer
from fireworks_training.local.gateway.web.tasks import RunningTasks
from fireworks_training.local.store.database import Body


@dataclass(slots=True, eq=False)
class ControlPlane:
    """Holds what the control plane's routes act on.

    Attributes:
        jobs: the trainer jobs.
        deployments: the deployments.
        promotions: the models that were made of snapshots.
        snapshots_dir: folder of the sampler snapshots.
        waiters: requests that wait for a job or a deployment to change.
    """

    jobs: TrainerJobs
    deployments: Deployments
    promotions: Promotions
    snapshots_dir: Path
    waiters: Waiters = field(default_factory=Waiters)
    _changes: RunningTasks[object] = field(default_factory=RunningTasks[object])

    async def finish(self, work: Coroutine[None, None, None]) -> None:
        """Run a change to its end, also when the request that asked for it is cut off."""
        await asyncio.shield(self._changes.start(object(), work))


CONTROL_PLANE: web.AppKey[ControlPlane] = web.AppKey("control_plane", ControlPlane)


def add_routes(app: web.Application) -> None:
    """Register the routes; the app holds `CONTROL_PLANE` and `REGISTRY`."""
    account = "/v1/accounts/{account}"
    job = f"{account}/rlorTrainerJobs/{{job}}"
    deployment = f"{account}/deployments/{{deployment}}"
    app.add_routes(
        [
            web.get(f"{account}/rlorTrainerJobs", list_jobs),
            web.post(f"{account}/rlorTrainerJobs", create_job),
            web.get(job, get_job),
            web.delete(job, delete_job),
            web.post(f"{job}:resume", resume_job),
            web.get(f"{job}/checkpoints", list_job_checkpoints),
            web.delete(f"{job}/checkpoints/{{checkpoint}}", delete_job_checkpoint),
            web.get(f"{account}/deployments", list_deployments),
            web.post(f"{account}/deployments", create_deployment),
            web.get(deployment, get_deployment),
            web.patch(deployment, patch_deployment),
            web.delete(deployment, delete_deployment),
        ]
    )


def _ids(request: web.Request, kind: str) -> str:
    resources.check_account(request.match_info["account"])
    return resources.check_id(request.match_info[kind], f"{kind} id")


def _plane(request: web.Request) -> ControlPlane:
    return request.app[CONTROL_PLANE]


# -- trainer jobs --------------------------------------------------------------------------------


async def create_job(request: web.Request) -> web.Response:
    """POST rlorTrainerJobs?rlorTrainerJobId=<id>[&trainingShape=<shape>]: create a job."""
    resources.check_account(request.match_info["account"])
    given = request.query.get("rlorTrainerJobId")
    id_ = resources.check_id(given or f"job-{secrets.token_hex(4)}", "rlorTrainerJobId")
    body = await read_object(request)
    shape = request.query.get("trainingShape") or text_field(body, "trainingShape")
    stored, notice = resources.job_body(body, shape, request.app[REGISTRY])
    return web.json_response(resources.show_job(_plane(request).jobs.create(id_, stored, notice)))


async def get_job(request: web.Request) -> web.Response:
    """GET a job: show it, at once or once it has changed (`long_polls`); a deleted one shows
    JOB_STATE_DELETED."""
    plane, id_ = _plane(request), _ids(request, "job")

    def show() -> Body:
        return resources.show_job(plane.jobs.table.get(id_))

    return await answer(request, plane.waiters, ("job", id_), show)


async def list_jobs(request: web.Request) -> web.Response:
    """GET rlorTrainerJobs: list the jobs that are not deleted, oldest first."""
    resources.check_account(request.match_info["account"])
    rows = [resources.show_job(row) for row in _plane(request).jobs.table.present()]
    return page(request, rows, "rlorTrainerJobs")


async def resume_job(request: web.Request) -> web.Response:
    """POST <job>:resume: start a new worker with an empty memory; saved states are still there."""
    row = _plane(request).jobs.resume(_ids(request, "job"))
    return web.json_response(resources.show_job(row))


async def delete_job(request: web.Request) -> web.Response:
    """DELETE a job; answer when its worker is gone."""
    plane = _plane(request)
    await plane.finish(plane.jobs.delete(_ids(request, "job")))
    return web.json_response({})


async def list_job_checkpoints(request: web.Request) -> web.Response:
    """GET <job>/checkpoints: list the saved states and snapshots of a job, of a deleted one too."""
    plane, id_ = _plane(request), _ids(request, "job")
    plane.jobs.table.get(id_)
    states = plane.jobs.states_dir(id_)
    rows = await asyncio.to_thread(list_checkpoints, id_, states, plane.snapshots_dir)
    return page(request, rows, "checkpoints")


async def delete_job_checkpoint(request: web.Request) -> web.Response:
    """DELETE <job>/checkpoints/<c>: remove a saved state or a snapshot that nothing needs."""
    plane, id_ = _plane(request), _ids(request, "job")
    plane.jobs.table.get(id_)
    await asyncio.to_thread(
        delete_checkpoint,
        id_,
        request.match_info["checkpoint"],
        plane.jobs.states_dir(id_),
        plane.snapshots_dir,
        plane.deployments.snapshots_in_use(),
    )
    return web.json_response({})


# -- deployments ---------------------------------------------------------------------------------


def _shown(plane: ControlPlane, id_: str) -> Body:
    row = plane.deployments.table.get(id_)
    return resources.show_deployment(row, plane.deployments.replicas(id_))


async def create_deployment(request: web.Request) -> web.Response:
    """POST deployments?deploymentId=<id>: create a deployment."""
    resources.check_account(request.match_info["account"])
    given = request.query.get("deploymentId")
    id_ = resources.check_id(given or f"deployment-{secrets.token_hex(4)}", "deploymentId")
    stored, notice = resources.deployment_body(await read_object(request), request.app[REGISTRY])
    plane = _plane(request)
    plane.deployments.create(id_, stored, notice)
    return web.json_response(_shown(plane, id_))


async def get_deployment(request: web.Request) -> web.Response:
    """GET a deployment: show it, at once or once it has changed (`long_polls`)."""
    plane, id_ = _plane(request), _ids(request, "deployment")
    return await answer(request, plane.waiters, ("deployment", id_), lambda: _shown(plane, id_))


async def list_deployments(request: web.Request) -> web.Response:
    """GET deployments: list those that are not deleted, oldest first."""
    resources.check_account(request.match_info["account"])
    deployments = _plane(request).deployments
    rows = [
        resources.show_deployment(row, deployments.replicas(row.id))
        for row in deployments.table.present()
    ]
    return page(request, rows, "deployments")


async def patch_deployment(request: web.Request) -> web.Response:
    """PATCH a deployment[?updateMask=<snake_case,...>]: change scale, transition, linked
    trainer."""
    id_, plane = _ids(request, "deployment"), _plane(request)
    body = await read_object(request)
    mask = request.query.get("updateMask", "")
    changed = resources.deployment_patch(plane.deployments.table.get(id_).body, body, mask)
    plane.deployments.patch(id_, changed)
    return web.json_response(_shown(plane, id_))


async def delete_deployment(request: web.Request) -> web.Response:
    """DELETE a deployment[?hard=true]; answer when its engines are gone."""
    id_, plane = _ids(request, "deployment"), _plane(request)
    hard = request.query.get("hard", "").lower() == "true"
    await plane.finish(plane.deployments.delete(id_, hard=hard))
    return web.json_response({})
