"""A trainer in memory: takes requests in any order, executes them in call order, and can misbehave.

It knows no mathematics: a gradient is a count of datums, every logprob is -1.0. What was applied,
in which order, is what tests read.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from fireworks_training._wire.training import json_passes, protobuf
from fireworks_training._wire.training.compression import decompress
from fireworks_training.testing.loopback_server import LoopbackServer

BeforeSubmit = Callable[[str, dict[str, Any]], Awaitable[web.StreamResponse | None]]
"""Takes the operation and its JSON body; answers in the server's place, or returns None."""

BeforePoll = Callable[[str], Awaitable[web.StreamResponse | None]]
"""Takes the id of the request that is asked for ("batch": several); answers or returns None."""

OPERATIONS = frozenset(
    {
        "forward",
        "forward_backward",
        "backward",
        "optim_step",
        "save_weights",
        "load_weights",
        "load_adapter",
        "save_weights_for_sampler",
        "unload_model",
        "discard_gradients",
    }
)
CHANGES_MODEL = frozenset({"forward_backward", "backward", "optim_step", "load_weights"})


@dataclass(eq=False)
class TrainerServer(LoopbackServer):
    """Answers the data plane of one trainer job, with one model and one queue of operations.

    Operations are numbered from 1 (`seq_id`) and executed in that order.

    Attributes:
        applied: operations that were executed without a failure: (operation, seq_id), in order.
        steps: for each optim_step, the number of datums whose gradients it applied.
        submitted: operations in the order their requests arrived: (operation, seq_id).
        bodies: bodies of the executed operations by seq_id, as JSON has them.
        models: numbers of the models that were asked for, in order.
        retrieved: ids of the requests whose results the client said it has.
        counts: requests by route, such as "retrieve_future".
        encodings: content encoding of each protobuf pass.
        executing: False holds all operations back from the next one on.
        failing: seq_ids of operations whose execution fails.
        category: whose fault their failures are: "user", or "server".
        lost_answers: seq_ids whose first submit is taken, and the connection then cut.
        before_submit, before_poll: called with each submit and each poll; may answer in the
            server's place.
        lost: whether the worker has died; see `die`.
        session_ended: whether heartbeats are answered with 410.
        step_protocol: whether it refuses the rest of a step whose gradients failed, and says so.
        dialects: encodings of passes that it says it takes; it understands "json" and "protobuf".
        supports_backward: whether it takes a backward by an earlier forward.
        forgotten_forwards: seq_ids of forwards whose backwards it refuses with 404.
        capabilities: further fields of its answer to create_model.
        client_config: answer to client/config; None: it has no such route.
        client_config_fails: whether client/config is answered with status 500.
        batch_polls: whether it says that it takes polls for several requests.
        inline_bytes: largest result that a batch poll holds; None refuses batch polls after all.
        unreported: ids of requests whose end no batch poll reports.
    """

    applied: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]], init=False)
    steps: list[int] = field(default_factory=list[int], init=False)
    submitted: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]], init=False)
    bodies: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]], init=False)
    models: list[int] = field(default_factory=list[int], init=False)
    retrieved: list[str] = field(default_factory=list[str], init=False)
    counts: Counter[str] = field(default_factory=Counter[str], init=False)
    encodings: list[str | None] = field(default_factory=list[str | None], init=False)
    executing: bool = True
    failing: set[int] = field(default_factory=set[int])
    category: str = "user"
    lost_answers: set[int] = field(default_factory=set[int])
    before_submit: BeforeSubmit | None = None
    before_poll: BeforePoll | None = None
    lost: bool = False
    session_ended: bool = False
    step_protocol: bool = True
    dialects: list[str] = field(default_factory=list[str])
    supports_backward: bool = False
    forgotten_forwards: set[int] = field(default_factory=set[int])
    capabilities: Mapping[str, Any] = field(default_factory=dict[str, Any])
    client_config: Mapping[str, Any] | None = None
    client_config_fails: bool = False
    batch_polls: bool = False
    inline_bytes: int | None = 1 << 20
    unreported: set[str] = field(default_factory=set[str])
    _waiting: dict[int, tuple[str, dict[str, Any]]] = field(
        default_factory=dict[int, tuple[str, dict[str, Any]]], init=False, repr=False
    )
    _results: dict[str, dict[str, Any]] = field(
        default_factory=dict[str, dict[str, Any]], init=False, repr=False
    )
    _next: int = field(default=1, init=False, repr=False)
    _held: int = field(default=0, init=False, repr=False)
    _failed: bool = field(default=False, init=False, repr=False)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition, init=False, repr=False)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request below `/api/v1/`, wherever that stands in the path."""
        route = request.path.rpartition("/api/v1/")[2]
        self.counts[route] += 1
        routes = {
            "healthz": self._health,
            "client/config": self._config,
            "create_session": self._session,
            "session_heartbeat": self._beat,
            "create_model": self._create,
            "retrieve_future": self._retrieve,
            "retrieve_futures": self._retrieve_many,
            **dict.fromkeys(OPERATIONS, self._submit),
        }
        if route not in routes:
            return web.json_response({"error": "no such route"}, status=404)
        return await routes[route](request)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that a submit brings about; on the loop that serves."""
        async with self._changed:
            await self._changed.wait_for(holds)

    async def die(self) -> None:
        """Lose the worker: submits and polls are answered with 410 from now on."""
        async with self._changed:
            self.lost = True
            self._changed.notify_all()

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _config(self, request: web.Request) -> web.Response:
        if self.client_config_fails:
            return web.Response(status=500)
        if self.client_config is None:
            return web.json_response({"error": "no such route"}, status=404)
        return web.json_response(self.client_config)

    async def _session(self, request: web.Request) -> web.Response:
        return web.json_response({"session_id": "session-1"})

    async def _beat(self, request: web.Request) -> web.Response:
        async with self._changed:
            self._changed.notify_all()
        if self.session_ended:
            gone = {"error": "the session has ended", "error_class": "SessionGone"}
            return web.json_response(gone, status=410)
        return web.json_response({})

    async def _create(self, request: web.Request) -> web.Response:
        self.models.append((await request.json())["model_seq_id"])
        result: dict[str, Any] = {
            "model_id": "model-1",
            "comms": "v2",
            "wire": self.dialects,
            "supports_backward": self.supports_backward,
            **self.capabilities,
        }
        if self.step_protocol:
            result["step_protocol"] = 1
        if self.batch_polls:
            result["retrieve_futures"] = 1
        self._results["create"] = result
        return web.json_response({"request_id": "create"})

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rsplit("/", 1)[-1]
        if request.content_type == protobuf.CONTENT_TYPE:
            raw, encoding = await request.read(), request.headers.get("Content-Encoding")
            self.encodings.append(encoding)
            if encoding is not None:
                raw = decompress(raw, limit=1 << 30)
            path, body = _from_protobuf(path, raw)
        else:
            body = await request.json(loads=json.loads)
        seq_id = body["seq_id"]
        self.submitted.append((path, seq_id))
        async with self._changed:
            self._changed.notify_all()
        if self.lost:
            return _died()
        if self.before_submit is not None:
            answer = await self.before_submit(path, body)
            if answer is not None:
                return answer
        if path == "backward" and body["forward_seq_id"] in self.forgotten_forwards:
            return web.json_response({"error": "that forward is gone"}, status=404)
        request_id = f"r{seq_id}"
        if request_id not in self._results and seq_id not in self._waiting:
            self._waiting[seq_id] = (path, body)
            async with self._changed:
                self._execute()
                self._changed.notify_all()
        if path == "forward_backward" and not body["forward_backward_input"]["data"]:
            return web.json_response({"error": "no datums"}, status=400)
        if seq_id in self.lost_answers:
            self.lost_answers.discard(seq_id)
            if request.transport is not None:
                request.transport.close()
        return web.json_response({"request_id": request_id})

    def _execute(self) -> None:
        """Execute the operations whose turn it is, as far as their requests have arrived."""
        while self.executing and self._next in self._waiting:
            seq_id = self._next
            path, body = self._waiting.pop(seq_id)
            self._results[f"r{seq_id}"] = self._one(path, body, seq_id)
            self._next += 1

    def _one(self, path: str, body: dict[str, Any], seq_id: int) -> dict[str, Any]:
        """Execute one operation: its result, or why it failed, as JSON has it."""
        self.bodies[seq_id] = body
        if path == "discard_gradients":
            self._held, self._failed = 0, False
            self.applied.append((path, seq_id))
            return {"type": path}
        if path == "load_weights":
            self._held, self._failed = 0, False
        if self.step_protocol and self._failed and path in CHANGES_MODEL:
            self._failed = path != "optim_step"
            return {
                "error": "its step failed",
                "category": "user",
                "error_class": "PrecedingOperationFailed",
            }
        empty = path == "forward_backward" and not body["forward_backward_input"]["data"]
        if seq_id in self.failing or empty:
            if path in CHANGES_MODEL and self.step_protocol:
                self._held, self._failed = 0, path != "optim_step"
            return {"error": "scripted failure", "category": self.category}
        self.applied.append((path, seq_id))
        if path in ("forward", "forward_backward"):
            data = (body.get("forward_input") or body["forward_backward_input"])["data"]
            self._held += len(data) if path == "forward_backward" else 0
            return _pass_result([{"logprobs": _logprobs(datum)} for datum in data], 1.0)
        if path == "backward":
            self._held += len(body["gradients"])
            return _pass_result([{} for _ in body["gradients"]], 2.0)
        if path == "optim_step":
            self.steps.append(self._held)
            self._held = 0
            return {"metrics": {"grad_norm": 1.0}}
        return {"path": body.get("path", ""), "type": path}

    async def _retrieve(self, request: web.Request) -> web.StreamResponse:
        request_id = (await request.json())["request_id"]
        if self.before_poll is not None:
            answer = await self.before_poll(request_id)
            if answer is not None:
                return answer
        async with self._changed:
            while request_id not in self._results and not self.lost:
                await self._changed.wait()
        if self.lost:
            return _died()
        content, content_type = self._encoded(request_id)
        return web.Response(body=content, content_type=content_type)

    def _encoded(self, request_id: str) -> tuple[bytes, str]:
        """Encode a result as its pass was encoded, and name the content type."""
        result = self._results[request_id]
        if "loss_fn_outputs" in result and self.bodies[int(request_id[1:])].get("protobuf"):
            content = protobuf.encode_result(json_passes.decode_result(result))
            return content, protobuf.CONTENT_TYPE
        return json.dumps(result).encode(), "application/json"

    async def _retrieve_many(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if self.before_poll is not None:
            answer = await self.before_poll("batch")
            if answer is not None:
                return answer
        if self.inline_bytes is None:
            return web.json_response({"error": "not here"}, status=404)
        self.retrieved += asked["retrieved_request_ids"]
        cursor = asked["prev_cursor"]
        async with self._changed:
            while len(self._results) <= cursor and not self.lost:
                await self._changed.wait()
        if self.lost:
            return _died()
        completions: list[dict[str, Any]] = []
        for request_id in list(self._results)[cursor:]:
            content, content_type = self._encoded(request_id)
            state = "failed" if "error" in self._results[request_id] else "finished"
            one: dict[str, Any] = {"state": state, "request_id": request_id}
            if len(content) <= min(self.inline_bytes, asked["inline_bytes"]):
                one |= {"payload": base64.b64encode(content).decode(), "content_type": content_type}
            if request_id not in self.unreported:
                completions.append(one)
        return web.json_response({"completions": completions, "cursor": len(self._results)})


def _pass_result(outputs: list[dict[str, Any]], loss: float) -> dict[str, Any]:
    return {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": outputs,
        "metrics": {"loss:sum": loss},
    }


def _logprobs(datum: Mapping[str, Any]) -> dict[str, Any]:
    """A logprob of -1.0 for each target of a datum; for each token where it has no targets."""
    targets = datum["loss_fn_inputs"].get("target_tokens")
    chunks = datum["model_input"]["chunks"]
    count = sum(len(c["tokens"]) for c in chunks) if targets is None else len(targets["data"])
    return {"data": [-1.0] * count, "dtype": "float32", "shape": [count]}


def _died() -> web.Response:
    return web.json_response({"error": "worker died", "error_class": "ModelLost"}, status=410)


def _from_protobuf(path: str, raw: bytes) -> tuple[str, dict[str, Any]]:
    """Decode a protobuf request into the operation and the body that JSON would have."""
    request = protobuf.decode_request(raw)
    common: dict[str, Any] = {"seq_id": request.seq_id, "protobuf": True}
    data: list[dict[str, Any]] = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": d.tokens.tolist()}]},
            "loss_fn_inputs": {
                name: {"data": array.reshape(-1).tolist(), "shape": list(array.shape)}
                for name, array in d.inputs.items()
            },
        }
        for d in request.data
    ]
    if path == "backward":
        gradients = [datum["loss_fn_inputs"]["gradients"] for datum in data]
        forward = int(request.loss_fn_config["forward_seq_id"])
        return path, {**common, "gradients": gradients, "forward_seq_id": forward}
    loss = {"loss_fn": request.loss_fn, "loss_fn_config": request.loss_fn_config}
    return request.kind, {**common, f"{request.kind}_input": {"data": data, **loss}}
