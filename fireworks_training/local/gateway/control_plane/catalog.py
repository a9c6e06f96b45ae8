"""Control-plane routes for accounts, models, training shapes and operations.

Knows how the registry and the rows of promotions become answers; holds no state. `routes` tells
where a new route goes.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from fireworks_training.local.gateway.control_plane import resources
from fireworks_training.local.gateway.control_plane.promotions import (
    DONE,
    FAILED,
    RUNNING,
)
from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.inference.registry import (
    STAND_IN_PREFIX,
    ModelEntry,
    ServingRegistry,
    UnknownModel,
)
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.gateway.web.bodies import page, read_object, required_text
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.settings import (
    ACCOUNT,
    JOB_PREFIX,
    MODEL_PREFIX,
    OPERATION_PREFIX,
    TRAINING_SHAPE,
)
from fireworks_training.local.store.database import Body, ResourceRow

LATEST = "latest"


def add_routes(app: web.Application) -> None:
    """Register the routes; the app holds `CONTROL_PLANE` and `REGISTRY`."""
    account = "/v1/accounts/{account}"
    shape = f"{account}/trainingShapes/{{shape}}"
    app.add_routes(
        [
            web.get("/v1/accounts", list_accounts),
            web.get(account, get_account),
            web.get(f"{account}/models", list_models),
            web.get(f"{account}/models/{{model}}", get_model),
            web.delete(f"{account}/models/{{model}}", delete_model),
            web.get(f"{account}/operations/{{operation}}", get_operation),
            web.post(f"{account}/checkpoints/{{checkpoint}}:promote", promote_checkpoint),
            web.post(
                f"{account}/rlorTrainerJobs/{{job}}/checkpoints/{{checkpoint}}:promote",
                promote_job_checkpoint,
            ),
            web.get(f"{account}/trainingShapes", list_shapes),
            web.get(shape, get_shape),
            web.get(f"{shape}/versions", list_shape_versions),
            web.get(f"{shape}/versions/{{version}}", get_shape_version),
        ]
    )


_ACCOUNT: Body = {"name": f"accounts/{ACCOUNT}", "displayName": "local", "state": "READY"}


async def list_accounts(request: web.Request) -> web.Response:
    """GET /v1/accounts: list the one account there is."""
    return page(request, [_ACCOUNT], "accounts")


async def get_account(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>: show the account."""
    resources.check_account(request.match_info["account"])
    return web.json_response(_ACCOUNT)


def _registry(request: web.Request) -> ServingRegistry:
    return request.app[REGISTRY]


