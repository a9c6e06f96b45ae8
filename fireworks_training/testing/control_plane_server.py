"""A control plane in memory: resources in scripted states, and every request noted.

It starts no machines: a resource that is created becomes ready at the next look, unless a script
says otherwise. Requests to a trainer and to a deployment go to the servers that it was given.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web

from fireworks_training.testing.completions_server import CompletionsServer
from fireworks_training.testing.loopback_server import LoopbackServer
from fireworks_training.testing.trainer_server import TrainerServer

ACCOUNT = "accounts/me"
JOBS = f"/v1/{ACCOUNT}/rlorTrainerJobs"
"""Path of the trainer jobs; one kind of resource."""

DEPLOYMENTS = f"/v1/{ACCOUNT}/deployments"
"""Path of the deployments; the other kind."""

READY = {JOBS: "JOB_STATE_RUNNING", DEPLOYMENTS: "READY"}
HOT_LOAD = "/hot_load/v1/models/hot_load"

Row = dict[str, Any]
State = str | tuple[str, str]
"""A state, or a state and the message that goes with it."""


@dataclass(eq=False)
class ControlPlaneServer(LoopbackServer):
    """Answers for the trainer jobs and deployments of one account.

    Attributes:
        trainer: answers the requests to any trainer job; None: a job opens sessions and makes
            models, and nothing else.
        completions: answers the completions requests to any deployment; None: see `serving`.
        serving: whether completions are answered, with no text, where there is no server of them;
            False: with status 503.
        replicas: replicas of a deployment; each serves a snapshot as soon as it is hot-loaded.
        loads: identities of the snapshots that were hot-loaded, in order; the last one is live.
        resources: the rows of what there is, by path.
        states: states that the next looks at a kind of resource show; the last one stays.
        requests: method, path and JSON body of every request, those of `trainer` and
            `completions` aside.
        resumed: paths of the jobs that were asked to resume.
        lost_answers: methods whose next answer is lost after the request took effect: the
            connection is cut.
        slow: methods that are not answered before their event is set; leaving the server sets it.
        deny: HTTP statuses for the next requests of a method below a path.
    """

    trainer: TrainerServer | None = None
    completions: CompletionsServer | None = None
    serving: bool = False
    replicas: int = 1
    loads: list[str] = field(default_factory=list[str])
    resources: dict[str, Row] = field(default_factory=dict[str, Row])
    states: dict[str, list[State]] = field(default_factory=dict[str, list[State]])
    requests: list[tuple[str, str, Any]] = field(default_factory=list[tuple[str, str, Any]])
    resumed: list[str] = field(default_factory=list[str])
    lost_answers: list[str] = field(default_factory=list[str])
    slow: dict[str, threading.Event] = field(default_factory=dict[str, threading.Event])
    deny: dict[tuple[str, str], list[int]] = field(default_factory=dict[tuple[str, str], list[int]])
    _noted: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def left(self) -> list[str]:
        """List the paths of the resources that are there."""
        return sorted(self.resources)

    def put(self, kind: str, name: str, **fields: Any) -> Row:
        """Add a resource that somebody else made, ready unless its fields say otherwise.

        Args:
            kind: `JOBS` or `DEPLOYMENTS`.
            name: its id.
            **fields: of its row, as the control plane shows it.
        """
        row = {"name": f"{kind[4:]}/{name}", "state": READY[kind], **fields}
        self.resources[f"{kind}/{name}"] = row
        return row

    def sent(self, method: str, kind: str) -> list[Any]:
        """List the bodies of the requests of a method below a path."""
        return [body for m, path, body in self.requests if m == method and path.startswith(kind)]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until requests have brought something about; on any loop."""
        while True:
            self._noted.clear()
            if holds():
                return
            await asyncio.to_thread(self._noted.wait)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for answered in self.slow.values():
            answered.set()
        await super().__aexit__(kind, error, traceback)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request; it takes effect also if its client goes away meanwhile."""
        if self.trainer is not None and "/api/v1/" in request.path:
            return await self.trainer.handle(request)
        if self.completions is not None and request.path.startswith("/inference/"):
            return await self.completions.handle(request)
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.path, body))
        self._noted.set()
        return await asyncio.shield(self._carry_out(request, body))

    async def _carry_out(self, request: web.Request, body: Any) -> web.Response:
        method, path = request.method, request.path
        for (denied, prefix), statuses in self.deny.items():
            if denied == method and path.startswith(prefix) and statuses:
                return _problem("denied", statuses.pop(0))
        if method in self.slow:
            await asyncio.to_thread(self.slow[method].wait)
        answer = self._answer(request, method, path, body)
        if method in self.lost_answers and request.transport is not None:
            self.lost_answers.remove(method)
            request.transport.close()
        return answer

    def _answer(self, request: web.Request, method: str, path: str, body: Any) -> web.Response:
        if path == "/v1/accounts":
            return web.json_response({"accounts": [{"name": ACCOUNT}]})
        if path == HOT_LOAD:
            return self._hot_load(method, body)
        if path.startswith("/inference/"):
            return web.json_response({"choices": []}, status=200 if self.serving else 503)
        if "/api/v1/" in path:
            return web.json_response(BARE_TRAINER[path.rpartition("/")[-1]])
        if path.endswith(":resume"):
            self.resumed.append(path.removesuffix(":resume"))
            return web.json_response({})
        kind = JOBS if path.startswith(JOBS) else DEPLOYMENTS
        if method == "POST":
            given = request.query.get("rlorTrainerJobId") or request.query["deploymentId"]
            if f"{kind}/{given}" in self.resources:
                return _problem("exists", 409)
            starting = "JOB_STATE_CREATING" if kind == JOBS else "CREATING"
            return web.json_response(self.put(kind, given, **{**body, "state": starting}))
        row = self.resources.get(path)
        if row is None:
            return _problem("not found", 404)
        if method == "DELETE":
            del self.resources[path]
        elif method == "PATCH":
            row.update(body)
        elif method == "GET" and (self.states.get(kind) or row["state"].endswith("CREATING")):
            scripted = self.states.get(kind) or [READY[kind]]
            state = scripted.pop(0) if len(scripted) > 1 else scripted[0]
            state, message = state if isinstance(state, tuple) else (state, "")
            row |= {"state": state, "statusMessage": message}
        return web.json_response(row)

    def _hot_load(self, method: str, body: Any) -> web.Response:
        if method == "POST":
            self.loads.append(body["identity"])
            if self.completions is not None:
                self.completions.snapshot = body["identity"]
            return web.json_response({})
        live = self.loads[-1] if self.loads else None
        replica: Row = {"current_snapshot_identity": live, "readiness": True, "loading_state": {}}
        return web.json_response({"replicas": [replica] * self.replicas})


BARE_TRAINER = {
    "healthz": {"status": "ok"},
    "create_session": {"session_id": "s1"},
    "session_heartbeat": {},
    "create_model": {"request_id": "r1"},
    "retrieve_future": {"model_id": "s1:train:0"},
}
"""Answers of a trainer without a `TrainerServer`, by route."""


def _problem(message: str, status: int) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)
