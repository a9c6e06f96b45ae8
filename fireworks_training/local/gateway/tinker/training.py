"""Training through the Tinker API: sessions, runs, and the way to the trainer that holds them.

Knows which job trains which model, and which session and run went to which job. Bodies pass through
unread but for the name of the run they are about; the trainer itself speaks both dialects.

A client's session is made here, and taken up by a trainer when its first model goes there. A
gateway that was started anew has no memory of that and asks the trainers who holds a run.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import aiohttp
import orjson
import zstandard
from aiohttp import hdrs, web
from multidict import CIMultiDict

from fireworks_training.local.gateway import resources
from fireworks_training.local.gateway.control_plane import ControlPlane
from fireworks_training.local.gateway.problems import Problem, model_lost
from fireworks_training.local.gateway.registry import ModelEntry, Registry, UnknownModel
from fireworks_training.local.gateway.trainer_proxy import after_failure, answer_of, passed_headers
from fireworks_training.local.gateway.trainers import FAILED, PAUSED, RUNNING, Trainer
from fireworks_training.local.settings import OFFERS
from fireworks_training.local.tinker_store import SessionNote, TinkerStore, session_of

JOB_PREFIX = "tinker-"
START_WITHIN_S = 120.0
LOOK_S = 0.02
MAX_SESSIONS = 4096
SILENT_S = 300.0
"""A session without a heartbeat for so long is not known to be running."""
FINISHES = ("success", "errored", "interrupted")
MAX_TEXT = 4096
_ZSTD = "zstd"


@dataclass(slots=True)
class Session:
    """A client's session.

    Attributes:
        jobs: those whose trainers have taken it up.
        finished: a finished one is gone for heartbeats.
        seen: when it last showed life, on the monotonic clock.
    """

    jobs: set[str] = field(default_factory=set)
    finished: bool = False
    seen: float = field(default_factory=time.monotonic)


class TinkerTraining:
    """See the module.

    Args:
        plane: the platform's jobs.
        registry: its models.
        store: notes of runs and checkpoints.
        offers: of `settings.OFFERS`, what clients are told to use.
    """

    def __init__(
        self,
        plane: ControlPlane,
        registry: Registry,
        store: TinkerStore,
        offers: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.offered = {OFFERS[offer]: True for offer in offers}
        self._plane = plane
        self._registry = registry
        self._sessions: dict[str, Session] = {}
        self._runs: dict[str, str] = {}

    # -- models and jobs -------------------------------------------------------------------------

    def model(self, name: str) -> ModelEntry:
        """The served model of a name: its resource, its id, or its directory.

        Raises:
            Problem: 404.
        """
        for entry in self._registry.models.values():
            if name in (entry.name, entry.name.rpartition("/")[2], str(entry.path)):
                return entry
        try:
            return self._registry.find_model(name)[0]
        except UnknownModel as error:
            raise Problem(404, str(error)) from None

    async def trainer_of_model(self, entry: ModelEntry) -> tuple[str, Trainer]:
        """The job that trains a model, and its trainer once it runs; made when there is none.

        Raises:
            Problem: 503 when it does not start.
        """
        id_ = f"{JOB_PREFIX}{entry.name.rpartition('/')[2]}"[:63]
        jobs = self._plane.jobs
        if id_ not in {row.id for row in jobs.rows()}:
            training = {"baseModel": entry.name, "loraRank": resources.MAX_LORA_RANK}
            asked = {"trainingConfig": training, "disableInactivityCleanup": True}
            body, notice = resources.job_body(asked, "", self._registry)
            jobs.create(id_, {**body, "tinker": True}, notice)
        elif jobs.get(id_).state in (FAILED, PAUSED):
            jobs.resume(id_)
        try:
            async with asyncio.timeout(START_WITHIN_S):
                while (trainer := jobs.trainer(id_)) is None:
                    if jobs.get(id_).state == FAILED:
                        raise Problem(503, f"trainer job {id_!r}: {jobs.get(id_).message}")
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise Problem(503, f"trainer job {id_!r} has not started within 120 s") from None
        return id_, trainer

    def _trainers(self) -> Iterable[tuple[str, Trainer]]:
        for row in self._plane.jobs.rows():
            trainer = self._plane.jobs.trainer(row.id)
            if row.body.get("tinker") and row.state == RUNNING and trainer is not None:
                yield row.id, trainer

    # -- sessions --------------------------------------------------------------------------------

    def create_session(self, display_name: str | None, metadata: Mapping[str, str]) -> str:
        """A new session's id."""
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        session_id = f"ts-{uuid.uuid4().hex}"
        self._sessions[session_id] = Session()
        self.store.write_session(SessionNote(session_id, display_name, metadata))
        return session_id

    def active(self, session_id: str) -> bool:
        """Whether a session is known to be running."""
        known = self._sessions.get(session_id)
        return known is not None and not known.finished and time.monotonic() - known.seen < SILENT_S

    def session(self, session_id: str) -> Session:
        """A session; one that an earlier gateway made is found again by its form.

        Raises:
            Problem: 410 when it was finished, 404 when it can't have been ours.
        """
        known = self._sessions.get(session_id)
        if known is None:
            if session_of(f"{session_id}:") is None or not session_id.startswith("ts-"):
                raise Problem(404, f"no session {session_id[:80]!r}")
            known = self._sessions[session_id] = Session({id_ for id_, _ in self._trainers()})
        if known.finished:
            raise Problem(410, "the session was finished; create another")
        return known

    async def heartbeat(self, session_id: str) -> None:
        """Passes a sign of life on. Raises Problem as `session` does."""
        session = self.session(session_id)
        session.seen = time.monotonic()
        for id_ in session.jobs:
            trainer = self._plane.jobs.trainer(id_)
            if trainer is not None:
                await _post(trainer, "api/v1/session_heartbeat", {"session_id": session_id})

    async def finish(self, session_id: str, reason: str, detail: str | None) -> None:
        """Ends a session and its models. Idempotent; the first reason stands."""
        note = self.store.session(session_id)
        if note is not None and note.finished is None:
            self.store.write_session(replace(note, finished=reason, detail=detail))
        session = self._sessions.setdefault(session_id, Session())
        session.finished = True
        for id_ in session.jobs:
            trainer = self._plane.jobs.trainer(id_)
            if trainer is not None:
                await _post(trainer, f"api/v1/sessions/{session_id}/finish", {})

    async def adopt(self, session_id: str, id_: str, trainer: Trainer) -> None:
        """Makes a trainer take a session up."""
        session = self.session(session_id)
        await _post(trainer, "internal/sessions", {"session_id": session_id})
        session.jobs.add(id_)

    # -- runs ------------------------------------------------------------------------------------

    def note_run(self, run: str, id_: str) -> None:
        """Remembers which job a run went to."""
        self._runs[run] = id_

    async def trainer_of_run(self, run: str) -> tuple[str, Trainer] | None:
        """The job and trainer that hold a run; None when no trainer does."""
        id_ = self._runs.get(run)
        trainer = None if id_ is None else self._plane.jobs.trainer(id_)
        if id_ is not None and trainer is not None:
            return id_, trainer
        for other, candidate in self._trainers():
            if await _post(candidate, "api/v1/get_info", {"model_id": run}) == 200:
                self._runs[run] = other
                return other, candidate
        return None


