"""`/local/v1/limits` and `/local/v1/faults`: routes that set limits and make the platform fail.

The routes exist on the local platform alone, under its key. They set the limits and faults that
`conditions` carries out, fail jobs and deployments, kill replicas, and replace answers by errors.
Nothing here lasts beyond the gateway process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.gateway.control_plane import resources
from fireworks_training.local.gateway.control_plane.conditions import MAX_FAULTS, Conditions, Fault
from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.web.bodies import int_field, read_object, text_field
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.limits import camel, seconds
from fireworks_training.local.settings import ACCOUNT

LIMITS = "/local/v1/limits"
FAULTS = "/local/v1/faults"
KINDS = ("rlorTrainerJobs", "deployments")
MAX_TEXT = 500
MAX_TIMES = 10_000

CONDITIONS: web.AppKey[Conditions] = web.AppKey("conditions", Conditions)


@dataclass(frozen=True, slots=True)
class RouteFault:
    """Describes answers that are replaced by an error.

    Attributes:
        method: HTTP method of the requests.
        path: path of the requests, without the query; a `*` at its end matches any rest.
        status: HTTP status to answer with.
        times: answers that are still to be replaced.
        after: the request is carried out first, and only its answer is lost.
        retry_after_s: sent as Retry-After; None = not sent.
    """

    method: str
    path: str
    status: int
    times: int = 1
    after: bool = False
    retry_after_s: float | None = None

    def matches(self, request: web.Request) -> bool:
        """Return whether a request is one of those."""
        if self.method != request.method:
            return False
        if self.path.endswith("*"):
            return request.path.startswith(self.path[:-1])
        return request.path == self.path


@dataclass(slots=True, eq=False)
class RouteFaults:
    """Keeps the faults of routes that are still due."""

    due: list[RouteFault] = field(default_factory=list[RouteFault])

    def take(self, request: web.Request) -> RouteFault | None:
        """Return the first fault that a request meets, and count it down."""
        for index, fault in enumerate(self.due):
            if fault.matches(request):
                left = replace(fault, times=fault.times - 1)
                self.due[index : index + 1] = [left] if left.times else []
                return fault
        return None


ROUTE_FAULTS: web.AppKey[RouteFaults] = web.AppKey("route_faults", RouteFaults)


def add_routes(app: web.Application) -> None:
    """Register the routes; the app holds `CONDITIONS` and `CONTROL_PLANE`."""
    app[ROUTE_FAULTS] = RouteFaults()
    app.add_routes(
        [
            web.get(LIMITS, get_limits),
            web.patch(LIMITS, patch_limits),
            web.get(FAULTS, list_faults),
            web.post(FAULTS, post_fault),
            web.delete(FAULTS, delete_faults),
        ]
    )


@web.middleware
async def fault_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put the error that is due in place of an answer."""
    faults = request.app[ROUTE_FAULTS]
    fault = faults.take(request) if faults.due and not request.path.startswith("/local/") else None
    if fault is None:
        return await handler(request)
    if fault.after:
        await handler(request)
    elif request.can_read_body:
        # A client that is still sending would see a broken connection in place of the answer.
        await request.read()
    wait = fault.retry_after_s
    headers = {} if wait is None else {"Retry-After": f"{wait:g}"}
    raise HttpProblem(fault.status, "a fault that was asked for", headers=headers)


# -- limits --------------------------------------------------------------------------------------


async def get_limits(request: web.Request) -> web.Response:
    """GET: show the limits in force."""
    return web.json_response(request.app[CONDITIONS].limits.shown())


async def patch_limits(request: web.Request) -> web.Response:
    """PATCH: change the limits that the body names; null is the default."""
    conditions = request.app[CONDITIONS]
    try:
        conditions.limits = conditions.limits.changed(await read_object(request))
    except LocalPlatformError as error:
        raise HttpProblem(400, error.message) from None
    return web.json_response(conditions.limits.shown())


# -- faults --------------------------------------------------------------------------------------


async def list_faults(request: web.Request) -> web.Response:
    """GET: list the faults that are set and have not come due."""
    resources_ = [
        {"resource": name, **_camel(asdict(fault))}
        for name, fault in request.app[CONDITIONS].faults().items()
    ]
    routes = [_camel(asdict(fault)) for fault in request.app[ROUTE_FAULTS].due]
    return web.json_response({"faults": [*resources_, *routes]})


