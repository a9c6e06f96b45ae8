"""Worker processes as the gateway sees them: spawned through the template, found again, ended.

Knows the way to a running worker, the same for a trainer and for an engine: a place first, then the
delay and the failure that somebody asked for (`conditions`), then the spawn. Every worker is a row
in the database before it is spawned, so that a gateway that starts again finds it by its socket.
Does not know what a worker does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar, cast

from fireworks_training.local.gateway.control_plane.conditions import Conditions
from fireworks_training.local.processes.lifetime import ProcessIdentity
from fireworks_training.local.processes.worker_entry import failure_reason
from fireworks_training.local.settings import WorkerKind
from fireworks_training.local.store.database import Database, WorkerRow

log = logging.getLogger(__name__)

MAX_WORKERS = 64
TEMPLATE_TIMEOUT_S = 60.0
READY_BUDGET_S = 120.0
FIRST_POLL_S = 0.01
LAST_POLL_S = 0.1
STOP_GRACE_S = 2.0

Connected = TypeVar("Connected")


class WorkerFailed(Exception):
    """Raised when a worker could not be started, or ended before it was ready; says why."""


class FailedOnDemand(WorkerFailed):
    """Raised when the failure of a start is due that somebody has set as a fault."""


class TooManyWorkers(WorkerFailed):
    """Raised when the platform runs as many workers as it allows."""


class Process(Protocol):
    """Identifies a worker's process for certain (see `lifetime.ProcessIdentity`)."""

    @property
    def pid(self) -> int: ...
    @property
    def started(self) -> str: ...
    def alive(self) -> bool: ...
    def send(self, signum: int, /) -> bool: ...


class Spawner(Protocol):
    """Makes worker processes; repeating a spawn for a living socket makes no second one."""

    async def spawn(self, kind: str, settings: dict[str, object]) -> Process:
        """Start a worker that will serve `settings["socket"]`.

        Raises:
            WorkerFailed: it could not be started.
        """
        ...

    def find(self, pid: int, started: str) -> Process:
        """Return the process of an earlier spawn."""
        ...