async def list_models(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/models: list the models."""
    resources.check_account(request.match_info["account"])
    models = _registry(request).models
    rows = [_shown_model(request, name, entry, None) for name, entry in sorted(models.items())]
    return page(request, rows, "models")


def _shown_model(request: web.Request, name: str, entry: ModelEntry, notice: str | None) -> Body:
    row = request.app[CONTROL_PLANE].promotions.models.find(name.rsplit("/", 1)[-1])
    promoted = row if row is not None and name == f"{MODEL_PREFIX}{row.id}" else None
    return resources.show_model(name, entry, notice, promoted)


async def get_model(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/models/<m>: show a model; a name of the cloud shows its stand-in."""
    name = f"accounts/{request.match_info['account']}/models/{request.match_info['model']}"
    try:
        entry, notice = _registry(request).find_model(name)
    except UnknownModel as error:
        raise HttpProblem(404, str(error)) from None
    return web.json_response(_shown_model(request, name, entry, notice))


async def delete_model(request: web.Request) -> web.Response:
    """DELETE a promoted model that nothing uses."""
    resources.check_account(request.match_info["account"])
    id_ = resources.check_id(request.match_info["model"], "model id")
    request.app[CONTROL_PLANE].promotions.delete_model(id_)
    return web.json_response({})


async def get_operation(request: web.Request) -> web.Response:
    """GET an operation: show it as `done` with a `response` or an `error`, else its progress."""
    resources.check_account(request.match_info["account"])
    row = request.app[CONTROL_PLANE].promotions.operations.get(request.match_info["operation"])
    return web.json_response(show_operation(request, row))


def show_operation(request: web.Request, row: ResourceRow) -> Body:
    """Return an operation as the API shows it."""
    shown: Body = {
        "name": f"{OPERATION_PREFIX}{row.id}",
        "done": row.state != RUNNING,
        "metadata": {"statusMessage": row.message, "createTime": row.created},
    }
    if row.state == FAILED:
        shown["error"] = {"code": 13, "message": row.message}
    name = f"{MODEL_PREFIX}{row.body['model']}"
    entry = _registry(request).models.get(name)
    if row.state == DONE and entry is not None:
        shown["response"] = _shown_model(request, name, entry, None)
    return shown


async def promote_job_checkpoint(request: web.Request) -> web.Response:
    """POST <job>/checkpoints/<c>:promote: promote a checkpoint named as in its job's list."""
    resources.check_account(request.match_info["account"])
    return await _promote(
        request, resources.check_id(request.match_info["job"], "job id"), await read_object(request)
    )


async def promote_checkpoint(request: web.Request) -> web.Response:
    """POST checkpoints/<c>:promote: promote a checkpoint of the job that the body names."""
    resources.check_account(request.match_info["account"])
    body = await read_object(request)
    job = required_text(body, "trainer_job_id", "trainerJobId").removeprefix(JOB_PREFIX)
    return await _promote(request, resources.check_id(job, "trainer_job_id"), body)


async def _promote(request: web.Request, job: str, body: Mapping[str, object]) -> web.Response:
    """Answer with the operation at once when `async_promotion` was asked for, else at its end."""
    plane = request.app[CONTROL_PLANE]
    plane.jobs.table.get(job)
    operation = plane.promotions.start(job, request.match_info["checkpoint"], body)
    if body.get("async_promotion", body.get("asyncPromotion")) is not True:
        operation = await plane.promotions.finished(operation.id)
        if operation.state != DONE:
            raise HttpProblem(500, operation.message)
    shown = show_operation(request, operation)
    return web.json_response({"operation": shown, "model": shown.get("response")})


def _shape(request: web.Request) -> tuple[str, str]:
    """Return the name of the shape that a path asks for, and the notice for it."""
    account, shape = request.match_info["account"], request.match_info["shape"]
    name = f"accounts/{account}/trainingShapes/{shape}"
    notices = resources.StatusNotices()
    try:
        resources.shape_field(name, TRAINING_SHAPE, notices)
    except HttpProblem as problem:
        raise HttpProblem(404, problem.message) from None
    return name, notices.text()


async def list_shapes(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/trainingShapes: list the one shape there is."""
    resources.check_account(request.match_info["account"])
    return page(request, [resources.show_shape(TRAINING_SHAPE, "")], "trainingShapes")


async def get_shape(request: web.Request) -> web.Response:
    """GET a training shape: show it."""
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
    """GET the versions of a shape: list the one there is, also with
    `filter=latest_validated=true`."""
    wanted = request.query.get("filter", "").replace(" ", "")
    rows = [_shape_version(request, resources.SHAPE_VERSION)]
    if wanted not in ("", "latest_validated=true", "latestValidated=true", "public=true"):
        raise HttpProblem(400, f"filter {wanted[:80]!r} is not known; use latest_validated=true")
    return page(request, rows, "trainingShapeVersions")


async def get_shape_version(request: web.Request) -> web.Response:
    """GET one version of a shape: show it; the cloud's version names go with the cloud's shapes."""
    version = request.match_info["version"]
    known = version in (resources.SHAPE_VERSION, LATEST)
    if not known and request.match_info["account"] == ACCOUNT:
        raise HttpProblem(404, f"no version {version[:80]!r}; there is {resources.SHAPE_VERSION!r}")
    shown = resources.SHAPE_VERSION if version == LATEST else version
    return web.json_response(_shape_version(request, shown))
