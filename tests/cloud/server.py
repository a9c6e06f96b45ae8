"""A cloud as its public contract has it, on a port of its own, with a script of faults and habits.

It knows the routes and fields that the official client uses, and nothing that only the platform of
this package says. What it is told to do wrong is a list of `Fault`; how it behaves when nothing is
wrong (how long a job takes to start, when a replica notices a load) is its `Habits`. It computes
nothing: a pass answers logprobs of -1, a completion is three tokens.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.cloud.completions import stream
from tests.cloud.replicas import Replica, Replicas

ACCOUNT = "accounts/acme"
JOB, DEPLOYMENT = f"{ACCOUNT}/rlorTrainerJobs/job-1", f"{ACCOUNT}/deployments/deployment-1"
OTHER_JOB = f"{ACCOUNT}/rlorTrainerJobs/other"
QUIET = ("telemetry", "heartbeat")
Answer = web.StreamResponse

_TRAINER = r"(?:/training/v1/rlorTrainerJobs/[^/]+/(?P<job>[^/]+))?/api/v1/"
_PASSES = ("forward", "forward_backward", "optim_step")
_SAVES = ("save_weights", "save_weights_for_sampler", "load_weights", "load_adapter")
_SUBMITS = (*_PASSES, *_SAVES, "create_model", "unload_model")
_ROUTES = [
    ("accounts", "GET", r"/v1/accounts"),
    ("get_shape", "GET", r"/v1/(?P<shape>accounts/[^/]+/trainingShapes/[^/]+)(/versions.*)?"),
    ("create_job", "POST", r"/v1/accounts/[^/]+/rlorTrainerJobs"),
    ("job_checkpoints", "GET", r"/v1/(?P<name>accounts/[^/]+/rlorTrainerJobs/[^/]+)/checkpoints"),
    ("resume_job", "POST", r"/v1/(?P<name>accounts/[^/]+/rlorTrainerJobs/[^/:]+):resume"),
    ("get_job", "GET", r"/v1/(?P<name>accounts/[^/]+/rlorTrainerJobs/[^/]+)"),
    ("delete_job", "DELETE", r"/v1/(?P<name>accounts/[^/]+/rlorTrainerJobs/[^/]+)"),
    ("create_deployment", "POST", r"/v1/accounts/[^/]+/deployments"),
    ("get_deployment", "GET", r"/v1/(?P<name>accounts/[^/]+/deployments/[^/]+)"),
    ("patch_deployment", "PATCH", r"/v1/(?P<name>accounts/[^/]+/deployments/[^/]+)"),
    ("delete_deployment", "DELETE", r"/v1/(?P<name>accounts/[^/]+/deployments/[^/]+)"),
    ("promote", "POST", r"/v1/accounts/[^/]+/checkpoints/(?P<checkpoint>[^/:]+):promote"),
    ("get_model", "GET", r"/v1/(?P<name>accounts/[^/]+/models/[^/]+)"),
    ("get_operation", "GET", r"/v1/(?P<name>accounts/[^/]+/operations/[^/]+)"),
    ("completions", "POST", r"/inference/v1/completions"),
    ("hot_load_post", "POST", r"/hot_load/v1/models/hot_load"),
    ("hot_load_get", "GET", r"/hot_load/v1/models/hot_load"),
    ("healthz", "GET", _TRAINER + "healthz"),
    ("create_session", "POST", _TRAINER + "create_session"),
    ("heartbeat", "POST", _TRAINER + "session_heartbeat"),
    ("telemetry", "POST", _TRAINER + "telemetry"),
    ("client_config", "POST", _TRAINER + "client/config"),
    ("get_info", "POST", _TRAINER + "get_info"),
    ("list_states", "GET", _TRAINER + "list_checkpoints"),
    ("retrieve_future", "POST", _TRAINER + "retrieve_future"),
    ("submit", "POST", _TRAINER + f"(?P<operation>{'|'.join(_SUBMITS)})"),
]
ROUTES = [(name, method, re.compile(path + "$")) for name, method, path in _ROUTES]

# Fields of a closed schema, for the habit that refuses others.
FIELDS = {
    "create_session": {"tags", "user_metadata", "sdk_version", "project_id", "type"},
    "create_model": {
        *("session_id", "model_seq_id", "base_model", "lora_config", "user_metadata"),
        *("projection_head_dim", "base_only", "type"),
    },
    "forward": {"forward_input", "model_id", "seq_id", "comms"},
    "forward_backward": {"forward_backward_input", "model_id", "seq_id", "comms"},
    "optim_step": {
        *("adam_params", "model_id", "seq_id", "type", "grad_accumulation_normalization"),
    },
    "save_weights": {"model_id", "path", "seq_id", "ttl_seconds", "overwrite", "type"},
    "load_weights": {
        *("model_id", "path", "seq_id", "optimizer", "weights_access_token", "type"),
    },
    "save_weights_for_sampler": {
        *("model_id", "path", "seq_id", "sampling_session_seq_id", "ttl_seconds"),
        *("user_metadata", "type", "checkpoint_type", "export_precision", "metadata"),
    },
    "load_adapter": {"adapter_path", "model_id", "seq_id"},
    "unload_model": {"model_id", "type"},
    "retrieve_future": {"request_id", "allow_metadata_only"},
    "hot_load_post": {"identity", "reset_prompt_cache", "incremental_snapshot_metadata"},
}


@dataclass(frozen=True)
class Fault:
    """What a route answers instead, and for how long.

    The route is one of `ROUTES`, an operation of the trainer, "trainer" for all that it serves, or
    "*" for all; heartbeats and telemetry only by their own names.
    It begins with the first request to the route after `skip` ones, and covers `times` requests, or
    what comes within `seconds` of its beginning, or, with neither, all. A `status` of 0 is a
    connection that ends without an answer; the answer comes `after_s` seconds later. With
    `carried_out` the server does what it was asked, and only its answer is replaced.
    """

    route: str
    status: int = 503
    times: int | None = None
    seconds: float | None = None
    skip: int = 0
    body: str = '{"error": {"message": "scripted"}}'
    headers: Mapping[str, str] = field(default_factory=dict)
    carried_out: bool = False
    after_s: float = 0.01


@dataclass(frozen=True)
class Habits:
    """How the cloud behaves when nothing is wrong; durations in seconds.

    `pass_s` is how long a forward_backward takes, `result_body_s` how long its result's body.
    """

    job_post_s: float = 0.1
    job_ready_s: float = 0.0
    job_pending_s: float = 0.0
    job_state: str = "JOB_STATE_RUNNING"
    deployment_ready_s: float = 0.0
    deployment_state: str = "READY"
    deployment_model: str | None = None
    serves_job: str = JOB
    checks_references: bool = True
    accepts_once_created_s: float = 0.0
    pass_s: float = 0.0
    poll_hold_s: float = 5.0
    poll_style: str = "408"
    result_body_s: float = 0.0
    closed: bool = False
    replicas: tuple[Replica, ...] = (Replica(),)
    slots: int | None = None
    service_s: float = 0.0
    reports_queue: bool = False
    retry_after: str | None = None
    sse: str = "plain"


class _FaultClock:
    """Which requests a fault covers."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self._seen = 0
        self._began: float | None = None
        self._met = 0

    def covers(self, now: float) -> bool:
        self._seen += 1
        if self._seen <= self.fault.skip:
            return False
        if self._began is None:
            self._began = now
        if self.fault.seconds is not None and now - self._began >= self.fault.seconds:
            return False
        if self.fault.times is not None and self._met >= self.fault.times:
            return False
        self._met += 1
        return True


