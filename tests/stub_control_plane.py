"""A control plane in memory, on a thread of its own: states as scripted, and every request noted.

It trains nothing: a trainer of it is healthy, and opens sessions and makes models; a deployment
serves nothing. What was created, with what body, and what is left, is what tests read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

ACCOUNT = "accounts/me"
JOBS, DEPLOYMENTS = f"/v1/{ACCOUNT}/rlorTrainerJobs", f"/v1/{ACCOUNT}/deployments"
DONE = {JOBS: "JOB_STATE_RUNNING", DEPLOYMENTS: "READY"}


@dataclass
class StubControlPlane:
    """One account.

    Attributes:
        url: its base URL, while it runs.
        resources: what there is, by path: the rows as they are shown.
        states: what the next looks at a kind of resource show, instead of ready; the last stays.
            An entry is a state, or a state and its message.
        requests: every request, as (method, path, body).
        noted: set at each request.
        lose_answers: methods whose next answer is lost after the request took effect.
        slow: methods that are not answered before their event is set.
        resumed: paths of the jobs that were asked to resume.
        serving: whether completions are answered, with no text.
        deny: statuses for the next requests of a method and a path's beginning.
    """

    url: str = ""
    resources: dict[str, dict[str, Any]] = field(default_factory=dict)
    states: dict[str, list[Any]] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    noted: threading.Event = field(default_factory=threading.Event)
    lose_answers: list[str] = field(default_factory=list)
    deny: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    slow: dict[str, threading.Event] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)
    serving: bool = False

    def left(self) -> list[str]:
        """The resources that are there."""
        return sorted(self.resources)

    def put(self, kind: str, name: str, **fields: Any) -> dict[str, Any]:
        """A resource that somebody else made."""
        row = {"name": f"{kind[4:]}/{name}", "state": DONE[kind], **fields}
        self.resources[f"{kind}/{name}"] = row
        return row

    def sent(self, method: str, kind: str) -> list[Any]:
        """The bodies of the requests of a method below a path."""
        return [body for m, path, body in self.requests if m == method and path.startswith(kind)]

    async def until(self, seen: Callable[[], bool]) -> None:
        """Wait, on the client's loop, until the requests have brought something about."""
        while True:
            self.noted.clear()
            if seen():
                return
            await asyncio.to_thread(self.noted.wait)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        method, path = request.method, request.path
        self.requests.append((method, path, body))
        self.noted.set()
        for (denied, prefix), statuses in self.deny.items():
            if denied == method and path.startswith(prefix) and statuses:
                return web.json_response({"error": {"message": "denied"}}, status=statuses.pop(0))
        if method in self.slow:
            await asyncio.to_thread(self.slow[method].wait)
        answer = self.answer(request, method, path, body)
        if method in self.lose_answers:
            self.lose_answers.remove(method)
            assert request.transport is not None
            request.transport.close()
        return answer

    def answer(self, request: web.Request, method: str, path: str, body: Any) -> web.Response:
        if path == "/v1/accounts":
            return web.json_response({"accounts": [{"name": ACCOUNT}]})
        if path == "/inference/v1/completions":
            return web.json_response({"choices": []}, status=200 if self.serving else 503)
        if "/api/v1/" in path:
            return self.trainer(path.rsplit("/", 1)[-1])
        if path.endswith(":resume"):
            self.resumed.append(path.removesuffix(":resume"))
            return web.json_response({})
        kind = JOBS if path.startswith(JOBS) else DEPLOYMENTS
        if method == "POST":
            given = request.query.get("rlorTrainerJobId") or request.query["deploymentId"]
            if f"{kind}/{given}" in self.resources:
                return web.json_response({"error": {"message": "exists"}}, status=409)
            starting = "JOB_STATE_CREATING" if kind == JOBS else "CREATING"
            return web.json_response(self.put(kind, given, **{**body, "state": starting}))
        row = self.resources.get(path)
        if row is None:
            return web.json_response({"error": {"message": "not found"}}, status=404)
        if method == "DELETE":
            del self.resources[path]
        elif method == "PATCH":
            row.update(body)
        elif method == "GET" and (self.states.get(kind) or row["state"].endswith("CREATING")):
            scripted = self.states.get(kind) or [DONE[kind]]
            state = scripted.pop(0) if len(scripted) > 1 else scripted[0]
            state, message = state if isinstance(state, tuple) else (state, "")
            row |= {"state": state, "statusMessage": message}
        return web.json_response(row)

    def trainer(self, operation: str) -> web.Response:
        answers = {
            "healthz": {"status": "ok"},
            "create_session": {"session_id": "s1"},
            "session_heartbeat": {},
            "create_model": {"request_id": "r1"},
            "retrieve_future": {"model_id": "s1:train:0"},
        }
        return web.json_response(answers[operation])

    @contextmanager
    def running(self) -> Iterator[StubControlPlane]:
        """Serve on a loop in a thread, so that the test's loop has only the client's tasks."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        async def start() -> web.AppRunner:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self.handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return runner

        runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
        try:
            yield self
        finally:
            for gate in self.slow.values():
                gate.set()
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
