"""Deployments: engines kept running, one worker process a replica.

Knows the states of a deployment and how its engines are started, found again and replaced. Does not
know the requests to the engines: the inference and hot-load routes make them. States:

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
from functools import partial
from pathlib import Path
from typing import cast

from fireworks_training.local.gateway.control_plane.resource_table import (
    ResourceTable,
    is_tombstone,
)
from fireworks_training.local.gateway.control_plane.resources import SNAPSHOT_DTYPES
from fireworks_training.local.gateway.control_plane.workers import (
    FailedOnDemand,
    Worker,
    WorkerFailed,
    Workers,
    WorkerStart,
)
from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.registry import LiveDeployment, ServingRegistry
from fireworks_training.local.gateway.inference.states import DeploymentState, Transition
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.gateway.web.tasks import RunningTasks
from fireworks_training.local.processes.restarts import RestartPolicy
from fireworks_training.local.settings import DEPLOYMENT_PREFIX
from fireworks_training.local.store.database import Body, Database, ResourceRow
from fireworks_training.local.store.retention import clean
from fireworks_training.local.store.snapshots import SnapshotStore
from fireworks_training.local.store.tinker_store import TinkerStore

log = logging.getLogger(__name__)

MAX_SLOTS = 128
"""Streams that an engine decodes together; on two cores more of them are no faster, and a window
that follows the queue would not see that."""

CLEAN_EVERY_S = 60.0
"""Seconds between two looks for snapshots that may go."""
ENGINE_GRACE_S = 0.3
"""Seconds that an engine has to end by itself: it has nothing to save, and one that still loads
torch hears no signal."""

_ENDED = ("FAILED", "DELETING", "DELETED")

ConnectEngine = Callable[[Path, str], Awaitable[EngineClient]]
"""Makes a connected client of an engine that serves a socket, under a name for messages; raises
ConnectionError or FileNotFoundError while it does not serve yet."""


class Deployments:
    """Creates, keeps running and deletes the deployments of the platform.

    Attributes:
        table: the rows of the deployments.

    Args:
        database: also has the row of the trainer job that a deployment is linked to.
        registry: the models that may be served; shows what is live.
        state_dir: folder of the platform's snapshots.
        connect: makes a client of an engine.
    """

    def __init__(
        self,
        database: Database,
        workers: Workers,
        registry: ServingRegistry,
        state_dir: Path,
        connect: ConnectEngine,
    ) -> None:
        self.table = ResourceTable(database, "deployment", "deployment")
        self._jobs = ResourceTable(database, "job", "trainer job")
        self._workers = workers
        self._registry = registry
        self._state_dir = state_dir
        self._connect = connect
        self._replicas: dict[str, dict[int, asyncio.Task[None]]] = {}
        self._changed: dict[str, asyncio.Event] = {}
        # What an engine loaded before it joined, until the next hot load of the deployment.
        self._joined_with: dict[EngineClient, str | None] = {}
        self._background = RunningTasks[object]()
        self._clean_from = 0.0

    # -- reading ---------------------------------------------------------------------------------

    def _live(self, id_: str) -> LiveDeployment | None:
        return self._registry.deployments.get(f"{DEPLOYMENT_PREFIX}{id_}")

    def replicas(self, id_: str) -> int:
        """Count the engines that are connected."""
        live = self._live(id_)
        return len(live.engines) if live is not None else 0

    def lives(self, id_: str) -> bool:
        """Return whether a deployment is there and has not ended."""
        live = self._live(id_)
        return live is not None and live.state not in _ENDED

    # -- changing --------------------------------------------------------------------------------

    def create(self, id_: str, body: Body, notice: str) -> ResourceRow:
        """Create a deployment and start its engines in the background; replaces a tombstone.

        Raises:
            HttpProblem: 409 when there is a deployment of this id.
        """
        old = self.table.find(id_)
        if old is not None and is_tombstone(old):
            self.table.forget(id_)
        self._bring_up(self.table.create(id_, "CREATING", notice, {**body, "notice": notice}))
        return self.table.get(id_)

    def patch(self, id_: str, body: Body) -> ResourceRow:
        """Store a changed body and bring the engines in line with it in the background.

        Raises:
            HttpProblem: 404; 409 for a deployment that has failed or is being deleted.
        """
        row, live = self.table.get(id_), self._live(id_)
        if live is None or row.state in ("FAILED", "DELETING"):
            raise HttpProblem(
                409, f"deployment {id_!r} is {row.state}; delete it", code="FAILED_PRECONDITION"
            )
        self.table.change(id_, body=body)
        self._apply(live, id_)
        return self.table.get(id_)

    async def fail(self, id_: str, reason: str) -> None:
        """Fail a deployment and end its engines; no effect on one that has ended.

        Raises:
            HttpProblem: 404.
        """
        self.table.get(id_)
        live = self._live(id_)
        if live is not None and live.state != "DELETING":
            self._set_state(live, id_, "FAILED", reason)
            await self._end_replicas(id_, live, keep=0)

    async def kill_replica(self, id_: str, number: int) -> None:
        """Kill one engine; another one takes its place.

        Raises:
            HttpProblem: 404, of a deployment or of its replica.
        """
        self.table.get(id_)
        worker = self._workers.find("engine", id_, number)
        if worker is None:
            raise HttpProblem(404, f"deployment {id_!r} has no replica {number}")
        worker.process.send(signal.SIGKILL)

    async def delete(self, id_: str, *, hard: bool) -> None:
        """Stop a deployment's engines; leave a tombstone, or nothing when `hard`.

        Raises:
            HttpProblem: 404.
        """
        self.table.get(id_)
        live = self._live(id_)
        if live is not None:
            self._set_state(live, id_, "DELETING", "")
            await self._end_replicas(id_, live, keep=0)
            live.state = "DELETED"
            del self._registry.deployments[live.resource]
            self._replicas.pop(id_, None)
        if hard:
            self.table.forget(id_)
        else:
            self.table.change(id_, state="DELETED", message="deleted")

    async def wake(self, resource: str) -> None:
        """Start the engines of a deployment that is scaled to zero; return when it is READY.

        Concurrent calls share one start; a deployment that has its engines returns at once.

        Raises:
            LookupError: no such deployment.
            RuntimeError: its engines could not be started; the message says why.
        """
        live = self._registry.deployments.get(resource)
        if live is None:
            raise LookupError(f"no deployment {resource!r}")
        id_ = resource.rsplit("/", 1)[-1]
        if live.desired_replicas == 0 and live.state != "FAILED":
            row = self.table.get(id_)
            count = cast(int, row.body["awake"])
            shown = {**cast(Body, row.body["resource"]), "maxReplicaCount": count}
            log.info("deployment %s is woken by a request: %d replicas", id_, count)
            self.table.change(id_, body={**row.body, "resource": shown})
            self._apply(live, id_)
        while live.state not in ("READY", *_ENDED):
            await self._changed.setdefault(resource, asyncio.Event()).wait()
        if live.state != "READY":
            reason = self.table.get(id_).message if live.state == "FAILED" else ""
            raise RuntimeError(f"deployment {id_!r} is {live.state} {reason}".strip())

    def record_loaded(self, resource: str, identity: str) -> None:
        """Store that all engines of a deployment have loaded a snapshot.

        Engines that joined with another one during that hot load are brought along.
        """
        live = self._registry.deployments[resource]
        live.loaded_identity = identity
        self.table.change(resource.rsplit("/", 1)[-1], loaded_identity=identity)
        for engine in live.engines:
            joined_with = self._joined_with.pop(engine, identity)
            if joined_with != identity:
                self._background.start(object(), self._reload(engine, identity))
        now = asyncio.get_running_loop().time()
        if now >= self._clean_from:
            self._clean_from = now + CLEAN_EVERY_S
            self._background.start(object(), self._remove_old_snapshots())

    # -- recovery --------------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up the deployments that an earlier gateway left."""
        for row in self.table.present():
            if row.state == "DELETING":
                self.table.forget(row.id)
            elif row.state != "FAILED":
                self._bring_up(row)

    def owners(self) -> set[tuple[str, str]]:
        """Return the (kind, owner) of the workers that deployments claim."""
        return {("engine", id_) for id_ in self._replicas}

    async def close(self) -> None:
        """Let go of all engines; they live on for the next gateway."""
        tasks = [task for replicas in self._replicas.values() for task in replicas.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, self._background.close(), return_exceptions=True)

    # -- engines ---------------------------------------------------------------------------------

    def _bring_up(self, row: ResourceRow) -> None:
        model = self._registry.models.get(str(row.body["model"]))
        if model is None:
            message = f"the platform no longer serves {row.body['model']}"
            self.table.change(row.id, state="FAILED", message=message)
            return
        live = LiveDeployment(
            keeper=self,
            resource=f"{DEPLOYMENT_PREFIX}{row.id}",
            base_model=str(cast(Body, row.body["resource"])["baseModel"]),
            model=model,
            state="CREATING" if row.state == "CREATING" else "UPDATING",
            loaded_identity=row.loaded_identity,
        )
        self._registry.deployments[live.resource] = live
        self._apply(live, row.id)

    def _apply(self, live: LiveDeployment, id_: str) -> None:
        """Bring the live deployment in line with its row."""
        resource = cast(Body, self.table.get(id_).body["resource"])
        live.transition = cast(Transition, resource["hotLoadTransitionType"])
        live.desired_replicas = cast(int, resource["maxReplicaCount"])
        replicas = self._replicas.setdefault(id_, {})
        for number in range(live.desired_replicas):
            if number not in replicas:
                name = f"replica {number} of deployment {id_}"
                replicas[number] = asyncio.create_task(self._keep(id_, live, number), name=name)
        if len(replicas) > live.desired_replicas:
            ending = self._end_replicas(id_, live, keep=live.desired_replicas)
            self._background.start(object(), ending)
        self._settle(live, id_)

    async def _end_replicas(self, id_: str, live: LiveDeployment, *, keep: int) -> None:
        replicas = self._replicas.get(id_, {})
        ending = {number: replicas[number] for number in list(replicas) if number >= keep}
        for task in ending.values():
            task.cancel()
        await asyncio.gather(*ending.values(), return_exceptions=True)
        for number, task in ending.items():
            await self._workers.stop_of("engine", id_, number, ENGINE_GRACE_S)
            if replicas.get(number) is task:
                del replicas[number]
        if live.state not in _ENDED:
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
            except WorkerFailed as error:
                reason = str(error)
            except Exception as error:
                log.exception("replica %d of deployment %s", number, id_)
                reason = f"{type(error).__name__}: {error}"
            await self._workers.stop_of("engine", id_, number, ENGINE_GRACE_S)
            delay = policy.died(loop.time() - started)
            log.warning("replica %d of deployment %s ended: %s", number, id_, reason)
            if delay is None:
                self._set_state(live, id_, "FAILED", reason)
                return
            self._settle(live, id_)
            await asyncio.sleep(delay)

    async def _start_and_serve(self, id_: str, live: LiveDeployment, number: int) -> str:
        """Keep one engine from the place that it takes to its death; return why it ended."""

        def report(reason: str) -> None:
            notice = str(self.table.get(id_).body.get("notice", ""))
            self._set_state(live, id_, live.state, reason or notice)

        settings = partial(self._worker_settings, id_, live, number)
        start = WorkerStart("engine", id_, number, live.resource, report, settings)
        async with self._workers.running(start) as worker:
            return await self._serve(live, number, worker)

    async def _serve(self, live: LiveDeployment, number: int, worker: Worker) -> str:
        """Serve with a worker from its first answer to its death; return why it ended."""
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
        """Return how the base weights are rounded: as asked, else as the linked trainer does."""
        resource = cast(Body, self.table.get(id_).body["resource"])
        extra = cast(Body, resource.get("extraValues") or {})
        if "snapshot_dtype" in extra:
            return str(extra["snapshot_dtype"])
        job = self._jobs.find(str(resource.get("hotLoadTrainerJob", "")).rsplit("/")[-1])
        if job is None:
            return SNAPSHOT_DTYPES[0]
        return str(cast(Body, job.body["worker"])["snapshot_dtype"])

    # -- state -----------------------------------------------------------------------------------

    def _settle(self, live: LiveDeployment, id_: str) -> None:
        """Derive the state from the engines."""
        if live.state in _ENDED:
            return
        if len(live.engines) == live.desired_replicas:
            self._set_state(live, id_, "READY")
        elif live.state != "CREATING":
            self._set_state(live, id_, "UPDATING")

    def _set_state(
        self, live: LiveDeployment, id_: str, state: DeploymentState, message: str | None = None
    ) -> None:
        live.state = state
        row = self.table.get(id_)
        kept = row.message if message is None else message
        if (row.state, row.message) != (state, kept):
            self.table.change(id_, state=state, message=kept)
        event = self._changed.pop(live.resource, None)
        if event is not None:
            event.set()

    def snapshots_in_use(self) -> set[str]:
        """Collect the snapshots that deployments serve or are loading."""
        in_use = {row.loaded_identity for row in self.table.rows()}
        for live in self._registry.deployments.values():
            for engine in live.engines:
                in_use |= {engine.state.identity, engine.state.target}
        return {identity for identity in in_use if identity is not None}

    async def _remove_old_snapshots(self) -> None:
        """Remove the snapshots that no deployment serves or is loading, that none of the newest is
        built up from, and that no client of the Tinker API has named."""
        store, used = SnapshotStore(self._state_dir / "snapshots"), self.snapshots_in_use()

        def work() -> None:
            named = TinkerStore(self._state_dir / "tinker").named_snapshots()
            clean(store, used | named, time.time())

        try:
            await asyncio.to_thread(work)
        except OSError as error:
            log.warning("old snapshots could not be removed: %s", error)

    async def _reload(self, engine: EngineClient, identity: str) -> None:
        """Load a snapshot into an engine; loading it a second time changes nothing."""
        ended = await engine.load(identity)
        if ended.outcome == "failed":
            log.warning("%s could not load %s: %s", engine.name, identity, ended.reason)
            # Its `_keep` replaces it.
            await engine.close()
