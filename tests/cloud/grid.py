"""Each fault on each route: a row of the one for every row of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.cloud.scenario import Scenario
from tests.cloud.server import OTHER_JOB, Fault, Habits

PAGE = "<html><body>a page of the proxy</body></html>"


@dataclass(frozen=True)
class Route:
    """A program that comes to a route, after so many requests that are left alone."""

    name: str
    program: str
    skip: int = 0
    habits: Habits = field(default_factory=Habits)
    options: Mapping[str, Any] = field(default_factory=dict)


ROUTES = (
    Route("accounts", "managed"),
    Route("get_shape", "managed"),
    Route("create_job", "managed"),
    Route("get_job", "managed", habits=Habits(job_ready_s=0.3)),
    Route("healthz", "managed"),
    Route("create_deployment", "managed"),
    Route("get_deployment", "managed", skip=1, habits=Habits(deployment_ready_s=0.3)),
    Route("delete_deployment", "managed"),
    Route("delete_job", "managed"),
    Route("patch_deployment", "hot_load", habits=Habits(serves_job=OTHER_JOB)),
    Route("resume_job", "train", habits=Habits(job_state="JOB_STATE_FAILED")),
    Route("promote", "promote"),
    Route("get_operation", "promote"),
    Route("job_checkpoints", "promote"),
    Route("create_session", "train"),
    Route("create_model", "train"),
    Route("forward", "train"),
    Route("forward_backward", "train"),
    Route("optim_step", "train"),
    Route("save_weights", "train"),
    Route("save_weights_for_sampler", "train"),
    Route("load_weights", "state"),
    Route("list_states", "state"),
    Route("unload_model", "state"),
    Route("heartbeat", "train"),
    # The first poll is create_model's, the first look at the replicas is of the client's creation.
    Route("retrieve_future", "train", skip=1),
    Route("hot_load_get", "hot_load", skip=1),
    Route("hot_load_post", "hot_load"),
    Route("completions", "sample"),
)

FAULTS = {
    "400 once": Fault("", 400, times=1),
    "400 without a body": Fault("", 400, times=1, body=""),
    "401 once": Fault("", 401, times=1),
    "402 twice": Fault("", 402, times=2),
    "403 once": Fault("", 403, times=1),
    "404 once": Fault("", 404, times=1),
    "408 twice": Fault("", 408, times=2),
    "409 once": Fault("", 409, times=1),
    "425 once": Fault("", 425, times=1),
    "429 twice": Fault("", 429, times=2),
    "429 with Retry-After": Fault("", 429, times=2, headers={"Retry-After": "1"}),
    "500 twice": Fault("", 500, times=2),
    "502 page twice": Fault("", 502, times=2, body=PAGE),
    "503 twice": Fault("", 503, times=2),
    "504 once": Fault("", 504, times=1),
    "cut once": Fault("", 0, times=1),
    "carried out, 503": Fault("", 503, times=1, carried_out=True),
    "carried out, cut": Fault("", 0, times=1, carried_out=True),
    "a page once": Fault("", 200, times=1, body=PAGE),
    "moved": Fault("", 307, headers={"Location": "/moved{path}"}, body=""),
}
_READS = ("accounts", "job_checkpoints", "list_states", "healthz")


def _reads(route: Route) -> bool:
    return route.name.startswith("get_") or route.name.endswith("_get") or route.name in _READS


GRID: tuple[Scenario, ...] = tuple(
    Scenario(
        f"{route.name}: {what}",
        route.program,
        route.habits,
        (replace(fault, route=route.name, skip=route.skip),),
        route.options,
        limit_s=30.0,
    )
    for route in ROUTES
    for what, fault in FAULTS.items()
    # Of a request that only reads, a lost answer is the same as a cut.
    if not (fault.carried_out and _reads(route))
)