async def post_fault(request: web.Request) -> web.Response:
    """POST: set one fault, of a resource (`resource`) or of a route (`method`, `path`)."""
    body = await read_object(request)
    if "resource" in body:
        return await _resource_fault(request, body)
    fault = _route_fault(body)
    due = request.app[ROUTE_FAULTS].due
    _check_room(len(due))
    due.append(fault)
    return web.json_response(_camel(asdict(fault)))


async def delete_faults(request: web.Request) -> web.Response:
    """DELETE[?resource=<name>]: remove the faults of a resource, or all faults there are."""
    conditions, wanted = request.app[CONDITIONS], request.query.get("resource")
    for name in conditions.faults():
        if wanted in (None, name):
            conditions.set_fault(name, None)
    if wanted is None:
        request.app[ROUTE_FAULTS].due.clear()
    return web.json_response({})


async def _resource_fault(request: web.Request, body: Mapping[str, object]) -> web.Response:
    _check_names(body, ("resource", "delayS", "pending", "fail", "killReplica"))
    name = text_field(body, "resource")
    kind, id_ = _parse_resource(name)
    delay = body.get("delayS")
    fault = Fault(
        delay_s=None if delay is None else _seconds("delayS", delay),
        pending=text_field(body, "pending", most=MAX_TEXT),
        fail=text_field(body, "fail", most=MAX_TEXT),
    )
    conditions, plane = request.app[CONDITIONS], request.app[CONTROL_PLANE]
    _check_room(len(conditions.faults()))
    if "killReplica" in body:
        if kind != "deployments":
            raise HttpProblem(400, "killReplica goes with a deployment")
        number = int_field(body, "killReplica", 0, 63, default=0)
        await plane.deployments.kill_replica(id_, number)
    running = plane.jobs if kind == "rlorTrainerJobs" else plane.deployments
    if fault.fail and running.lives(id_):
        await plane.finish(running.fail(id_, fault.fail))
        fault = replace(fault, fail="")
    conditions.set_fault(name, fault)
    return web.json_response({"resource": name, **_camel(asdict(fault))})


def _route_fault(body: Mapping[str, object]) -> RouteFault:
    _check_names(body, ("method", "path", "status", "times", "after", "retryAfterS"))
    method = text_field(body, "method", most=MAX_TEXT).upper() or hdrs.METH_GET
    path = text_field(body, "path", most=MAX_TEXT)
    if not path.startswith("/"):
        raise HttpProblem(400, "a fault needs a `resource`, or a `path` that starts with a slash")
    if method not in hdrs.METH_ALL:
        raise HttpProblem(400, f"method {method[:20]!r} is none of HTTP")
    after, retry = body.get("after", False), body.get("retryAfterS")
    if not isinstance(after, bool):
        raise HttpProblem(400, "after must be true or false")
    return RouteFault(
        method=method,
        path=path,
        status=int_field(body, "status", 400, 599, default=503),
        times=int_field(body, "times", 1, MAX_TIMES, default=1),
        after=after,
        retry_after_s=None if retry is None else _seconds("retryAfterS", retry),
    )


def _parse_resource(name: str) -> tuple[str, str]:
    """Return collection and id of a resource that may have faults."""
    parts = name.split("/")
    if len(parts) != 4 or parts[:2] != ["accounts", ACCOUNT] or parts[2] not in KINDS:
        allowed = " or ".join(f"accounts/{ACCOUNT}/{kind}/<id>" for kind in KINDS)
        raise HttpProblem(400, f"resource {name[:200]!r} must be {allowed}")
    return parts[2], resources.check_id(parts[3], "resource id")


def _check_names(body: Mapping[str, object], known: tuple[str, ...]) -> None:
    for name in body:
        if name not in known:
            raise HttpProblem(400, f"unknown field {name[:80]!r}; known: {', '.join(known)}")


def _check_room(used: int) -> None:
    if used >= MAX_FAULTS:
        raise HttpProblem(429, f"{used} faults are set already; DELETE {FAULTS} removes them")


def _seconds(name: str, value: object) -> float:
    try:
        return seconds(name, value)
    except LocalPlatformError as error:
        raise HttpProblem(400, error.message) from None


def _camel(fields: Mapping[str, object]) -> dict[str, object]:
    return {camel(name): value for name, value in fields.items()}
