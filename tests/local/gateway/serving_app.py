"""The serving routes over a real engine in a thread, or over an engine that plays a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiohttp.typedefs import Handler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fireworks_training.local.engine_frames import Control, FrameDecoder, encode_control
from fireworks_training.local.gateway.control_plane import hot_load
from fireworks_training.local.gateway.inference import routes as inference
from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.registry import (
    LiveDeployment,
    ModelEntry,
    ServingRegistry,
)
from fireworks_training.local.gateway.inference.routes import KEEPALIVE_AFTER
from fireworks_training.local.gateway.inference.serving import REGISTRY, REPLACED_WITHIN
from fireworks_training.local.gateway.web.extensions import EXTENSIONS
from fireworks_training.local.gateway.web.problems import HttpProblem, render
from fireworks_training.local.store.snapshots import SnapshotStore
from tests.local.engine.tiny_model import BASE_MODEL, engine_thread, make_engine, tiny_qwen3

DEPLOYMENT = "accounts/local/deployments/d"
HEADERS = {"fireworks-deployment": DEPLOYMENT}


def make_model_folder(path: Path) -> Path:
    """The tiny model with a tokenizer of bytes; 0 is padding, 1 ends."""
    tiny_qwen3().save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<pad>", special=True), AddedToken("<end>", special=True)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def _byte_vocabulary() -> dict[str, int]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {"<pad>": 0, "<end>": 1}
    for char in sorted(plain.alphabet()):
        vocabulary[char] = len(vocabulary)
    return vocabulary


@dataclass
class Served:
    """A running gateway with one deployment."""

    session: aiohttp.ClientSession
    registry: ServingRegistry
    live: LiveDeployment
    client: EngineClient
    store: SnapshotStore
    woken: list[str]

    async def post(self, **body: object) -> aiohttp.ClientResponse:
        body = {"model": DEPLOYMENT, **body}
        return await self.session.post("/inference/v1/completions", json=body)

    async def complete(self, **body: object) -> dict[str, Any]:
        """One answer, everything asked for."""
        response = await self.post(
            **{"raw_output": True, "logprobs": True, "perf_metrics_in_response": True, **body}
        )
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer

    async def events(self, **body: object) -> list[bytes]:
        """The events of a stream, comments too."""
        response = await self.post(
            **{
                "raw_output": True,
                "logprobs": True,
                "perf_metrics_in_response": True,
                "stream": True,
                **body,
            }
        )
        data = await response.read()
        assert response.status == 200, data
        assert response.content_type == "text/event-stream"
        assert data.endswith(b"\n\n")
        return data.split(b"\n\n")[:-1]

    async def refused(self, **body: object) -> tuple[int, str, str | None]:
        """Status, message and Retry-After of a request that is refused."""
        response = await self.post(**body)
        error = (await response.json())["error"]
        return response.status, error["message"], response.headers.get("Retry-After")

    async def idle(self) -> None:
        """Waits until the engine reports no stream."""
        async with asyncio.timeout(10):
            while self.client.active or self.client.waiting or self.client.open_streams:  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@dataclass
class Keeper:
    """Does what the control plane does for these routes, without a database."""

    deployments: dict[str, LiveDeployment]
    woken: list[str] = field(default_factory=list)

    async def wake(self, resource: str) -> None:
        self.woken.append(resource)

    def record_loaded(self, resource: str, identity: str) -> None:
        self.deployments[resource].loaded_identity = identity


def chunks_of(events: list[bytes]) -> list[dict[str, Any]]:
    """The JSON events of a complete stream."""
    assert events[-1] == b"data: [DONE]"
    return [orjson.loads(event.removeprefix(b"data: ")) for event in events[:-1]]


def joined(chunks: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Text and rows of all chunks."""
    choices = [chunk["choices"][0] for chunk in chunks]
    rows = [row for choice in choices for row in (choice["logprobs"] or {"content": []})["content"]]
    return "".join(choice["text"] for choice in choices), rows


