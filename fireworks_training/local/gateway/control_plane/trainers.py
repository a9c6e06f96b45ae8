"""Trainer jobs: one worker process each, from creation to its end.

Knows the states of a job and how its worker is watched; the operations that clients send to the
trainer pass through `trainer_proxy` unread. States:

    PENDING -> CREATING -> RUNNING         a place is free, the worker starts, it answers
    RUNNING -> FAILED                      the worker died
    RUNNING -> PAUSED                      nothing was sent to it for long, or the platform stopped
    FAILED, PAUSED -> PENDING, CREATING    :resume, with a new worker and an empty memory
    any -> DELETING -> DELETED             a tombstone: the id is not used again
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import aiohttp

from fireworks_training.local.gateway.control_plane.conditions import Conditions
from fireworks_training.local.gateway.control_plane.workers import (
    TooManyWorkers,
    Worker,
    WorkerFailed,
    Workers,
)
from fireworks_training.local.gateway.inference.registry import ServingRegistry
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.processes.worker_entry import leave_reason
from fireworks_training.local.settings import ACCOUNT
from fireworks_training.local.store.database import AlreadyExists, Body, Database, ResourceRow

log = logging.getLogger(__name__)

PENDING = "JOB_STATE_PENDING"
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
        last_used: when something was last sent to it, in the loop's time.
        in_use: requests that are on their way through it.
    """

    worker: Worker
    session: aiohttp.ClientSession
    last_used: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    in_use: int = 0

    @contextmanager
    def used(self) -> Iterator[None]:
        """Count as activity, from here to the end of the block."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1
            self.last_used = asyncio.get_running_loop().time()


def resource_name(id_: str) -> str:
    """The full name of a trainer job."""
    return f"accounts/{ACCOUNT}/rlorTrainerJobs/{id_}"


class TrainerJobs:
    """All jobs of the platform."""

    def __init__(
        self,
        database: Database,
        workers: Workers,
        registry: ServingRegistry,
        state_dir: Path,
        conditions: Conditions,
    ) -> None:
        self._database = database
        self._conditions = conditions
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
            raise HttpProblem(404, f"no trainer job {id_!r}")
        return row

    def rows(self) -> list[ResourceRow]:
        """All jobs but the deleted."""
        return [row for row in self._database.rows("job") if row.state != DELETED]

    def trainer(self, id_: str) -> Trainer | None:
        """The connected worker of a job that is RUNNING."""
        return self._running.get(id_)

    def lives(self, id_: str) -> bool:
        """Whether a job waits, starts or runs."""
        return id_ in self._lives

    def states_dir(self, id_: str) -> Path:
        """Where a job's trainer saves its states; kept when the job is deleted."""
        return self._state_dir / "jobs" / id_ / "states"

    # -- changing --------------------------------------------------------------------------------

    def create(self, id_: str, body: Body, notice: str) -> ResourceRow:
        """Create a job and start its worker in the background.

        Raises:
            Problem: 409 when the id is taken, by a tombstone too.
        """
        row = ResourceRow("job", id_, CREATING, notice, {**body, "notice": notice})
        try:
            self._database.create(row)
        except AlreadyExists:
            state = self.get(id_).state
            raise HttpProblem(409, f"trainer job {id_!r} exists already ({state})") from None
        self._begin(id_)
        return row

    async def fail(self, id_: str, reason: str) -> None:
        """Fail a job as if its trainer had; no effect on one that has ended.

        Raises:
            Problem: 404.
        """
        self.get(id_)
        trainer, life = self._running.get(id_), self._lives.get(id_)
        if trainer is not None:
            leave_reason(trainer.worker.row.socket, reason)
            trainer.worker.process.send(signal.SIGKILL)
        elif life is not None:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            await self._fail(id_, reason)

    def resume(self, id_: str) -> ResourceRow:
        """Start a new worker for a job whose worker is gone.

        Raises:
            Problem: 404; 409 in a state that can't be resumed.
        """
        row = self.get(id_)
        if row.state not in RESUMABLE:
            raise HttpProblem(
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
            elif row.state == RUNNING and not self._workers.begun("trainer", row.id):
                self._set(row.id, PAUSED, "the platform was stopped; :resume goes on")
            elif row.state in (PENDING, CREATING, RUNNING):
                # One that had not started yet has lost nothing: it starts now.
                self._begin(row.id)

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
            found = self._workers.find("trainer", id_)
            if found is not None:
                async with self._conditions.kept_place("trainer", id_):
                    await self._serve(id_, found)
                return
            if self.get(id_).state == RUNNING:
                raise WorkerFailed("the trainer process died while the gateway was restarting")
            resource = resource_name(id_)
            async with self._conditions.place("trainer", id_, resource, partial(self._waits, id_)):
                row = self._set(id_, CREATING, str(self.get(id_).body.get("notice", "")))
                await self._conditions.delay("trainer", resource)
                if failure := self._conditions.take_failure(resource):
                    raise WorkerFailed(failure)
                await self._serve(id_, await self._spawn(row))
        except (WorkerFailed, TooManyWorkers) as error:
            await self._fail(id_, str(error))
        except Exception as error:
            log.exception("trainer job %s", id_)
            await self._fail(id_, f"{type(error).__name__}: {error}")

    def _waits(self, id_: str, reason: str) -> None:
        self._set(id_, PENDING, reason)

    async def _serve(self, id_: str, worker: Worker) -> None:
        async with _session(worker.socket) as session:
            await self._watch(
                id_, Trainer(worker, session, last_used=asyncio.get_running_loop().time())
            )

    async def _fail(self, id_: str, reason: str) -> None:
        """Note a failed start, once nothing of it is left: a resume may follow at once."""
        worker = self._workers.find("trainer", id_)
        if worker is not None:
            await self._workers.stop(worker)
        self._set(id_, FAILED, reason)

    async def _spawn(self, row: ResourceRow) -> Worker:
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
            "forward_only": cast(Body, row.body["resource"]).get("forwardOnly") is True,
            "states_dir": str(states),
            "snapshots_dir": str(snapshots),
            "session_timeout_s": self._conditions.limits.session_timeout_s,
        }
        if row.body.get("tinker"):
            settings["tinker_dir"] = str(self._state_dir / "tinker")
        return await self._workers.spawn("trainer", row.id, 0, settings)

    async def _watch(self, id_: str, trainer: Trainer) -> None:
        """RUNNING from the first answer to the end of the `alive` response."""
        # Closed here whatever happens: a cancellation may fall between its arrival and its use.
        opened: list[aiohttp.ClientResponse] = []

        async def attempt(_socket: Path) -> aiohttp.ClientResponse:
            try:
                async with trainer.session.get("http://trainer/api/v1/healthz") as health:
                    if health.status != 200:
                        raise WorkerFailed(f"the trainer's health check answered {health.status}")
                opened.append(
                    await trainer.session.get(
                        "http://trainer/internal/alive", timeout=aiohttp.ClientTimeout(total=None)
                    )
                )
                return opened[-1]
            except aiohttp.ClientConnectionError as error:
                raise ConnectionError(str(error)) from error

        try:
            response = await self._workers.connect(trainer.worker, attempt)
            if response.status != 200:
                raise WorkerFailed(f"the trainer's alive stream answered {response.status}")
            self._running[id_] = trainer
            row = self.get(id_)
            if row.state != RUNNING:
                self._set(id_, RUNNING, row.message)
            if await self._until_idle(id_, trainer, response):
                await self._pause(id_, trainer)
                return
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
            for response in opened:
                response.close()

    async def _until_idle(self, id_: str, trainer: Trainer, alive: aiohttp.ClientResponse) -> bool:
        """Wait for the end of the worker (False), or until nobody has used it for long (True)."""
        ended = asyncio.create_task(_end_of(alive))
        try:
            while not ended.done():
                limit = self._inactivity_s(id_)
                now = asyncio.get_running_loop().time()
                left = None if limit is None else trainer.last_used + limit - now
                if trainer.in_use:
                    left = limit
                elif left is not None and left <= 0:
                    return True
                changed = asyncio.create_task(self._conditions.change(left))
                await asyncio.wait({ended, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            return False
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def _inactivity_s(self, id_: str) -> float | None:
        """What the job asked for, else what the platform does; None = it is never stopped."""
        asked = self.get(id_).body
        if "inactivity_s" in asked:
            return cast("float | None", asked["inactivity_s"])
        return self._conditions.limits.inactivity_timeout_s

    async def _pause(self, id_: str, trainer: Trainer) -> None:
        """Stop a worker that nobody uses."""
        limit = self._inactivity_s(id_)
        reason = f"stopped after {limit:g} s without an operation or a heartbeat; :resume goes on"
        self._running.pop(id_, None)
        self._set(id_, PAUSED, reason)
        trainer.lost.set()
        await self._workers.stop(trainer.worker)
        log.info("trainer job %s %s", id_, reason)

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
