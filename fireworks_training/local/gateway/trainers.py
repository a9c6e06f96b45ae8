"""Trainer jobs: one worker process each, from creation to its end.

Knows the states of a job and how its worker is watched; the operations that clients send to the
trainer pass through `trainer_proxy` unread. States:

    CREATING -> RUNNING -> FAILED          the worker died
    FAILED, PAUSED -> CREATING             :resume, with a new worker and an empty memory
    any -> DELETING -> DELETED             a tombstone: the id is not used again
    RUNNING, CREATING -> PAUSED            the whole platform was stopped in between
"""

from __future__ import annotations

import asyncio
import logging
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import aiohttp

from fireworks_training.local.database import AlreadyExists, Body, Database, ResourceRow
from fireworks_training.local.gateway.problems import Problem
from fireworks_training.local.gateway.registry import Registry
from fireworks_training.local.gateway.workers import (
    TooManyWorkers,
    Worker,
    WorkerFailed,
    Workers,
)

log = logging.getLogger(__name__)

CREATING = "JOB_STATE_CREATING"
RUNNING = "JOB_STATE_RUNNING"
FAILED = "JOB_STATE_FAILED"
PAUSED = "JOB_STATE_PAUSED"
DELETING = "JOB_STATE_DELETING"
DELETED = "JOB_STATE_DELETED"

RESUMABLE = frozenset({FAILED, PAUSED})
HOLD_TIMEOUT_S = 120.0