@web.middleware
async def render_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """As the gateway's own middleware does."""
    try:
        return await handler(request)
    except HttpProblem as problem:
        return render(problem)


@asynccontextmanager
async def gateway(
    client: EngineClient,
    model_path: Path,
    store: SnapshotStore,
    keepalive: float = 15.0,
    notice_after: Callable[[int], float] | None = None,
    replaced_within: float = 0.0,
) -> AsyncIterator[Served]:
    """The routes over a connected engine client; with `notice_after`, as a cloud has them."""
    model = ModelEntry(BASE_MODEL, model_path, 256)
    registry = ServingRegistry(models={BASE_MODEL: model})
    keeper = Keeper(registry.deployments)
    live = LiveDeployment(keeper, DEPLOYMENT, BASE_MODEL, model, [client], state="READY")
    registry.deployments[DEPLOYMENT] = live
    app = web.Application(middlewares=[render_problems])
    app[REGISTRY] = registry
    inference.add_routes(app)
    hot_load.add_routes(app)
    app[KEEPALIVE_AFTER] = keepalive
    app[REPLACED_WITHIN] = replaced_within
    if notice_after is not None:
        app[EXTENSIONS] = False
        app[hot_load.NOTICE_AFTER] = notice_after
    server = TestServer(app)
    await server.start_server()
    try:
        async with aiohttp.ClientSession(server.make_url("/")) as session:
            yield Served(session, registry, live, client, store, keeper.woken)
    finally:
        await server.close()


@asynccontextmanager
async def serving(
    model_path: Path,
    tmp_path: Path,
    notice_after: Callable[[int], float] | None = None,
    **limits: int,
) -> AsyncIterator[Served]:
    """The routes over a real engine."""
    store = SnapshotStore(tmp_path / "snapshots")
    socket = tmp_path / "e.sock"
    with engine_thread(make_engine(model_path, store, **limits), socket):
        client = EngineClient(socket, f"{DEPLOYMENT}/replicas/0")
        await client.connect()
        try:
            async with gateway(client, model_path, store, notice_after=notice_after) as served:
                yield served
        finally:
            await client.close(stop=True)


HELLO = {
    "op": "hello",
    "vocab_size": 300,
    "max_context": 256,
    "max_slots": 2,
    "max_waiting": 1,
    "identity": None,
    "kind": None,
    "tensors_sha256": None,
    "version": 0,
    "stage": "ready",
    "target": None,
    "error": None,
}


class ScriptedEngine:
    """The other end of an engine's socket: says hello, keeps controls, sends what it is told."""

    def __init__(self) -> None:
        self.controls: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._writer: asyncio.StreamWriter | None = None
        self.connected = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        writer.write(encode_control(HELLO))
        self.connected.set()
        decoder = FrameDecoder()
        while data := await reader.read(1 << 16):
            for frame in decoder.feed(data):
                assert isinstance(frame, Control)
                self.controls.put_nowait(frame.message)
        writer.close()

    def send(self, *frames: bytes) -> None:
        assert self._writer is not None
        self._writer.write(b"".join(frames))

    def die(self) -> None:
        assert self._writer is not None
        self._writer.transport.abort()

    async def control(self, op: str) -> dict[str, Any]:
        """The next control of a kind."""
        async with asyncio.timeout(10):
            while (message := await self.controls.get())["op"] != op:
                pass
        return message


@asynccontextmanager
async def scripted(
    model_path: Path, tmp_path: Path, keepalive: float = 15.0, replaced_within: float = 0.0
) -> AsyncIterator[tuple[Served, ScriptedEngine]]:
    """The routes over an engine that the test plays."""
    engine = ScriptedEngine()
    server = await asyncio.start_unix_server(engine.handle, tmp_path / "e.sock")
    client = EngineClient(tmp_path / "e.sock", "scripted")
    await client.connect()
    store = SnapshotStore(tmp_path / "snapshots")
    try:
        async with gateway(
            client, model_path, store, keepalive, replaced_within=replaced_within
        ) as served:
            yield served, engine
    finally:
        await client.close()
        server.close()
        await server.wait_closed()