TRAINING: web.AppKey[TinkerTraining] = web.AppKey("tinker_training", TinkerTraining)


async def _post(trainer: Trainer, tail: str, body: dict[str, str]) -> int:
    try:
        async with trainer.session.post(f"http://trainer/{tail}", json=body) as response:
            await response.read()
            return response.status
    except aiohttp.ClientError:
        return 503  # its job says so, and the next request finds another


# -- routes --------------------------------------------------------------------------------------


def add_routes(app: web.Application) -> None:
    """Registers sessions and training; the app holds `TRAINING`."""
    router = app.router
    router.add_get("/api/v1/healthz", _ok)
    for name, handler in {
        "client/config": _client_config,
        "telemetry": _telemetry,
        "create_session": _create_session,
        "session_heartbeat": _heartbeat,
        "sessions/{session_id}/finish": _finish,
        "create_model": _create_model,
        "load_weights": _load_weights,
    }.items():
        router.add_post(f"/api/v1/{name}", handler)
    for kind in _OF_A_RUN:
        router.add_post(f"/api/v1/{kind}", _pass_to_run)


_OF_A_RUN = (
    "get_info",
    "unload_model",
    "forward",
    "forward_backward",
    "backward",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "discard_gradients",
)


async def read_json(request: web.Request) -> dict[str, object]:
    """The JSON object of a small request.

    Raises:
        Problem: 400, 413.
    """
    raw = await request.read()
    try:
        body: object = orjson.loads(raw or b"{}")
    except orjson.JSONDecodeError:
        raise Problem(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Problem(400, "the body must be a JSON object")
    return body


def text(body: dict[str, object], key: str) -> str:
    """A string of a body, or Problem 400."""
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise Problem(400, f"{key} must be a non-empty string")
    return value


async def _ok(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _client_config(request: web.Request) -> web.Response:
    """What differs from the clients' defaults."""
    await request.read()
    return web.json_response(request.app[TRAINING].offered)


async def _telemetry(request: web.Request) -> web.Response:
    """Taken so that official clients work, and dropped."""
    await request.read()
    return web.json_response({"status": "accepted"})


async def _create_session(request: web.Request) -> web.Response:
    body = await read_json(request)
    name, metadata = body.get("display_name"), body.get("user_metadata") or {}
    if not (name is None or (isinstance(name, str) and len(name) <= MAX_TEXT)):
        raise Problem(400, f"display_name must be a string of at most {MAX_TEXT} characters")
    if not isinstance(metadata, dict) or len(orjson.dumps(metadata)) > MAX_TEXT:
        raise Problem(400, f"user_metadata must be an object of at most {MAX_TEXT} bytes")
    shown = {str(key): str(value) for key, value in metadata.items()}
    session_id = request.app[TRAINING].create_session(name, shown)
    return web.json_response({"session_id": session_id, "type": "create_session"})


async def _heartbeat(request: web.Request) -> web.Response:
    await request.app[TRAINING].heartbeat(text(await read_json(request), "session_id"))
    return web.json_response({"type": "session_heartbeat"})


async def _finish(request: web.Request) -> web.Response:
    body = await read_json(request)
    reason, detail = body.get("reason"), body.get("detail")
    given = reason.get("type") if isinstance(reason, dict) else None
    if given not in (None, *FINISHES):
        raise Problem(400, f"reason: its type must be one of {', '.join(FINISHES)}")
    if not (detail is None or isinstance(detail, str)):
        raise Problem(400, "detail must be a string")
    await request.app[TRAINING].finish(
        request.match_info["session_id"], given or "success", detail and detail[:MAX_TEXT]
    )
    return web.json_response({})


async def _create_model(request: web.Request) -> web.StreamResponse:
    raw, body = await request.read(), await read_json(request)
    training = request.app[TRAINING]
    return await _begin_run(request, raw, body, training.model(text(body, "base_model")))


async def _load_weights(request: web.Request) -> web.StreamResponse:
    """Into a run that is there, or as the beginning of a new one."""
    raw, body = await request.read(), await read_json(request)
    if body.get("session_id") is None:
        return await _pass_to_run(request)
    training = request.app[TRAINING]
    named = body.get("base_model")
    if not isinstance(named, str):
        note = training.store.run(text(body, "path").removeprefix("tinker://").partition("/")[0])
        if note is None:
            raise Problem(404, f"no checkpoint {text(body, 'path')[:200]!r}")
        named = note.base_model
        body["base_model"] = named
        raw = orjson.dumps(body)
    return await _begin_run(request, raw, body, training.model(named))


async def _begin_run(
    request: web.Request, raw: bytes, body: dict[str, object], entry: ModelEntry
) -> web.StreamResponse:
    training = request.app[TRAINING]
    session_id = text(body, "session_id")
    training.session(session_id)
    id_, trainer = await training.trainer_of_model(entry)
    await training.adopt(session_id, id_, trainer)
    training.note_run(f"{session_id}:train:{body.get('model_seq_id')}", id_)
    return await forward(request, id_, trainer, raw)


async def _pass_to_run(request: web.Request) -> web.StreamResponse:
    raw = await request.read()
    return await pass_to_trainer(request, raw, _run_of(request, raw))


async def pass_to_trainer(request: web.Request, raw: bytes, run: str) -> web.StreamResponse:
    """One request to the trainer of a run, and its answer."""
    found = await request.app[TRAINING].trainer_of_run(run)
    if found is None:
        return model_lost(
            f"no trainer holds {run[:100]!r}: the process that held it is gone. Make a new training"
            " client from a saved state"
        )
    return await forward(request, *found, raw)


async def forward(
    request: web.Request, id_: str, trainer: Trainer, raw: bytes
) -> web.StreamResponse:
    """The request under its own path, with `raw` for a body."""
    headers: CIMultiDict[str] = passed_headers(request)
    headers.pop(hdrs.CONTENT_LENGTH, None)
    try:
        with trainer.used():
            async with trainer.session.request(
                request.method,
                f"http://trainer{request.path}",
                headers=headers,
                data=raw,
                allow_redirects=False,
            ) as upstream:
                return await answer_of(request, upstream)
    except aiohttp.ClientError as error:
        return await after_failure(request, trainer, id_, error)
    except TimeoutError:
        raise Problem(504, f"the trainer of job {id_!r} did not answer in time") from None


def _run_of(request: web.Request, raw: bytes) -> str:
    """The run that a body is about: `model_id` in JSON, the first field of a protobuf message."""
    if request.content_type != "application/x-protobuf":
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise Problem(400, "the body is not JSON") from None
        return text(body if isinstance(body, dict) else {}, "model_id")
    head = raw[:512]
    if request.headers.get(hdrs.CONTENT_ENCODING) == _ZSTD:
        try:
            with zstandard.ZstdDecompressor().stream_reader(raw) as reader:
                head = reader.read(512)
        except zstandard.ZstdError:
            raise Problem(400, "the body is no zstd, as its Content-Encoding says") from None
    # Field 1, length-delimited; a run's name is shorter than 128 bytes.
    if len(head) < 2 or head[0] != 0x0A or head[1] > 0x7F:
        raise Problem(400, "the message does not begin with the model_id")
    return head[2 : 2 + head[1]].decode("ascii", "replace")