class TemplateSpawner:
    """Asks the template process for workers, over its Unix socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def spawn(self, kind: str, settings: dict[str, object]) -> Process:
        """Start a worker as `Spawner.spawn` says; wait while a dead template is being replaced."""
        request: dict[str, object] = {"op": "spawn", "kind": kind, "settings": settings}
        # A template that dies after it took the request answers with EOF: the spawn is repeated.
        for _ in range(3):
            answer = await self._ask(request)
            if answer is not None:
                break
        else:
            raise WorkerFailed("the template process died again and again; see the platform's log")
        if "error" in answer:
            raise WorkerFailed(str(answer["error"]))
        return ProcessIdentity(cast(int, answer["pid"]), str(answer["started"]))

    def find(self, pid: int, started: str) -> Process:
        """Return the process of an earlier spawn, as `Spawner.find` says."""
        return ProcessIdentity(pid, started)

    async def _ask(self, request: dict[str, object]) -> dict[str, object] | None:
        try:
            async with asyncio.timeout(TEMPLATE_TIMEOUT_S):
                reader, writer = await asyncio.open_unix_connection(str(self._socket))
                try:
                    writer.write(json.dumps(request).encode() + b"\n")
                    line = await reader.readline()
                finally:
                    writer.close()
        except TimeoutError:
            raise WorkerFailed(
                f"the template process did not answer within {TEMPLATE_TIMEOUT_S:.0f} s"
            ) from None
        except (ConnectionError, FileNotFoundError):
            return None
        return cast("dict[str, object]", json.loads(line)) if line else None


@dataclass(frozen=True, slots=True)
class Worker:
    """Joins the row and the process of a spawned worker."""

    row: WorkerRow
    process: Process

    @property
    def socket(self) -> Path:
        """Path of its Unix socket."""
        return Path(self.row.socket)


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """Describes a worker that is to run.

    Attributes:
        kind: "trainer" or "engine".
        owner: id of its job or deployment.
        replica: 0 for trainers; the replica's number for engines.
        resource: full name of the owner, under which faults are set.
        report: called with the reason each time the start has to wait for a place, and with an
            empty text once it has one.
        settings: called when the worker is spawned; what its process is told.
    """

    kind: WorkerKind
    owner: str
    replica: int
    resource: str
    report: Callable[[str], None]
    settings: Callable[[], dict[str, object]]


class Workers:
    """Starts, finds and ends the workers of this platform.

    Args:
        database: holds their rows.
        spawner: makes their processes.
        runtime_dir: folder of their sockets.
        conditions: limits and faults that each start has to get past.
    """

    def __init__(
        self, database: Database, spawner: Spawner, runtime_dir: Path, conditions: Conditions
    ) -> None:
        self._database = database
        self._spawner = spawner
        self._runtime_dir = runtime_dir
        self._conditions = conditions

    @asynccontextmanager
    async def running(self, start: WorkerStart) -> AsyncGenerator[Worker]:
        """Hold a place for a worker while the block runs, with the worker in it.

        The worker is the one that an earlier gateway left for this owner, or a new one.

        Raises:
            WorkerFailed: it could not be started.
        """
        kind, resource = start.kind, start.resource
        holder = start.owner if kind == "trainer" else f"{start.owner}/{start.replica}"
        found = self.find(kind, start.owner, start.replica)
        if found is not None:
            with self._conditions.kept_place(kind, holder):
                yield found
            return
        async with self._conditions.place(kind, holder, resource, start.report):
            start.report("")
            await self._conditions.delay(kind, resource)
            if failure := self._conditions.take_failure(resource):
                raise FailedOnDemand(failure)
            yield await self.spawn(kind, start.owner, start.replica, start.settings())

    async def spawn(
        self, kind: WorkerKind, owner: str, replica: int, settings: dict[str, object]
    ) -> Worker:
        """Start a worker, or take up the spawn that an earlier gateway had begun for this owner.

        Raises:
            WorkerFailed: it could not be started.
            TooManyWorkers: there are `MAX_WORKERS` already.
        """
        row = self._row(kind, owner, replica)
        if row is None:
            if len(self._database.workers()) >= MAX_WORKERS:
                raise TooManyWorkers(f"this platform runs at most {MAX_WORKERS} workers at once")
            number = self._database.next_number("worker")
            socket = self._runtime_dir / f"{kind[0]}-{number}.sock"
            row = WorkerRow(str(socket), kind, owner, replica)
            self._database.put_worker(row)
        # A caller that is cancelled must not leave a process that no row knows.
        return await _finish_if_cancelled(self._spawn_and_note(row, settings))

    async def _spawn_and_note(self, row: WorkerRow, settings: dict[str, object]) -> Worker:
        try:
            process = await self._spawner.spawn(row.kind, {**settings, "socket": row.socket})
        except WorkerFailed:
            self._database.forget_worker(row.socket)
            raise
        row = replace(row, pid=process.pid, started=process.started)
        self._database.put_worker(row)
        return Worker(row, process)

    def find(self, kind: WorkerKind, owner: str, replica: int = 0) -> Worker | None:
        """Return the living worker of this owner, or None."""
        row = self._row(kind, owner, replica)
        if row is None or row.pid is None or row.started is None:
            return None
        process = self._spawner.find(row.pid, row.started)
        if process.alive():
            return Worker(row, process)
        self._database.forget_worker(row.socket)
        return None

    def forget_foreign(self) -> None:
        """Drop the rows of an earlier platform on this state folder: its workers ended with it."""
        for row in self._database.workers():
            if Path(row.socket).parent != self._runtime_dir:
                self._database.forget_worker(row.socket)

    async def end_orphans(self, owners: set[tuple[str, str]]) -> None:
        """End the workers whose (kind, owner) nobody claims."""
        for row in self._database.workers():
            if (row.kind, row.owner) not in owners:
                if row.pid is not None and row.started is not None:
                    await self.stop(Worker(row, self._spawner.find(row.pid, row.started)))
                else:
                    self._database.forget_worker(row.socket)

    def begun(self, kind: WorkerKind, owner: str) -> bool:
        """Return whether a spawn was begun for this owner on this platform."""
        return self._row(kind, owner, 0) is not None

    async def connect(
        self, worker: Worker, attempt: Callable[[Path], Awaitable[Connected]]
    ) -> Connected:
        """Connect to a worker once it serves its socket.

        Args:
            worker: the worker.
            attempt: tries once, or waits by itself; ConnectionError and FileNotFoundError mean
                that the worker does not serve yet.

        Raises:
            WorkerFailed: it ended first, or took longer than its budget.
        """
        trying = asyncio.ensure_future(_until_connected(worker.socket, attempt))
        deadline = asyncio.get_running_loop().time() + READY_BUDGET_S
        try:
            while not trying.done():
                alive = worker.process.alive()
                await asyncio.wait({trying}, timeout=LAST_POLL_S)
                if trying.done():
                    break
                if not alive:
                    raise WorkerFailed(self.why_ended(worker))
                if asyncio.get_running_loop().time() > deadline:
                    raise WorkerFailed(
                        f"the {worker.row.kind} process was not ready within {READY_BUDGET_S:.0f} s"
                    )
            return trying.result()
        finally:
            trying.cancel()
            await asyncio.gather(trying, return_exceptions=True)

    def why_ended(self, worker: Worker) -> str:
        """Return what is known of the end of a worker, in one sentence."""
        reason = failure_reason(worker.socket)
        what = f"the {worker.row.kind} process (pid {worker.process.pid})"
        return f"{what} failed: {reason}" if reason else f"{what} was killed or ended by itself"

    async def stop(self, worker: Worker, grace_s: float = STOP_GRACE_S) -> None:
        """End a worker: SIGTERM, and SIGKILL after the grace; returns when it is gone."""
        worker.process.send(signal.SIGTERM)
        if not await _ended(worker.process, grace_s):
            log.warning("worker %d did not end in %.0f s; killing it", worker.process.pid, grace_s)
            worker.process.send(signal.SIGKILL)
            await _ended(worker.process, grace_s)
        self.gone(worker)

    async def stop_of(
        self, kind: WorkerKind, owner: str, replica: int = 0, grace_s: float = STOP_GRACE_S
    ) -> None:
        """End the worker of an owner, if it has one; its successor must not be taken for it."""
        worker = self.find(kind, owner, replica)
        if worker is not None:
            await self.stop(worker, grace_s)

    def gone(self, worker: Worker) -> None:
        """Note that a worker has ended."""
        worker.socket.unlink(missing_ok=True)
        self._database.forget_worker(worker.row.socket)

    def _row(self, kind: str, owner: str, replica: int) -> WorkerRow | None:
        for row in self._database.workers():
            if (row.kind, row.owner, row.replica) == (kind, owner, replica):
                return row
        return None


async def _until_connected(
    socket: Path, attempt: Callable[[Path], Awaitable[Connected]]
) -> Connected:
    delay = FIRST_POLL_S
    while True:
        try:
            return await attempt(socket)
        except (ConnectionError, FileNotFoundError):
            await asyncio.sleep(delay)
        delay = min(delay * 1.5, LAST_POLL_S)


async def _finish_if_cancelled(work: Coroutine[None, None, Worker]) -> Worker:
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _ended(process: Process, within_s: float) -> bool:
    deadline = asyncio.get_running_loop().time() + within_s
    while process.alive():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(FIRST_POLL_S)
    return True
