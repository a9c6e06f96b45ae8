"""Trainer jobs: one worker process each, from creation to its end.

Knows the states of a job and how its worker is watched. Does not know the operations that clients
send to a trainer: they pass through `trainer_proxy` unread. States:

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
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import aiohttp

from fireworks_training.local.gateway.control_plane.conditions import Conditions
from fireworks_training.local.gateway.control_plane.resource_table import ResourceTable
from fireworks_training.local.gateway.control_plane.workers import (
    Worker,
    WorkerFailed,
    Workers,
    WorkerStart,
)
from fireworks_training.local.gateway.inference.registry import ServingRegistry
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.gateway.web.tasks import RunningTasks
from fireworks_training.local.processes.worker_entry import leave_reason
from fireworks_training.local.settings import JOB_PREFIX
from fireworks_training.local.store.database import Body, Database, ResourceRow

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
    """Holds the connection to the worker of a job.

    Attributes:
        worker: the process.
        session: HTTP over its Unix socket; every request to it goes through here.
        lost: set once its process is known to be dead.
        last_used: time of the last request to it, on the loop's clock.
        in_use: requests that are on their way through it.
    """

    worker: Worker
    session: aiohttp.ClientSession
    last_used: float
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    in_use: int = 0

    @contextmanager
    def used(self) -> Generator[None]:
        """Count the block as activity, up to its end."""
        self.in_use += 1
        try:
            yield
        finally:
            self.in_use -= 1
            self.last_used = asyncio.get_running_loop().time()


class TrainerJobs:
    """Creates, watches and deletes the trainer jobs of the platform.

    Attributes:
        table: the rows of the jobs.

    Args:
        registry: the models that a job may train.
        state_dir: folder of the platform's saved states and snapshots.
        conditions: the limits that a running job is held to.
        atomic_steps: whether the trainers enforce whole steps.
    """

    def __init__(
        self,
        database: Database,
        workers: Workers,
        registry: ServingRegistry,
        state_dir: Path,
        conditions: Conditions,
        *,
        atomic_steps: bool = True,
    ) -> None:
        self.table = ResourceTable(database, "job", "trainer job")
        self._atomic_steps = atomic_steps
        self._conditions = conditions
        self._workers = workers
        self._registry = registry
        self._state_dir = state_dir
        self._running: dict[str, Trainer] = {}
        self._lives = RunningTasks[str]()

    # -- reading ---------------------------------------------------------------------------------

    def trainer(self, id_: str) -> Trainer | None:
        """Return the connected worker of a job that is RUNNING, or None."""
        return self._running.get(id_)

    def lives(self, id_: str) -> bool:
        """Return whether a job waits, starts or runs."""
        return id_ in self._lives

    def states_dir(self, id_: str) -> Path:
        """Return the folder of a job's saved states; it is kept when the job is deleted."""
        return self._state_dir / "jobs" / id_ / "states"

    # -- changing --------------------------------------------------------------------------------

    def create(self, id_: str, body: Body, notice: str) -> ResourceRow:
        """Create a job and start its worker in the background.

        Raises:
            HttpProblem: 409 when the id is taken, by a tombstone too.
        """
        row = self.table.create(id_, CREATING, notice, {**body, "notice": notice})
        self._begin(id_)
        return row

    async def fail(self, id_: str, reason: str) -> None:
        """Fail a job as if its trainer had; no effect on one that has ended.

        Raises:
            HttpProblem: 404.
        """
        self.table.get(id_)
        trainer = self._running.get(id_)
        if trainer is not None:
            leave_reason(trainer.worker.row.socket, reason)
            trainer.worker.process.send(signal.SIGKILL)
        elif await self._lives.cancel(id_):
            await self._fail(id_, reason)

    def resume(self, id_: str) -> ResourceRow:
        """Start a new worker for a job whose worker is gone.

        Raises:
            HttpProblem: 404; 409 in a state that can't be resumed.
        """
        row = self.table.get(id_)
        if row.state not in RESUMABLE:
            raise HttpProblem(
                409,
                f"trainer job {id_!r} is {row.state}; only"
                f" {' and '.join(sorted(RESUMABLE))} can be resumed",
                code="FAILED_PRECONDITION",
            )
        row = self.table.change(id_, state=CREATING, message="")
        self._begin(id_)
        return row

    async def delete(self, id_: str) -> None:
        """Stop a job's worker and leave a tombstone; its saved states stay.

        Raises:
            HttpProblem: 404.
        """
        if self.table.get(id_).state == DELETED:
            return
        self.table.change(id_, state=DELETING, message="")
        trainer = self._running.get(id_)
        if trainer is not None:
            trainer.lost.set()
        await self._lives.cancel(id_)
        await self._workers.stop_of("trainer", id_)
        self.table.change(id_, state=DELETED, message="deleted")

    # -- a job's life ----------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the jobs that an earlier gateway left."""
        for row in self.table.present():
            if row.state == DELETING:
                await self.delete(row.id)
            elif row.state == RUNNING and not self._workers.begun("trainer", row.id):
                message = "the platform was stopped; :resume goes on"
                self.table.change(row.id, state=PAUSED, message=message)
            elif row.state in (PENDING, CREATING, RUNNING):
                # One that had not started yet has lost nothing: it starts now.
                self._begin(row.id)

    def owners(self) -> set[tuple[str, str]]:
        """Return the (kind, owner) of the workers that jobs claim."""
        return {("trainer", id_) for id_ in self._lives}

    async def close(self) -> None:
        """Let go of all workers; they live on for the next gateway."""
        await self._lives.close()

    def _begin(self, id_: str) -> None:
        self._lives.start(id_, self._live(id_), f"trainer job {id_}")

    async def _live(self, id_: str) -> None:
        """Start or find the worker, watch it, and note its end."""
        report, settings = partial(self._report, id_), partial(self._worker_settings, id_)
        start = WorkerStart("trainer", id_, 0, f"{JOB_PREFIX}{id_}", report, settings)
        try:
            if self.table.get(id_).state == RUNNING and not self._workers.find("trainer", id_):
                raise WorkerFailed("the trainer process died while the gateway was restarting")
            async with self._workers.running(start) as worker, _session(worker.socket) as session:
                now = asyncio.get_running_loop().time()
                await self._watch(id_, Trainer(worker, session, last_used=now))
        except WorkerFailed as error:
            await self._fail(id_, str(error))
        except Exception as error:
            log.exception("trainer job %s", id_)
            await self._fail(id_, f"{type(error).__name__}: {error}")

    def _report(self, id_: str, reason: str) -> None:
        """Show that a start waits for a place, or that it has one."""
        if reason:
            self.table.change(id_, state=PENDING, message=reason)
        else:
            notice = str(self.table.get(id_).body.get("notice", ""))
            self.table.change(id_, state=CREATING, message=notice)

    async def _fail(self, id_: str, reason: str) -> None:
        """Note a failed start, once nothing of it is left: a resume may follow at once."""
        await self._workers.stop_of("trainer", id_)
        self.table.change(id_, state=FAILED, message=reason)

    def _worker_settings(self, id_: str) -> dict[str, object]:
        row = self.table.get(id_)
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
            "atomic_steps": self._atomic_steps,
            "max_models": self._conditions.limits.max_models,
        }
        if row.body.get("tinker"):
            settings["tinker_dir"] = str(self._state_dir / "tinker")
        return settings

    async def _watch(self, id_: str, trainer: Trainer) -> None:
        """Keep a job RUNNING from its trainer's first answer to the end of the `alive` response."""
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
            if self.table.get(id_).state != RUNNING:
                self.table.change(id_, state=RUNNING)
            if await self._until_idle(id_, trainer, response):
                await self._pause(id_, trainer)
                return
            # Before anything else: requests in flight are waiting for this answer.
            trainer.lost.set()
            reason = self._workers.why_ended(trainer.worker)
            # The stream also ends with a process that is only on its way out: nothing may find it.
            trainer.worker.process.send(signal.SIGKILL)
            self._workers.gone(trainer.worker)
            self.table.change(id_, state=FAILED, message=reason)
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
        """Return what the job asked for, else the platform's limit; None = it is never stopped."""
        asked = self.table.get(id_).body
        if "inactivity_s" in asked:
            return cast("float | None", asked["inactivity_s"])
        return self._conditions.limits.inactivity_timeout_s

    async def _pause(self, id_: str, trainer: Trainer) -> None:
        """Stop a worker that nobody uses."""
        limit = self._inactivity_s(id_)
        reason = f"stopped after {limit:g} s without an operation or a heartbeat; :resume goes on"
        self._running.pop(id_, None)
        self.table.change(id_, state=PAUSED, message=reason)
        trainer.lost.set()
        await self._workers.stop(trainer.worker)
        log.info("trainer job %s %s", id_, reason)


def _session(socket: Path) -> aiohttp.ClientSession:
    """Open HTTP to one worker; its bodies pass through, so nothing is decoded."""
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
