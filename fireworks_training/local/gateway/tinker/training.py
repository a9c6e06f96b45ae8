"""Training through the Tinker API: sessions, runs, and the choice of the trainer that holds them.

Knows which job trains which model, and which session and run went to which job. Knows no bodies:
`training_routes` passes them on.

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
from aiohttp import web

from fireworks_training.local.gateway.control_plane import resources
from fireworks_training.local.gateway.control_plane.routes import ControlPlane
from fireworks_training.local.gateway.control_plane.trainer_jobs import (
    FAILED,
    PAUSED,
    RUNNING,
    Trainer,
)
from fireworks_training.local.gateway.inference.registry import (
    ModelEntry,
    ServingRegistry,
    UnknownModel,
)
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.settings import OFFERS
from fireworks_training.local.store.tinker_store import (
    BadTinkerPath,
    Checkpoint,
    SessionNote,
    TinkerStore,
    parse_path,
)

ID_PREFIX = "tinker-"
START_WITHIN_S = 120.0
LOOK_S = 0.02
MAX_SESSIONS = 4096
MAX_RUNS = 16_384
SILENT_S = 300.0
"""Seconds after which a session without a heartbeat is not known to be running."""


@dataclass(slots=True)
class Session:
    """Holds the state of a client's session.

    Attributes:
        jobs: ids of the jobs whose trainers have taken it up.
        finished: a finished one is gone for heartbeats.
        seen: time of its last sign of life, on the monotonic clock.
    """

    jobs: set[str] = field(default_factory=set[str])
    finished: bool = False
    seen: float = field(default_factory=time.monotonic)


class TinkerTraining:
    """Keeps clients' sessions, and finds or makes the trainer of a model and of a run.

    Args:
        plane: the platform's jobs.
        registry: its models.
        store: notes of runs and checkpoints.
        offers: names in `settings.OFFERS` that clients are asked to use.
    """

    def __init__(
        self,
        plane: ControlPlane,
        registry: ServingRegistry,
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
        """Return the served model of a name: its resource, its id, or its directory.

        Raises:
            HttpProblem: 404.
        """
        for entry in self._registry.models.values():
            if name in (entry.name, entry.name.rpartition("/")[2], str(entry.path)):
                return entry
        try:
            return self._registry.find_model(name)[0]
        except UnknownModel as error:
            raise HttpProblem(404, str(error)) from None

    async def trainer_of_model(self, entry: ModelEntry) -> tuple[str, Trainer]:
        """Return the job that trains a model, and its running trainer; make it when there is none.

        Raises:
            HttpProblem: 503 when it does not start.
        """
        id_ = f"{ID_PREFIX}{entry.name.rpartition('/')[2]}"[:63]
        jobs = self._plane.jobs
        if all(row.id != id_ for row in jobs.table.present()):
            training = {"baseModel": entry.name, "loraRank": resources.MAX_LORA_RANK}
            asked = {"trainingConfig": training, "disableInactivityCleanup": True}
            body, notice = resources.job_body(asked, "", self._registry)
            jobs.create(id_, {**body, "tinker": True}, notice)
        elif jobs.table.get(id_).state in (FAILED, PAUSED):
            jobs.resume(id_)
        try:
            async with asyncio.timeout(START_WITHIN_S):
                while (trainer := jobs.trainer(id_)) is None:
                    row = jobs.table.get(id_)
                    if row.state == FAILED:
                        raise HttpProblem(503, f"trainer job {id_!r}: {row.message}")
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise HttpProblem(503, f"trainer job {id_!r} has not started within 120 s") from None
        return id_, trainer

    def _trainers(self) -> Iterable[tuple[str, Trainer]]:
        for row in self._plane.jobs.table.present():
            trainer = self._plane.jobs.trainer(row.id)
            if row.body.get("tinker") and row.state == RUNNING and trainer is not None:
                yield row.id, trainer

    # -- sessions --------------------------------------------------------------------------------

    async def create_session(self, display_name: str | None, metadata: Mapping[str, str]) -> str:
        """Make a new session, and return its id."""
        session_id = f"ts-{uuid.uuid4().hex}"
        # In a thread: a note is flushed to the disk.
        note = SessionNote(session_id, display_name, metadata)
        await asyncio.to_thread(self.store.write_session, note)
        self._keep(session_id, Session())
        return session_id

    def _keep(self, session_id: str, session: Session) -> Session:
        """Remember a session, in the place of the oldest where there are many."""
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[session_id] = session
        return session

    def active(self, session_id: str) -> bool:
        """Return whether a session is known to be running."""
        known = self._sessions.get(session_id)
        return known is not None and not known.finished and time.monotonic() - known.seen < SILENT_S

    def session(self, session_id: str) -> Session:
        """Return a session; one that an earlier gateway made is found again by its note.

        Raises:
            HttpProblem: 410 when it was finished, 404 when there is none.
        """
        known = self._sessions.get(session_id)
        if known is None:
            note = self.store.session(session_id)
            if note is None:
                raise HttpProblem(404, f"no session {session_id[:80]!r}")
            jobs = {id_ for id_, _ in self._trainers()}
            known = self._keep(session_id, Session(jobs, note.finished is not None))
        if known.finished:
            raise HttpProblem(410, "the session was finished; create another")
        return known

    async def heartbeat(self, session_id: str) -> None:
        """Pass a heartbeat on to the trainers of a session; raise HttpProblem as `session` does."""
        session = self.session(session_id)
        session.seen = time.monotonic()
        for id_ in session.jobs:
            trainer = self._plane.jobs.trainer(id_)
            if trainer is not None:
                await _post(trainer, "api/v1/session_heartbeat", {"session_id": session_id})

    async def finish(self, session_id: str, reason: str, detail: str | None) -> None:
        """End a session and its models. Idempotent; the first reason stands.

        Raises:
            HttpProblem: 404 when there is no such session.
        """
        note = self.store.session(session_id)
        if note is None:
            raise HttpProblem(404, f"no session {session_id[:80]!r}")
        if note.finished is None:
            ended = replace(note, finished=reason, detail=detail)
            await asyncio.to_thread(self.store.write_session, ended)
        session = self._sessions.get(session_id)
        if session is None:
            session = self._keep(session_id, Session({id_ for id_, _ in self._trainers()}))
        session.finished = True
        for id_ in session.jobs:
            trainer = self._plane.jobs.trainer(id_)
            if trainer is not None:
                await _post(trainer, f"api/v1/sessions/{session_id}/finish", {})

    async def adopt(self, session_id: str, id_: str, trainer: Trainer) -> None:
        """Make a trainer take a session up."""
        session = self.session(session_id)
        await _post(trainer, "internal/sessions", {"session_id": session_id})
        session.jobs.add(id_)

    # -- runs and checkpoints --------------------------------------------------------------------

    def checkpoint(self, path: str) -> Checkpoint:
        """Return the checkpoint of a path.

        Raises:
            HttpProblem: 400 for a text that is no such path, 404 when there is no checkpoint.
        """
        try:
            checkpoint = parse_path(path)
        except BadTinkerPath as error:
            raise HttpProblem(400, str(error)) from None
        if self.store.checkpoint(checkpoint) is None:
            raise HttpProblem(404, f"no checkpoint {path[:200]!r}")
        return checkpoint

    def note_run(self, run: str, id_: str) -> None:
        """Remember which job a run went to. One that is forgotten is looked for in all jobs."""
        while len(self._runs) >= MAX_RUNS:
            del self._runs[next(iter(self._runs))]
        self._runs[run] = id_

    async def trainer_of_run(self, run: str) -> tuple[str, Trainer] | None:
        """Return the job and trainer that hold a run; None when no trainer does."""
        id_ = self._runs.get(run)
        trainer = None if id_ is None else self._plane.jobs.trainer(id_)
        if id_ is not None and trainer is not None:
            return id_, trainer
        for other, candidate in self._trainers():
            if await _post(candidate, "api/v1/get_info", {"model_id": run}) == 200:
                self.note_run(run, other)
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
