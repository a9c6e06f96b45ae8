"""Deployments: engines kept running, one worker process a replica.

Knows the states of a deployment and how its engines are started, found again and replaced; the
requests to the engines are made by the inference and hot-load routes. States:

    CREATING -> READY            every wanted engine is connected and holds the loaded snapshot
    READY <-> UPDATING           scaled, or an engine is being replaced
    any -> FAILED                its engines died again and again
    any -> DELETING -> DELETED   gone at once when deleted with `hard`

Scaled to zero is READY with no engine; a request for it wakes it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fireworks_training.local.gateway.control_plane.conditions import Conditions
from fireworks_training.local.gateway.control_plane.resources import SNAPSHOT_DTYPES
from fireworks_training.local.gateway.control_plane.workers import (
    TooManyWorkers,
    Worker,
    WorkerFailed,
    Workers,
)
from fireworks_training.local.gateway.inference.registry import LiveDeployment, ServingRegistry
from fireworks_training.local.gateway.inference.states import DeploymentState, Transition
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.processes.restarts import RestartPolicy
from fireworks_training.local.settings import ACCOUNT
from fireworks_training.local.store.database import AlreadyExists, Body, Database, ResourceRow
from fireworks_training.local.store.retention import clean
from fireworks_training.local.store.snapshots import SnapshotStore
from fireworks_training.local.store.tinker_store import TinkerStore

if TYPE_CHECKING:
    from fireworks_training.local.gateway.inference.engine_client import EngineClient

log = logging.getLogger(__name__)

MAX_SLOTS = 128
"""Streams that an engine decodes together; on two cores more of them are no faster, and a window
that follows the queue would not see that."""

CLEAN_EVERY_S = 60.0
"""Seconds between two looks for snapshots that may go."""
ENGINE_GRACE_S = 0.3
"""Seconds that an engine has to end by itself: it has nothing to save, and one that still loads
torch hears no signal."""

TOMBSTONES = frozenset({"DELETED"})


class FailedOnDemand(Exception):
    """A fault that somebody set came due."""


# Makes a connected client of an engine that serves a socket; raises ConnectionError or
# FileNotFoundError while it does not serve yet.
ConnectEngine = Callable[[Path, str], Awaitable["EngineClient"]]


def resource_name(id_: str) -> str:
    """The full name of a deployment."""
    return f"accounts/{ACCOUNT}/deployments/{id_}"


class Deployments:
    """All deployments of the platform."""

    def __init__(
        self,
        database: Database,
        workers: Workers,
        registry: ServingRegistry,
        state_dir: Path,
        connect: ConnectEngine,
        conditions: Conditions,
    ) -> None:
        self._database = database
        self._conditions = conditions
        self._workers = workers
        self._registry = registry
        self._state_dir = state_dir
        self._connect = connect
        self._replicas: dict[str, dict[int, asyncio.Task[None]]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        # What an engine loaded before it joined, until the next hot load of the deployment.
        self._joined_with: dict[EngineClient, str | None] = {}
        self._reloads: set[asyncio.Task[None]] = set()
        self._clean_from = 0.0
        registry.waker = self.wake
        registry.recorder = self._record_loaded

    # -- reading ---------------------------------------------------------------------------------

    def get(self, id_: str) -> ResourceRow:
        """A deployment, tombstones too.

        Raises:
            Problem: 404.
        """
        row = self._database.get("deployment", id_)
        if row is None:
            raise HttpProblem(404, f"no deployment {id_!r}")
        return row

    def rows(self) -> list[ResourceRow]:
        """All deployments but the deleted."""
        return [row for row in self._database.rows("deployment") if row.state not in TOMBSTONES]

    def replicas(self, id_: str) -> int:
        """Engines that are connected."""
        live = self._registry.deployments.get(resource_name(id_))
        return len(live.engines) if live is not None else 0

    def lives(self, id_: str) -> bool:
        """Whether a deployment is there and has not ended."""
        live = self._registry.deployments.get(resource_name(id_))
        return live is not None and live.state not in ("FAILED", "DELETING", "DELETED")

    # -- changing --------------------------------------------------------------------------------

    def create(self, id_: str, body: Body, notice: str) -> ResourceRow:
        """Create a deployment and start its engines in the background; replaces a tombstone.

        Raises:
            Problem: 409 when there is a deployment of this id.
        """
        old = self._database.get("deployment", id_)
        if old is not None and old.state in TOMBSTONES:
            self._database.forget("deployment", id_)
        row = ResourceRow("deployment", id_, "CREATING", notice, {**body, "notice": notice})
        try:
            self._database.create(row)
        except AlreadyExists:
            state = self.get(id_).state
            raise HttpProblem(409, f"deployment {id_!r} exists already ({state})") from None
        self._bring_up(row)
        return self.get(id_)

    def patch(self, id_: str, body: Body) -> ResourceRow:
        """Store a changed body and bring the engines in line with it in the background.

        Raises:
            Problem: 404; 409 for a deployment that has failed or is being deleted.
        """
        row = self.get(id_)
        live = self._registry.deployments.get(resource_name(id_))
        if live is None or row.state in ("FAILED", "DELETING"):
            raise HttpProblem(
                409, f"deployment {id_!r} is {row.state}; delete it", code="FAILED_PRECONDITION"
            )
        self._database.update(replace(row, body=body))
        self._apply(live, id_)
        return self.get(id_)

    async def fail(self, id_: str, reason: str) -> None:
        """Fail a deployment and end its engines; no effect on one that has ended.

        Raises:
            Problem: 404.
        """
        self.get(id_)
        live = self._registry.deployments.get(resource_name(id_))
        if live is not None and live.state != "DELETING":
            self._set_state(live, id_, "FAILED", reason)
            await self._end_replicas(id_, live, keep=0)

    async def kill_replica(self, id_: str, number: int) -> None:
        """Kill one engine, which its keeper replaces.

        Raises:
            Problem: 404.
        """
        self.get(id_)
        worker = self._workers.find("engine", id_, number)
        if worker is None:
            raise HttpProblem(404, f"deployment {id_!r} has no replica {number}")
        worker.process.send(signal.SIGKILL)

    async def delete(self, id_: str, *, hard: bool) -> None:
        """Stop a deployment's engines; leave a tombstone, or nothing when `hard`.

        Raises:
            Problem: 404.
        """
        row = self.get(id_)
        live = self._registry.deployments.get(resource_name(id_))
        if live is not None:
            self._set_state(live, id_, "DELETING", "")
            await self._end_replicas(id_, live, keep=0)
            live.state = "DELETED"
            del self._registry.deployments[live.resource]
            self._replicas.pop(id_, None)
        if hard:
            self._database.forget("deployment", id_)
        else:
            self._database.update(replace(row, state="DELETED", message="deleted"))

    async def wake(self, resource: str) -> None:
        """See `ServingRegistry.wake`."""
        live = self._registry.deployments.get(resource)
        if live is None:
            raise LookupError(f"no deployment {resource!r}")
        id_ = resource.rsplit("/", 1)[-1]
        if live.desired_replicas == 0 and live.state != "FAILED":
            row = self.get(id_)
            count = cast(int, row.body["awake"])
            shown = {**cast(Body, row.body["resource"]), "maxReplicaCount": count}
            log.info("deployment %s is woken by a request: %d replicas", id_, count)
            self._database.update(replace(row, body={**row.body, "resource": shown}))
            self._apply(live, id_)
        while live.state not in ("READY", "FAILED", "DELETING", "DELETED"):
            await self._event(resource).wait()
        if live.state != "READY":
            row_message = self.get(id_).message if live.state == "FAILED" else ""
            raise RuntimeError(f"deployment {id_!r} is {live.state} {row_message}".strip())

    # -- recovery --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the deployments that an earlier gateway left."""
        for row in self._database.rows("deployment"):
            if row.state == "DELETING":
                self._database.forget("deployment", row.id)
            elif row.state not in (*TOMBSTONES, "FAILED"):
                self._bring_up(row)

    def owners(self) -> set[tuple[str, str]]:
        """The (kind, owner) of the workers that deployments claim."""
        return {("engine", id_) for id_ in self._replicas}

    async def close(self) -> None:
        """Let go of all engines; they live on for the next gateway."""
        tasks = [task for replicas in self._replicas.values() for task in replicas.values()]
        for task in [*tasks, *self._reloads]:
            task.cancel()
        await asyncio.gather(*tasks, *self._reloads, return_exceptions=True)

    # -- engines ---------------------------------------------------------------------------------

    def _bring_up(self, row: ResourceRow) -> None:
        model = self._registry.models.get(str(row.body["model"]))
        if model is None:
            message = f"the platform no longer serves {row.body['model']}"
            self._database.update(replace(row, state="FAILED", message=message))
            return
        live = LiveDeployment(
            resource=resource_name(row.id),
            base_model=str(cast(Body, row.body["resource"])["baseModel"]),
            model=model,
            state="CREATING" if row.state == "CREATING" else "UPDATING",
            loaded_identity=row.loaded_identity,
        )
        self._registry.deployments[live.resource] = live
        self._apply(live, row.id)

    def _apply(self, live: LiveDeployment, id_: str) -> None:
        """Bring the live deployment in line with its row."""
        resource = cast(Body, self.get(id_).body["resource"])
        live.transition = cast(Transition, resource["hotLoadTransitionType"])
        live.desired_replicas = cast(int, resource["maxReplicaCount"])
        replicas = self._replicas.setdefault(id_, {})
        for number in range(live.desired_replicas):
            if number not in replicas:
                name = f"replica {number} of deployment {id_}"
                replicas[number] = asyncio.create_task(self._keep(id_, live, number), name=name)
        if len(replicas) > live.desired_replicas:
            end = asyncio.create_task(self._end_replicas(id_, live, keep=live.desired_replicas))
            self._reloads.add(end)
            end.add_done_callback(self._reloads.discard)
        self._settle(live, id_)

    async def _end_replicas(self, id_: str, live: LiveDeployment, *, keep: int) -> None:
        replicas = self._replicas.get(id_, {})
        ending = {number: replicas[number] for number in list(replicas) if number >= keep}
        for task in ending.values():
            task.cancel()
        await asyncio.gather(*ending.values(), return_exceptions=True)
        for number, task in ending.items():
            worker = self._workers.find("engine", id_, number)
            if worker is not None:
                await self._workers.stop(worker, ENGINE_GRACE_S)
            if replicas.get(number) is task:
                del replicas[number]
        if live.state not in ("DELETING", "DELETED", "FAILED"):
            # It may have been scaled up again meanwhile.
            self._apply(live, id_)

    async def _keep(self, id_: str, live: LiveDeployment, number: int) -> None:
        """Keep one engine running until cancelled; give up after repeated quick deaths."""
        policy = RestartPolicy()
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                reason = await self._start_and_serve(id_, live, number)
            except FailedOnDemand as error:
                self._set_state(live, id_, "FAILED", str(error))
                return
            except (WorkerFailed, TooManyWorkers) as error:
                reason = str(error)
            except Exception as error:
                log.exception("replica %d of deployment %s", number, id_)
                reason = f"{type(error).__name__}: {error}"
            # What is left of it must not be taken for its successor.
            worker = self._workers.find("engine", id_, number)
            if worker is not None:
                await self._workers.stop(worker, ENGINE_GRACE_S)
            delay = policy.died(loop.time() - started)
            log.warning("replica %d of deployment %s ended: %s", number, id_, reason)
            if delay is None:
                self._set_state(live, id_, "FAILED", reason)
                return
            self._settle(live, id_)
            await asyncio.sleep(delay)

    async def _start_and_serve(self, id_: str, live: LiveDeployment, number: int) -> str:
        """One engine from the place that it takes to its death; returns why it ended."""
        holder = f"{id_}/{number}"
        worker = self._workers.find("engine", id_, number)
        if worker is not None:
            async with self._conditions.kept_place("replica", holder):
                return await self._serve(live, number, worker)

        def waits(reason: str) -> None:
            self._set_state(live, id_, live.state, reason)

        async with self._conditions.place("replica", holder, live.resource, waits):
            self._set_state(live, id_, live.state, str(self.get(id_).body.get("notice", "")))
            await self._conditions.delay("replica", live.resource)
            if failure := self._conditions.take_failure(live.resource):
                raise FailedOnDemand(failure)
            settings = self._worker_settings(id_, live, number)
            worker = await self._workers.spawn("engine", id_, number, settings)
            return await self._serve(live, number, worker)

    async def _serve(self, live: LiveDeployment, number: int, worker: Worker) -> str:
        """A worker from its first answer to its death; returns why it ended."""
        id_ = worker.row.owner

        async def attempt(socket: Path) -> EngineClient:
            return await self._connect(socket, f"{live.resource}/replicas/{number}")

        engine = await self._workers.connect(worker, attempt)
        try:
            loaded: str | None = None
            # A hot load may come to its end while this engine catches up.
            while loaded != live.loaded_identity:
                loaded = live.loaded_identity
                assert loaded is not None
                ended = await engine.load(loaded)
                if ended.outcome != "loaded":
                    raise WorkerFailed(f"the engine can't load {loaded}: {ended.reason}")
            self._joined_with[engine] = loaded
            live.engines.append(engine)
            self._settle(live, id_)
            await engine.closed
            return self._workers.why_ended(worker)
        finally:
            self._joined_with.pop(engine, None)
            if engine in live.engines:
                live.engines.remove(engine)
            await engine.close()

    def _worker_settings(self, id_: str, live: LiveDeployment, number: int) -> dict[str, object]:
        snapshots = self._state_dir / "snapshots"
        snapshots.mkdir(mode=0o700, parents=True, exist_ok=True)
        return {
            "deployment": live.resource,
            "base_model": live.model.name,
            "replica": number,
            "model_path": str(live.model.path),
            "snapshots_dir": str(snapshots),
            "snapshot_dtype": self._snapshot_dtype(id_),
            "max_context_length": live.model.max_context_length,
            "max_slots": MAX_SLOTS,
        }

    def _snapshot_dtype(self, id_: str) -> str:
        """How the base weights are rounded: as asked, else as the linked trainer does it."""
        resource = cast(Body, self.get(id_).body["resource"])
        extra = cast(Body, resource.get("extraValues") or {})
        if "snapshot_dtype" in extra:
            return str(extra["snapshot_dtype"])
        job = self._database.get("job", str(resource.get("hotLoadTrainerJob", "")).rsplit("/")[-1])
        if job is None:
            return SNAPSHOT_DTYPES[0]
        return str(cast(Body, job.body["worker"])["snapshot_dtype"])

    # -- state -----------------------------------------------------------------------------------

    def _settle(self, live: LiveDeployment, id_: str) -> None:
        """Derive the state from the engines."""
        if live.state in ("DELETING", "DELETED", "FAILED"):
            return
        if len(live.engines) == live.desired_replicas:
            self._set_state(live, id_, "READY")
        elif live.state != "CREATING":
            self._set_state(live, id_, "UPDATING")

    def _set_state(
        self, live: LiveDeployment, id_: str, state: DeploymentState, message: str | None = None
    ) -> None:
        live.state = state
        row = self.get(id_)
        kept = row.message if message is None else message
        if (row.state, row.message) != (state, kept):
            self._database.update(replace(row, state=state, message=kept))
        event = self._changed.pop(live.resource, None)
        if event is not None:
            event.set()

    def _event(self, resource: str) -> asyncio.Event:
        """Set at the next change of state, then replaced."""
        return self._changed.setdefault(resource, asyncio.Event())

    def _record_loaded(self, resource: str, identity: str) -> None:
        """Persist what was loaded, and bring along engines that joined during that hot load."""
        row = self.get(resource.rsplit("/", 1)[-1])
        self._database.update(replace(row, loaded_identity=identity))
        for engine in self._registry.deployments[resource].engines:
            joined_with = self._joined_with.pop(engine, identity)
            if joined_with != identity:
                task = asyncio.create_task(self._reload(engine, identity))
                self._reloads.add(task)
                task.add_done_callback(self._reloads.discard)

        if asyncio.get_running_loop().time() >= self._clean_from:
            self._clean_from = asyncio.get_running_loop().time() + CLEAN_EVERY_S
            cleaning = asyncio.create_task(self._remove_old_snapshots())
            self._reloads.add(cleaning)
            cleaning.add_done_callback(self._reloads.discard)

    async def _remove_old_snapshots(self) -> None:
        """Retention: what no deployment serves or is loading, no newest one is built from, and no
        client of the Tinker API has named."""
        in_use = {row.loaded_identity for row in self._database.rows("deployment")}
        for live in self._registry.deployments.values():
            for engine in live.engines:
                in_use |= {engine.state.identity, engine.state.target}
        store = SnapshotStore(self._state_dir / "snapshots")
        used = {identity for identity in in_use if identity is not None}

        def work() -> None:
            named = TinkerStore(self._state_dir / "tinker").named_snapshots()
            clean(store, used | named, time.time())

        try:
            await asyncio.to_thread(work)
        except OSError as error:
            log.warning("old snapshots could not be removed: %s", error)

    async def _reload(self, engine: EngineClient, identity: str) -> None:
        """To load what is loaded changes nothing, so this may repeat the hot load."""
        ended = await engine.load(identity)
        if ended.outcome == "failed":
            log.warning("%s could not load %s: %s", engine.name, identity, ended.reason)
            # Its keeper replaces it.
            await engine.close()
