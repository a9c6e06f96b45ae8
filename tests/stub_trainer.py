"""A trainer in memory: takes requests in any order, executes them by seq_id, and can misbehave.

It knows no mathematics: a gradient is a count. What it applied, in which order, is what tests read.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from fireworks_training._wire.training import json_passes, protobuf
from fireworks_training._wire.training.compression import decompress

Hook = Callable[[str, dict[str, Any]], Awaitable[web.StreamResponse | None]]


@dataclass
class StubTrainer:
    """One model, one line.

    Attributes:
        step_protocol: whether it enforces steps and says so.
        applied: what was executed: (path, seq_id), in order.
        steps: datums whose gradients each optim_step applied.
        before: called with each submit; may answer in the server's stead.
        fail: seq_ids whose execution fails.
        drop_answers: seq_ids whose first submit is taken, and the connection then cut.
        wire: the dialects it says it takes; what comes in either, it understands.
        backward: whether it offers a backward by an earlier forward; `forgets` the forwards whose
            references it refuses.
        bodies: what was executed, by seq_id, as JSON has it.
        config: what it answers to client/config; None: it has no such route.
        says: what else its create-model answer holds.
        batch: whether it offers batch polls.
        inline: bytes of a result that comes in a batch poll; None: it refuses them after all.
        forgotten: requests whose end no batch poll tells.
        retrieved: requests whose results it was told are there.
        counts: requests by route.
        created: numbers of the models asked for.
        refuses_beats: heartbeats are answered with 410.
        encodings: content encodings of passes.
    """

    step_protocol: bool = True
    applied: list[tuple[str, int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    submitted: list[tuple[str, int]] = field(default_factory=list)
    before: Hook | None = None
    before_poll: Callable[[str], Awaitable[web.StreamResponse | None]] | None = None
    fail: set[int] = field(default_factory=set)
    drop_answers: set[int] = field(default_factory=set)
    wire: list[str] = field(default_factory=list)
    backward: bool = False
    forgets: set[int] = field(default_factory=set)
    bodies: dict[int, dict[str, Any]] = field(default_factory=dict)
    lost: bool = False
    config: dict[str, Any] | None = None
    fails_config: bool = False
    says: dict[str, Any] = field(default_factory=dict)
    batch: bool = False
    inline: int | None = 1 << 20
    counts: Counter[str] = field(default_factory=Counter)
    created: list[int] = field(default_factory=list)
    refuses_beats: bool = False
    encodings: list[str | None] = field(default_factory=list)
    forgotten: set[str] = field(default_factory=set)
    retrieved: list[str] = field(default_factory=list)
    _waiting: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _next: int = 1
    _held: int = 0
    _failed: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._counting])
        app.router.add_post("/api/v1/client/config", self._config)
        app.router.add_post("/api/v1/retrieve_futures", self._retrieve_many)
        app.router.add_post("/api/v1/create_session", self._session)
        app.router.add_post("/api/v1/session_heartbeat", self._beat)
        app.router.add_post("/api/v1/retrieve_future", self._retrieve)
        app.router.add_post("/api/v1/create_model", self._create)
        for path in (
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
        ):
            app.router.add_post(f"/api/v1/{path}", self._submit)
        return app

    async def start(self) -> TestServer:
        server = TestServer(self.app())
        await server.start_server(auto_decompress=False)
        return server

    @web.middleware
    async def _counting(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.counts[request.path.removeprefix("/api/v1/")] += 1
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _config(self, request: web.Request) -> web.Response:
        if self.fails_config:
            return web.Response(status=500)
        if self.config is None:
            return web.json_response({"error": "no such route"}, status=404)
        return web.json_response(self.config)

    async def _session(self, request: web.Request) -> web.Response:
        return web.json_response({"session_id": "session-1"})

    async def _beat(self, request: web.Request) -> web.Response:
        async with self._changed:
            self._changed.notify_all()
        if self.refuses_beats:
            gone = {"error": "the session has ended", "error_class": "SessionGone"}
            return web.json_response(gone, status=410)
        return web.json_response({})

    async def _create(self, request: web.Request) -> web.Response:
        self.created.append((await request.json())["model_seq_id"])
        result: dict[str, Any] = {"model_id": "model-1", "comms": "v2"}
        if self.step_protocol:
            result["step_protocol"] = 1
        result |= {"wire": self.wire, "supports_backward": self.backward, **self.says}
        if self.batch:
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
        if self.before is not None:
            answer = await self.before(path, body)
            if answer is not None:
                return answer
        if path == "backward" and body["forward_seq_id"] in self.forgets:
            return web.json_response({"error": "that forward is gone"}, status=404)
        request_id = f"r{seq_id}"
        if request_id not in self._results and seq_id not in self._waiting:
            self._waiting[seq_id] = (path, body)
            async with self._changed:
                self._execute()
                self._changed.notify_all()
        if path == "forward_backward" and not body["forward_backward_input"]["data"]:
            return web.json_response({"error": "no datums"}, status=400)
        if seq_id in self.drop_answers:
            self.drop_answers.discard(seq_id)
            assert request.transport is not None
            request.transport.close()
        return web.json_response({"request_id": request_id})

    def _execute(self) -> None:
        while self._next in self._waiting:
            seq_id = self._next
            path, body = self._waiting.pop(seq_id)
            self._results[f"r{seq_id}"] = self._one(path, body, seq_id)
            self._next += 1

    def _one(self, path: str, body: dict[str, Any], seq_id: int) -> dict[str, Any]:
        self.bodies[seq_id] = body
        if path == "discard_gradients":
            self._held, self._failed = 0, False
            self.applied.append((path, seq_id))
            return {"type": path}
        weighty = path in ("forward_backward", "backward", "optim_step", "load_weights")
        if self.step_protocol and self._failed and weighty:
            self._failed = path != "optim_step"
            return {
                "error": "its step failed",
                "category": "user",
                "error_class": "PrecedingOperationFailed",
            }
        empty = path == "forward_backward" and not body["forward_backward_input"]["data"]
        if seq_id in self.fail or empty:
            if path == "forward_backward" and self.step_protocol:
                self._held, self._failed = 0, True
            return {"error": "scripted failure", "category": "server"}
        self.applied.append((path, seq_id))
        if path in ("forward", "forward_backward"):
            data = (body.get("forward_input") or body["forward_backward_input"])["data"]
            self._held += len(data) if path == "forward_backward" else 0
            outputs = []
            for datum in data:
                count = len(datum["loss_fn_inputs"]["target_tokens"]["data"])
                array = {"data": [-1.0] * count, "dtype": "float32", "shape": [count]}
                outputs.append({"logprobs": array})
            return {
                "loss_fn_output_type": "ArrayRecord",
                "loss_fn_outputs": outputs,
                "metrics": {"loss:sum": 1.0},
            }
        if path == "backward":
            self._held += len(body["gradients"])
            blank: list[dict[str, Any]] = [{} for _ in body["gradients"]]
            return {
                "loss_fn_output_type": "ArrayRecord",
                "loss_fn_outputs": blank,
                "metrics": {"loss:sum": 2.0},
            }
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
        if self.inline is None:
            return web.json_response({"error": "not here"}, status=404)
        self.retrieved += asked["retrieved_request_ids"]
        cursor = asked["prev_cursor"]
        async with self._changed:
            while len(self._results) <= cursor and not self.lost:
                await self._changed.wait()
        if self.lost:
            return _died()
        completions = []
        for request_id in list(self._results)[cursor:]:
            content, content_type = self._encoded(request_id)
            state = "failed" if "error" in self._results[request_id] else "finished"
            one: dict[str, Any] = {"state": state, "request_id": request_id}
            if len(content) <= min(self.inline, asked["inline_bytes"]):
                one |= {"payload": base64.b64encode(content).decode(), "content_type": content_type}
            if request_id not in self.forgotten:
                completions.append(one)
        return web.json_response({"completions": completions, "cursor": len(self._results)})

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that a submit brings about."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def die(self) -> None:
        """The worker is gone: everything answers 410 from now on."""
        async with self._changed:
            self.lost = True
            self._changed.notify_all()


def _died() -> web.Response:
    return web.json_response({"error": "worker died", "error_class": "ModelLost"}, status=410)


def _from_protobuf(path: str, raw: bytes) -> tuple[str, dict[str, Any]]:
    """A protobuf request as JSON has it."""
    request = protobuf.decode_request(raw)
    common: dict[str, Any] = {"seq_id": request.seq_id, "protobuf": True}
    data = [
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
