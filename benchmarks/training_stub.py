"""A trainer without mathematics, for `training.py`: answers everything at once, in any dialect.

    python benchmarks/training_stub.py PORT [--comms v2] [--protobuf]

It ends with its stdin. It lists `step_protocol`. It also counts polls, and can be told to fail or
to hang: POST /control {"status": 500} (answers polls so), {"hang": "retrieve_future"} (does not
answer the next request of that name), GET /stats.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from fireworks_training._wire.training import protobuf
from fireworks_training._wire.training.datums import PassResult

JSON = "application/json"
SUBMITS = ("optim_step", "save_weights", "save_weights_for_sampler", "unload_model")


class Stub:
    """All models' answers; `results` by request id."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.results: dict[str, tuple[bytes, str]] = {}
        self.polls = 0
        self.status = 0
        self.hang: str | None = None
        self.hung = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 30)
        answers: dict[str, Any] = {
            "create_session": {"session_id": "session-1"},
            "session_heartbeat": {"type": "session_heartbeat"},
            "client/config": {},
            "telemetry": {"status": "accepted"},
            "get_info": {"model_id": "m:train:0", "model_data": {"model_name": "stub"}},
        }
        for name, answer in answers.items():
            app.router.add_post(f"/api/v1/{name}", self.fixed(answer))
        app.router.add_post("/api/v1/sessions/{id}/finish", self.fixed({}))
        app.router.add_get("/api/v1/healthz", self.fixed({"status": "ok"}))
        app.router.add_post("/api/v1/create_model", self.create)
        for name in SUBMITS:
            app.router.add_post(f"/api/v1/{name}", self.operation)
        for name in ("forward", "forward_backward"):
            app.router.add_post(f"/api/v1/{name}", self.passes)
        app.router.add_post("/api/v1/retrieve_future", self.retrieve)
        app.router.add_post("/control", self.control)
        app.router.add_get("/stats", self.stats)
        return app

    def fixed(self, answer: dict[str, Any]) -> Any:
        async def handler(request: web.Request) -> web.Response:
            await request.read()
            return web.json_response(answer)

        return handler

    async def maybe_hang(self, request: web.Request) -> None:
        name = request.path.rsplit("/", 1)[-1]
        if self.hang == name:
            self.hang = None
            await self.hung.wait()

    async def create(self, request: web.Request) -> web.Response:
        await request.read()
        wire = ["json", "protobuf"] if self.options.protobuf else ["json"]
        made = {"model_id": "m:train:0", "type": "create_model", "wire": wire}
        made |= {"step_protocol": 1, "comms": self.options.comms}
        self.results["create"] = (orjson.dumps(made), JSON)
        return web.json_response({"request_id": "create", "model_id": "m:train:0"})

    async def operation(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        await self.maybe_hang(request)
        path = request.path.rsplit("/", 1)[-1]
        answer: dict[str, Any] = {"path": "tinker://run/weights/x", "type": path}
        if path == "optim_step":
            answer = {"metrics": {"grad_norm": 1.0}}
        return self.taken(body["seq_id"], (orjson.dumps(answer), JSON))

    async def passes(self, request: web.Request) -> web.Response:
        raw = await request.read()
        await self.maybe_hang(request)
        if request.content_type == protobuf.CONTENT_TYPE:
            asked = protobuf.decode_request(raw)
            shapes = [datum.inputs["target_tokens"].shape for datum in asked.data]
            answer = protobuf.encode_result(_result(shapes)), protobuf.CONTENT_TYPE
            return self.taken(asked.seq_id, answer)
        body = orjson.loads(raw)
        inner = body.get("forward_input") or body["forward_backward_input"]
        targets = [datum["loss_fn_inputs"]["target_tokens"] for datum in inner["data"]]
        result = _result([(len(target["data"]),) for target in targets])
        outputs = [
            {"logprobs": {"data": o["logprobs"], "dtype": "float32", "shape": o["logprobs"].shape}}
            for o in result.outputs
        ]
        answer_json = {
            "loss_fn_output_type": result.output_type,
            "loss_fn_outputs": outputs,
            "metrics": result.metrics,
        }
        text = orjson.dumps(answer_json, option=orjson.OPT_SERIALIZE_NUMPY)
        return self.taken(body["seq_id"], (text, JSON))

    def taken(self, seq_id: int, answer: tuple[bytes, str]) -> web.Response:
        self.results[f"r{seq_id}"] = answer
        return web.json_response({"request_id": f"r{seq_id}", "model_id": "m:train:0"})

    async def retrieve(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        self.polls += 1
        await self.maybe_hang(request)
        if self.status:
            return web.json_response({"error": "told to fail"}, status=self.status)
        answer, content_type = self.results[body["request_id"]]
        return web.Response(body=answer, content_type=content_type)

    async def control(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        self.status = body.get("status", self.status)
        self.hang = body.get("hang", self.hang)
        self.polls = 0
        return web.json_response({})

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response({"polls": self.polls})


def _result(shapes: list[tuple[int, ...]]) -> PassResult:
    generator = np.random.default_rng(0)
    outputs = [{"logprobs": -generator.random(s, dtype=np.float32)} for s in shapes]
    return PassResult("ArrayRecord", outputs, {"loss:sum": 1.0})


def _end_with_the_starter() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """Serve until killed, or until whoever started it is gone: then its stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--comms", default="v1")
    parser.add_argument("--protobuf", action="store_true")
    options = parser.parse_args()
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    web.run_app(Stub(options).app(), host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
