"""The engines behind the Tinker API: one deployment for each model's checkpoints, one for its base.

Knows the platform's deployments and turns between snapshots. Does not know requests. A model's own
weights have an engine of their own, so that a reference never waits for a snapshot's turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fireworks_training.local.gateway.control_plane import resources
from fireworks_training.local.gateway.control_plane.routes import ControlPlane
from fireworks_training.local.gateway.inference.engine_client import EngineClient, LoadFailed
from fireworks_training.local.gateway.inference.engine_stream import EngineGone
from fireworks_training.local.gateway.inference.registry import (
    LiveDeployment,
    ModelEntry,
    ServingRegistry,
)
from fireworks_training.local.gateway.tinker.turns import SnapshotTurns
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.settings import DEPLOYMENT_PREFIX

ID_PREFIX = "tinker-"
START_WITHIN_S = 120.0
LOOK_S = 0.02


class TinkerEngines:
    """Makes deployments when they are needed, and turns their engines between snapshots.

    Args:
        plane: the platform's deployments.
        registry: its models and what is live.
    """

    def __init__(self, plane: ControlPlane, registry: ServingRegistry) -> None:
        self._plane = plane
        self._registry = registry
        self._turns: dict[str, SnapshotTurns] = {}

    async def engine(self, entry: ModelEntry, *, base: bool) -> EngineClient:
        """Return a ready engine; make its deployment when there is none.

        Raises:
            HttpProblem: 503 when it does not start.
        """
        return (await self._ready(_id_of(entry, base=base), entry))[1]

    @asynccontextmanager
    async def serving(
        self, entry: ModelEntry, identity: str | None
    ) -> AsyncGenerator[EngineClient]:
        """Hold an engine on a snapshot, or on the base model, for as long as the block runs.

        Raises:
            HttpProblem: 503 when no engine is there, 400 when the snapshot can't be loaded.
        """
        id_ = _id_of(entry, base=identity is None)
        live, engine = await self._ready(id_, entry)
        if identity is None:
            yield engine
            return
        turns = self._turns.setdefault(
            id_, SnapshotTurns(lambda wanted: self._load(id_, entry, wanted))
        )
        try:
            async with turns.turn(identity):
                engine = _engine_of(live) or engine
                if engine.state.identity != identity:
                    raise EngineGone(f"{live.resource}: its engine was replaced")
                yield engine
        except EngineGone:
            turns.forget()
            raise

    async def close(self) -> None:
        """Give up loads that are under way."""
        await asyncio.gather(*(turns.close() for turns in self._turns.values()))

    async def _ready(self, id_: str, entry: ModelEntry) -> tuple[LiveDeployment, EngineClient]:
        deployments = self._plane.deployments
        if not deployments.lives(id_):
            asked = {"baseModel": entry.name, "minReplicaCount": 1, "maxReplicaCount": 1}
            body, notice = resources.deployment_body(asked, self._registry)
            if any(row.id == id_ for row in deployments.table.present()):
                await self._plane.finish(deployments.delete(id_, hard=True))
            deployments.create(id_, body, notice)
        name = f"{DEPLOYMENT_PREFIX}{id_}"
        try:
            async with asyncio.timeout(START_WITHIN_S):
                while True:
                    live = self._registry.deployments.get(name)
                    if live is None or live.state == "FAILED":
                        raise HttpProblem(
                            503, f"deployment {id_!r} did not start; its state says why"
                        )
                    engine = _engine_of(live)
                    if engine is not None:
                        return live, engine
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise HttpProblem(503, f"deployment {id_!r} has no engine after 120 s") from None

    async def _load(self, id_: str, entry: ModelEntry, identity: str) -> None:
        live, engine = await self._ready(id_, entry)
        try:
            ended = await engine.load(identity)
        except LoadFailed as error:
            raise HttpProblem(400, str(error), code="FAILED_PRECONDITION") from None
        if ended.outcome != "loaded":
            raise HttpProblem(503, f"{live.resource}: {identity!r} was superseded by another load")
        live.keeper.record_loaded(live.resource, identity)


def _id_of(entry: ModelEntry, *, base: bool) -> str:
    name = f"{ID_PREFIX}{entry.name.rpartition('/')[2]}"
    return f"{name[:58]}-base" if base else name[:63]


def _engine_of(live: LiveDeployment) -> EngineClient | None:
    return next((engine for engine in live.engines if not engine.is_closed), None)