@dataclass
class _Operation:
    """An accepted submit: when its result is there, and what it is."""

    model: str
    seq: int | None
    ready: float
    result: dict[str, Any]
    slow: bool


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


def _route(request: web.Request) -> tuple[str, dict[str, Any]]:
    """Name of a request's route and the parts of its path; "unknown" for another path."""
    path = request.path.removeprefix("/moved")
    for name, method, pattern in ROUTES:
        found = pattern.match(path)
        if found and method == request.method:
            return name, found.groupdict()
    return "unknown", {}


class Cloud:
    """One scenario's server: its resources, its faults, and the requests that it saw."""

    def __init__(self, habits: Habits, faults: tuple[Fault, ...] = ()) -> None:
        self.habits = habits
        self.requests: Counter[str] = Counter()
        self.seen: list[dict[str, Any]] = []
        self.keep_bodies = False
        now = time.monotonic()
        self.jobs = {JOB: now - 1e6, OTHER_JOB: now - 1e6}
        self.resumed = False
        self.deployments: dict[str, tuple[float, dict[str, Any]]] = {
            DEPLOYMENT: (now - 1e6, {"hotLoadTrainerJob": habits.serves_job}),
        }
        if habits.deployment_model is not None:
            self.deployments[DEPLOYMENT][1]["baseModel"] = habits.deployment_model
        self.patched: float | None = None
        self.replicas = Replicas(habits.replicas)
        self.applied = 0
        self.stale = 0
        self._at_once = 0
        self._faults = [_FaultClock(fault) for fault in faults]
        self._operations: dict[str, _Operation] = {}
        self._submitted: dict[tuple[Any, ...], str] = {}
        self._arrived: dict[str, set[int]] = {}
        self._states: list[str] = []
        self._saved: dict[str, list[str]] = {}
        self._ids = itertools.count(1)
        self._began: float | None = None

    @property
    def left(self) -> int:
        """How many of the client's own jobs and deployments are there."""
        return len({*self.jobs, *self.deployments} - {JOB, OTHER_JOB, DEPLOYMENT})

    # Routing, faults.

    async def handle(self, request: web.Request) -> Answer:
        """One request: noted, spoiled where the script says so, answered."""
        name, parts = _route(request)
        route = parts.get("operation") or name
        body = await request.read()
        self.requests[route] += 1
        self._began = self._began or time.monotonic()
        if self.keep_bodies:
            self._note(route, request, body)
        fault = self._fault(route, request)
        if fault is not None:
            if fault.carried_out:
                await self._answer(name, parts, request, body)
            await asyncio.sleep(fault.after_s)
            return self._spoiled(fault, request)
        try:
            return await self._answer(name, parts, request, body)
        except ConnectionError:
            return refusal(499, "the client left in the middle of its answer")

    def _note(self, route: str, request: web.Request, body: bytes) -> None:
        headers = {key.lower(): value for key, value in request.headers.items()}
        self.seen.append(
            {
                "route": route,
                "method": request.method,
                "path": request.path,
                "query": dict(request.query),
                "headers": headers,
                "body": json.loads(body) if body else None,
            }
        )

    def _fault(self, route: str, request: web.Request) -> Fault | None:
        if request.path.startswith("/moved"):
            return None
        now = time.monotonic()
        for clock in self._faults:
            wanted = clock.fault.route
            group = (
                wanted == "*" or (wanted == "trainer" and "/api/v1/" in request.path)
            ) and route not in QUIET
            matches = route == wanted or group
            if matches and clock.covers(now):
                return clock.fault
        return None

    def _spoiled(self, fault: Fault, request: web.Request) -> Answer:
        if fault.status == 0:
            assert request.transport is not None
            request.transport.abort()
        headers = {
            key: value.replace("{path}", request.path_qs) for key, value in fault.headers.items()
        }
        kind = "application/json" if fault.body.startswith("{") else "text/html"
        answer = web.Response(status=fault.status or 500, headers=headers)
        if fault.body:
            answer.body = fault.body.encode()
            answer.content_type = kind
        return answer

    async def _answer(
        self, name: str, parts: dict[str, Any], request: web.Request, raw: bytes
    ) -> Answer:
        if name == "unknown":
            return refusal(404, f"no route {request.method} {request.path}")
        if raw and request.content_type != "application/json":
            return refusal(415, "JSON alone")
        body = json.loads(raw) if raw else {}
        known = FIELDS.get(parts.get("operation") or name)
        if self.habits.closed and known is not None and (more := sorted(set(body) - known)):
            return refusal(400, f"Extra inputs are not permitted, field: {more[0]!r}")
        if "operation" in parts:
            return self._submit(parts["operation"], body)
        handler = getattr(self, f"_{name}")
        answer = handler(request, parts, body)
        if asyncio.iscoroutine(answer):
            answer = await answer
        return answer if isinstance(answer, Answer) else web.json_response(answer)

    # The control plane.

    def _accounts(self, *_: Any) -> Any:
        return {"accounts": [{"name": ACCOUNT}]}

    def _get_shape(self, request: web.Request, parts: dict[str, Any], _: Any) -> Any:
        version = {
            "name": f"{parts['shape']}/versions/1",
            "snapshot": {
                "trainerImageTag": "1",
                "maxSupportedContextLength": 4096,
                "nodeCount": 1,
                "deploymentShapeVersion": f"{ACCOUNT}/deploymentShapes/small/versions/1",
                "deploymentImageTag": "1",
                "acceleratorType": "NVIDIA_H200_141GB",
                "acceleratorCount": 1,
                "trainerMode": "LORA_TRAINER" if "lora" in parts["shape"] else "POLICY_TRAINER",
            },
        }
        if request.path.endswith("/versions"):
            return {"trainingShapeVersions": [version]}
        return version

    async def _create_job(self, request: web.Request, _: Any, body: Any) -> Any:
        await asyncio.sleep(self.habits.job_post_s)
        name = f"{ACCOUNT}/rlorTrainerJobs/{request.query['rlorTrainerJobId']}"
        if name in self.jobs:
            return refusal(409, "a job of this id exists")
        self.jobs[name] = time.monotonic()
        return self._job(name) | {"trainingConfig": body.get("trainingConfig", {})}

    def _job(self, name: str) -> dict[str, Any]:
        age = time.monotonic() - self.jobs[name]
        state = self.habits.job_state if name == JOB and not self.resumed else "JOB_STATE_RUNNING"
        if age < self.habits.job_pending_s:
            state = "JOB_STATE_PENDING"
        elif age < self.habits.job_pending_s + self.habits.job_ready_s:
            state = "JOB_STATE_CREATING"
        config = {"baseModel": "accounts/fireworks/models/any", "maxContextLength": 4096}
        return {"name": name, "state": state, "trainingConfig": config}

    def _get_job(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        name = parts["name"]
        return self._job(name) if name in self.jobs else refusal(404, "no such job")

    def _resume_job(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        if parts["name"] == JOB and self.resumed:
            return refusal(409, "the job is JOB_STATE_CREATING")
        self.resumed = True
        self.jobs[parts["name"]] = time.monotonic()
        return self._job(parts["name"])

    def _delete_job(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        known = self.jobs.pop(parts["name"], None)
        return {} if known is not None else refusal(404, "no such job")

    def _job_checkpoints(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        rows = [
            {"name": f"{parts['name']}/checkpoints/{name}", "promotable": True}
            for name in self._states
        ]
        return {"checkpoints": rows}

    def _create_deployment(self, request: web.Request, _: Any, body: Any) -> Any:
        name = f"{ACCOUNT}/deployments/{request.query['deploymentId']}"
        if name in self.deployments:
            return refusal(409, "a deployment of this id exists")
        trainer = body.get("hotLoadTrainerJob")
        if self.habits.checks_references and trainer is not None:
            made = self.jobs.get(trainer)
            if made is None:
                return refusal(400, "hotLoadTrainerJob: no such trainer job")
            if time.monotonic() - made < self.habits.accepts_once_created_s:
                return refusal(503, "the trainer job is being created")
        self.deployments[name] = (time.monotonic(), body)
        return self._deployment(name)

    def _deployment(self, name: str) -> dict[str, Any]:
        made, body = self.deployments[name]
        state = self.habits.deployment_state if name == DEPLOYMENT else "READY"
        if time.monotonic() - max(made, self._began or 0.0) > self.habits.deployment_ready_s > 0:
            state = "READY"
        elif name != DEPLOYMENT and self.habits.deployment_ready_s:
            state = "CREATING"
        kept = ("hotLoadTrainerJob", "hotLoadTransitionType", "deploymentShape", "baseModel")
        return {"name": name, "state": state} | {key: body[key] for key in kept if key in body}

    def _get_deployment(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        name = parts["name"]
        known = name in self.deployments
        return self._deployment(name) if known else refusal(404, "no such deployment")

    def _patch_deployment(self, _: Any, parts: dict[str, Any], body: Any) -> Any:
        name = parts["name"]
        if name not in self.deployments:
            return refusal(404, "no such deployment")
        if self._deployment(name)["state"] == "UPDATING":
            return refusal(400, "the deployment is UPDATING")
        made, known = self.deployments[name]
        self.deployments[name] = (made, known | body)
        return self._deployment(name)

    def _delete_deployment(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        known = self.deployments.pop(parts["name"], None)
        return {} if known is not None else refusal(404, "no such deployment")

    def _promote(self, _: Any, parts: dict[str, Any], body: Any) -> Any:
        if parts["checkpoint"] in self._saved:
            return refusal(409, "a model of this name exists")
        self._saved[parts["checkpoint"]] = []
        if body.get("async_promotion"):
            return {"operation": {"name": f"{ACCOUNT}/operations/1"}}
        return {"model": {"state": "READY", "kind": "HF_BASE_MODEL"}}

    def _get_model(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        return {"name": parts["name"], "state": "READY", "kind": "HF_BASE_MODEL"}

    def _get_operation(self, _: Any, parts: dict[str, Any], __: Any) -> Any:
        model = {"name": f"{ACCOUNT}/models/promoted", "state": "READY", "kind": "HF_BASE_MODEL"}
        return {"name": parts["name"], "done": True, "response": {"model": model}}

    # The trainer.

    def _healthz(self, *_: Any) -> Any:
        return {"status": "ok"}

    def _client_config(self, *_: Any) -> Any:
        return {}

    def _create_session(self, *_: Any) -> Any:
        return {"session_id": f"ts-{next(self._ids):032x}", "type": "create_session"}

    def _heartbeat(self, *_: Any) -> Any:
        return {"type": "session_heartbeat"}

    def _telemetry(self, *_: Any) -> Any:
        return {"status": "accepted"}

    def _get_info(self, _: Any, __: Any, body: Any) -> Any:
        return {"model_id": body["model_id"], "model_data": {"model_name": "any"}}

    def _list_states(self, *_: Any) -> Any:
        return {"checkpoints": list(self._states)}

    def _submit(self, operation: str, body: dict[str, Any]) -> Answer:
        model = body.get("model_id", "")
        seq = body.get("seq_id")
        place: tuple[Any, ...] = (model, seq)
        if operation == "create_model":
            place = (body["session_id"], body["model_seq_id"])
            model = f"{place[0]}:train:{place[1]}"
            seq = None
        elif seq is None:
            place = (model, operation)
        known = self._submitted.get(place)
        if known is None:
            known = self._submitted[place] = f"request-{next(self._ids)}"
            result = self._result(operation, model, body)
            slow = operation == "forward_backward"
            ready = time.monotonic() + (self.habits.pass_s if slow else 0.0)
            self._operations[known] = _Operation(model, seq, ready, result, slow)
            if seq is not None:
                self._arrived.setdefault(model, set()).add(seq)
        return web.json_response({"request_id": known, "model_id": model})

    def _result(self, operation: str, model: str, body: dict[str, Any]) -> dict[str, Any]:
        if operation in ("forward", "forward_backward"):
            data = body[f"{operation}_input"]["data"]
            counts = [len(row["loss_fn_inputs"]["target_tokens"]["data"]) for row in data]
            rows = [
                {"logprobs": {"data": [-1.0] * n, "dtype": "float32", "shape": [n]}} for n in counts
            ]
            metrics = {"loss:sum": float(sum(counts))}
            return {
                "loss_fn_output_type": "ArrayRecord",
                "loss_fn_outputs": rows,
                "metrics": metrics,
            }
        if operation == "optim_step":
            self.applied += 1
            return {"metrics": {"grad_norm": 1.0}}
        if operation == "save_weights":
            self._states.append(body["path"])
            return {"path": body["path"], "type": "save_weights"}
        if operation == "save_weights_for_sampler":
            return {"path": body["path"], "type": "save_weights_for_sampler"}
        return {"model_id": model, "type": operation}

    async def _retrieve_future(self, request: web.Request, _: Any, body: Any) -> Any:
        operation = self._operations.get(body["request_id"])
        if operation is None:
            return refusal(404, "no such request")
        until = time.monotonic() + self.habits.poll_hold_s
        while not self._ready(operation):
            left = until - time.monotonic()
            if left <= 0:
                return self._not_yet(body["request_id"])
            ahead = operation.ready - time.monotonic()
            await asyncio.sleep(min(left, ahead if ahead > 0 else 0.02))
        if operation.slow and self.habits.result_body_s:
            return await self._slowly(request, operation.result)
        return operation.result

    async def _slowly(self, request: web.Request, result: Any) -> Answer:
        """A result whose body comes in four parts."""
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        body = json.dumps(result).encode()
        for at in range(4):
            await asyncio.sleep(self.habits.result_body_s / 4)
            await answer.write(body[at * len(body) // 4 : (at + 1) * len(body) // 4])
        return answer

    def _ready(self, operation: _Operation) -> bool:
        """The result is there when its time has come, and all before it have arrived."""
        if time.monotonic() < operation.ready:
            return False
        arrived = self._arrived.get(operation.model, set())
        return operation.seq is None or all(n in arrived for n in range(1, operation.seq))

    def _not_yet(self, request_id: str) -> Any:
        if self.habits.poll_style == "408":
            return web.json_response({"queue_state": "active"}, status=408)
        return {"type": "try_again", "request_id": request_id, "queue_state": "active"}

    # Serving.

    def _hot_load_post(self, _: Any, __: Any, body: Any) -> Any:
        self.replicas.ask(body, time.monotonic())
        return {}

    def _hot_load_get(self, *_: Any) -> Any:
        return {"replicas": self.replicas.rows(time.monotonic())}

    async def _completions(self, request: web.Request, _: Any, body: Any) -> Any:
        limit = self.habits.slots
        if limit is not None and self._at_once >= limit:
            answer = refusal(429, "too many requests")
            if self.habits.retry_after is not None:
                answer.headers["Retry-After"] = self.habits.retry_after
            return answer
        self._at_once += 1
        self.stale += self.replicas.loading(time.monotonic())
        try:
            await asyncio.sleep(self.habits.service_s)
            attempt = self.requests["completions"]
            return await stream(request, body, self.habits.sse, attempt, self.habits.reports_queue)
        finally:
            self._at_once -= 1


@asynccontextmanager
async def serving(cloud: Cloud) -> AsyncIterator[str]:
    """The URL at which a cloud answers."""
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{tail:.*}", cloud.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