@dataclass(slots=True, eq=False)
class Trainer:
    """The worker of a job, connected.

    Attributes:
        worker: its process.
        session: HTTP over its Unix socket; every request to it goes through here.
        lost: set once its process is known to be dead.
    """

    worker: Worker
    session: aiohttp.ClientSession
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class TrainerJobs:
    """All jobs of the platform."""

    def __init__(
        self, database: Database, workers: Workers, registry: Registry, state_dir: Path
    ) -> None:
        self._database = database
        self._workers = workers
        self._registry = registry
        self._state_dir = state_dir
        self._running: dict[str, Trainer] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}

    # -- reading ---------------------------------------------------------------------------------

    def get(self, id_: str) -> ResourceRow:
        """A job, tombstones too.

        Raises:
            Problem: 404.
        """
        row = self._database.get("job", id_)
        if row is None:
            raise Problem(404, f"no trainer job {id_!r}")
        return row

    def rows(self) -> list[ResourceRow]:
        """All jobs but the deleted."""
        return [row for row in self._database.rows("job") if row.state != DELETED]

    def trainer(self, id_: str) -> Trainer | None:
        """The connected worker of a job that is RUNNING."""
        return self._running.get(id_)

    def states_dir(self, id_: str) -> Path:
        """Where a job's trainer saves its states; kept when the job is deleted."""
        return self._state_dir / "jobs" / id_ / "states"

    # -- changing --------------------------------------------------------------------------------

    def create(self, id_: str, body: Body, notice: str) -> ResourceRow:
        """Create a job and start its worker in the background.

        Raises:
            Problem: 409 when the id is taken, by a tombstone too.
        """
        row = ResourceRow("job", id_, CREATING, notice, body)
        try:
            self._database.create(row)
        except AlreadyExists:
            state = self.get(id_).state
            raise Problem(409, f"trainer job {id_!r} exists already ({state})") from None
        self._begin(id_)
        return row

    def resume(self, id_: str) -> ResourceRow:
        """Start a new worker for a job whose worker is gone.

        Raises:
            Problem: 404; 409 in a state that can't be resumed.
        """
        row = self.get(id_)
        if row.state not in RESUMABLE:
            raise Problem(
                409,
                f"trainer job {id_!r} is {row.state}; only"
                f" {' and '.join(sorted(RESUMABLE))} can be resumed",
                code="FAILED_PRECONDITION",
            )
        row = self._set(id_, CREATING, "")
        self._begin(id_)
        return row

    async def delete(self, id_: str) -> None:
        """Stop a job's worker and leave a tombstone; its saved states stay.

        Raises:
            Problem: 404.
        """
        if self.get(id_).state == DELETED:
            return
        self._set(id_, DELETING, "")
        trainer = self._running.get(id_)
        if trainer is not None:
            trainer.lost.set()
        life = self._lives.pop(id_, None)
        if life is not None:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
        worker = self._workers.find("trainer", id_)
        if worker is not None:
            await self._workers.stop(worker)
        self._set(id_, DELETED, "deleted")

    # -- a job's life ----------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the jobs that an earlier gateway left."""
        for row in self._database.rows("job"):
            if row.state == DELETING:
                await self.delete(row.id)
            elif row.state in (CREATING, RUNNING):
                if self._workers.begun("trainer", row.id):
                    self._begin(row.id)
                else:
                    self._set(row.id, PAUSED, "the platform was stopped; :resume goes on")

    def owners(self) -> set[tuple[str, str]]:
        """The (kind, owner) of the workers that jobs claim."""
        return {("trainer", id_) for id_ in self._lives}

    async def close(self) -> None:
        """Let go of all workers; they live on for the next gateway."""
        lives = list(self._lives.values())
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)

    def _begin(self, id_: str) -> None:
        life = asyncio.create_task(self._live(id_), name=f"trainer job {id_}")
        self._lives[id_] = life

        def ended(task: asyncio.Task[None]) -> None:
            if self._lives.get(id_) is task:
                del self._lives[id_]

        life.add_done_callback(ended)

    async def _live(self, id_: str) -> None:
        """Start or find the worker, watch it, and note its end."""
        try:
            worker = await self._find_or_spawn(self.get(id_))
            async with _session(worker.socket) as session:
                await self._watch(id_, Trainer(worker, session))
        except (WorkerFailed, TooManyWorkers) as error:
            await self._fail(id_, str(error))
        except Exception as error:
            log.exception("trainer job %s", id_)
            await self._fail(id_, f"{type(error).__name__}: {error}")

    async def _fail(self, id_: str, reason: str) -> None:
        """Note a failed start, once nothing of it is left: a resume may follow at once."""
        worker = self._workers.find("trainer", id_)
        if worker is not None:
            await self._workers.stop(worker)
        self._set(id_, FAILED, reason)

    async def _find_or_spawn(self, row: ResourceRow) -> Worker:
        found = self._workers.find("trainer", row.id)
        if found is not None:
            return found
        if row.state == RUNNING:
            raise WorkerFailed("the trainer process died while the gateway was restarting")
        states = self.states_dir(row.id)
        snapshots = self._state_dir / "snapshots"
        for folder in (states, snapshots):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings = dict(cast(Body, row.body["worker"]))
        model = self._registry.models.get(str(settings["base_model"]))
        if model is None:
            raise WorkerFailed(f"the platform no longer serves {settings['base_model']}")
        settings |= {
            "job": row.id,
            "model_path": str(model.path),
            "states_dir": str(states),
            "snapshots_dir": str(snapshots),
        }
        return await self._workers.spawn("trainer", row.id, 0, settings)

    async def _watch(self, id_: str, trainer: Trainer) -> None:
        """RUNNING from the first answer to the end of the `alive` response."""

        async def attempt(_socket: Path) -> aiohttp.ClientResponse:
            try:
                async with trainer.session.get("http://trainer/api/v1/healthz") as health:
                    if health.status != 200:
                        raise WorkerFailed(f"the trainer's health check answered {health.status}")
                return await trainer.session.get(
                    "http://trainer/internal/alive", timeout=aiohttp.ClientTimeout(total=None)
                )
            except aiohttp.ClientConnectionError as error:
                raise ConnectionError(str(error)) from error

        response = await self._workers.connect(trainer.worker, attempt)
        try:
            if response.status != 200:
                raise WorkerFailed(f"the trainer's alive stream answered {response.status}")
            self._running[id_] = trainer
            row = self.get(id_)
            if row.state != RUNNING:
                self._set(id_, RUNNING, row.message)
            await _end_of(response)
            # Before anything else: requests in flight are waiting for this answer.
            trainer.lost.set()
            reason = self._workers.why_ended(trainer.worker)
            # The stream also ends with a process that is only on its way out: nothing may find it.
            trainer.worker.process.send(signal.SIGKILL)
            self._workers.gone(trainer.worker)
            self._set(id_, FAILED, reason)
            log.warning("trainer job %s lost its worker: %s", id_, reason)
        finally:
            self._running.pop(id_, None)
            response.close()

    def _set(self, id_: str, state: str, message: str) -> ResourceRow:
        return self._database.update(replace(self.get(id_), state=state, message=message))


def _session(socket: Path) -> aiohttp.ClientSession:
    """HTTP to one worker. Its bodies pass through, so nothing is decoded."""
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(str(socket), limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=HOLD_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def _end_of(response: aiohttp.ClientResponse) -> None:
    try:
        while await response.content.readany():
            continue
    except aiohttp.ClientError:
        return  # the process died, which is what was waited for
