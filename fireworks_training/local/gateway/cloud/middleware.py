"""The middleware that makes the gateway answer as a cloud: refusals, faults, and lesser answers.

Knows the order of things: a request of no cloud's operation is not found; then its fields are
checked, then what it names; then it may meet a fault; and its answer loses what only this platform
says. Decides none of it.
"""

from __future__ import annotations

from typing import cast

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from fireworks_training.local.gateway.cloud import answers, references, schemas
from fireworks_training.local.gateway.cloud.habits import REDIRECT, CloudFault, Habits
from fireworks_training.local.gateway.cloud.requests import CloudOperation, operation_of
from fireworks_training.local.gateway.control_plane.hot_load import DEPLOYMENT_HEADER, NOTICE_AFTER
from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.web.extensions import EXTENSIONS
from fireworks_training.local.gateway.web.problems import HttpProblem

HABITS: web.AppKey[Habits] = web.AppKey("habits", Habits)

_OWN = ("/local/", "/api/v1/", "/healthz")
"""Where the platform stays itself: its own routes, and the Tinker API."""

_JSON = "application/json"
_NOT_OURS = (hdrs.IF_NONE_MATCH, "Prefer")
"""Request headers that no cloud reads."""


def install(app: web.Application, habits: Habits) -> None:
    """Switch the extensions off, and let the habits rule; before the application starts."""
    app[EXTENSIONS] = False
    app[HABITS] = habits
    app[NOTICE_AFTER] = habits.notice_after


@web.middleware
async def cloud_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request as a cloud would; where the platform is none, pass it on."""
    habits = request.app.get(HABITS)
    if habits is None or request.path.startswith(_OWN):
        return await handler(request)
    operation = operation_of(request.method, request.path)
    if operation is None:
        raise HttpProblem(404, f"{request.method} {request.path[:200]} is not found")
    body = await _checked_body(request, operation)
    deployment = _deployment(request, operation, body)
    fault = habits.meet(operation.kind, deployment)
    if fault is not None and not fault.after:
        return _struck(request, fault)
    if request.method == hdrs.METH_GET:
        request = _plain(request)
    response = await handler(request)
    if response.status < 400:
        _note(habits, operation, deployment, request.path)
    if fault is not None:
        return _struck(request, fault)
    return _lesser(habits, operation, deployment, response)


async def _checked_body(
    request: web.Request, operation: CloudOperation
) -> dict[str, object] | None:
    """Return the body of a request; None where there is none that is looked at.

    Raises:
        HttpProblem: 400, a field that no cloud knows, or the name of something that is not there;
            415, a body that is not JSON.
    """
    body: object = None
    if request.can_read_body:
        data = await request.read()
        encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower()
        if operation.kind == "submit" and (request.content_type != _JSON or encoding != "identity"):
            raise HttpProblem(415, f"{operation.name} takes uncompressed JSON")
        try:
            body = orjson.loads(data) if data else None
        except orjson.JSONDecodeError:
            return None  # the route says what is wrong
    refused = schemas.refusal(operation.name, request.query, body)
    if refused is not None:
        raise HttpProblem(400, refused)
    if not isinstance(body, dict):
        return None
    fields = cast("dict[str, object]", body)
    absent = references.missing(request.app[CONTROL_PLANE], operation.name, fields)
    if absent is not None:
        raise HttpProblem(400, absent)
    return fields


def _deployment(
    request: web.Request, operation: CloudOperation, body: dict[str, object] | None
) -> str:
    """Return the id of the deployment that a request is for; empty if it is for none."""
    if operation.kind == "complete":
        return str((body or {}).get("model", "")).rsplit("/", 1)[-1]
    if operation.kind in ("hot_load", "look"):
        return request.headers.get(DEPLOYMENT_HEADER, "").rsplit("/", 1)[-1]
    return ""


def _plain(request: web.Request) -> web.Request:
    """Return a GET without what asks this platform to wait."""
    headers = request.headers.copy()
    for name in _NOT_OURS:
        headers.popall(name, None)
    query = {k: v for k, v in request.query.items() if k not in ("wait_for", "timeout_s")}
    # Waiting is an offer of the routes, made by these alone; without them they answer at once.
    return request.clone(headers=headers, rel_url=request.rel_url.with_query(query))


def _note(habits: Habits, operation: CloudOperation, deployment: str, path: str) -> None:
    if operation.kind == "hot_load":
        habits.loading(deployment)
    elif operation.name == "delete" and "/deployments/" in path:
        habits.forget(path.rsplit("/", 1)[-1])


def _struck(request: web.Request, fault: CloudFault) -> web.Response:
    """Return the answer of a fault; raises nothing, so that it is never logged as ours."""
    headers: dict[str, str] = {}
    if fault.retry_after_s is not None:
        headers[hdrs.RETRY_AFTER] = str(fault.retry_after_s)
    if fault.status == REDIRECT:
        headers[hdrs.LOCATION] = str(request.url)
        return web.Response(status=REDIRECT, headers=headers)
    text = {
        403: "access is denied for now",
        404: "Model not found, inaccessible, and/or not deployed",
        408: "the request timed out",
        409: "the resource is busy",
        425: "the deployment is being updated",
        429: "too many requests",
    }.get(fault.status, "upstream connect error or disconnect/reset before headers")
    if fault.status >= 500:
        return web.Response(status=fault.status, text=text, headers=headers)
    body = {"error": {"message": text}}
    return web.json_response(body, status=fault.status, headers=headers)


def _lesser(
    habits: Habits, operation: CloudOperation, deployment: str, response: web.StreamResponse
) -> web.StreamResponse:
    """Return an answer without the platform's extensions; a stream leaves them out itself."""
    if not isinstance(response, web.Response) or response.content_type != _JSON:
        return response
    response.headers.popall(hdrs.ETAG, None)
    response.headers.popall("Preference-Applied", None)
    raw = response.body
    if not isinstance(raw, bytes) or not raw or hdrs.CONTENT_ENCODING in response.headers:
        return response
    body: object = orjson.loads(raw)
    if not isinstance(body, dict):
        return response
    status, shown = answers.as_cloud(operation, response.status, cast("dict[str, object]", body))
    if operation.kind == "look" and status < 400 and not habits.lists_replicas(deployment):
        shown = cast("answers.Fields", {"replicas": []})
    response.set_status(status)
    response.body = orjson.dumps(shown)
    return response
