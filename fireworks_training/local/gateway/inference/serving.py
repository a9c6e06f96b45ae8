"""Which engine serves a request: deployments by name, their states, waking, and affinity.

Knows the registry and what its states mean for a client; nothing of bodies or streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging

from aiohttp import web

from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.registry import (
    REGISTRY,
    LiveDeployment,
    ServingRegistry,
)
from fireworks_training.local.gateway.web.problems import HttpProblem

log = logging.getLogger(__name__)

DEPLOYMENT_PREFIX = "accounts/local/deployments/"
SHORT_PREFIX = "local/"
RETRY_SOON = {"Retry-After": "1"}

_FAIR_SHARE = 1.25
_FAIR_STREAMS = 8
"""With these, a key keeps its engine unless that one has a quarter more streams than the average,
and eight: a few streams more are worth a known prompt."""

WAKING: web.AppKey[dict[str, asyncio.Task[None]]] = web.AppKey("waking")


def add_waking(app: web.Application) -> None:
    """Gives the app its memory of deployments that are being woken, once."""
    if WAKING not in app:
        app[WAKING] = {}
        app.on_cleanup.append(_stop_waking)


def find_deployment(registry: ServingRegistry, name: str) -> LiveDeployment:
    """The deployment of a model string.

    Args:
        registry: what is served.
        name: `accounts/local/deployments/<id>`, the same after `<model>#`, or `local/<id>`.

    Raises:
        Problem: 404, with the deployments there are.
    """
    resource = name.rpartition("#")[2]
    if resource.startswith(SHORT_PREFIX):
        resource = DEPLOYMENT_PREFIX + resource.removeprefix(SHORT_PREFIX)
    live = registry.deployments.get(resource)
    if live is None or live.state in ("DELETING", "DELETED"):
        known = ", ".join(sorted(registry.deployments)) or "none; create one first"
        raise HttpProblem(404, f"no deployment {name[:200]!r}; deployments here: {known}")
    return live


def ready_engines(app: web.Application, live: LiveDeployment) -> list[EngineClient]:
    """The engines that can take work now, at least one. A sleeping deployment is woken.

    Raises:
        Problem: 503 with Retry-After while there is none; 400 when there will be none.
    """
    engines = [engine for engine in live.engines if not engine.is_closed]
    if engines:
        return engines
    if live.state == "FAILED":
        raise HttpProblem(
            400,
            f"{live.resource} has failed; its state says why. Delete it and create it anew",
            code="FAILED_PRECONDITION",
        )
    if live.desired_replicas == 0:
        _wake(app, live.resource)
        raise HttpProblem(
            503, f"{live.resource} was scaled to zero and is being woken", headers=RETRY_SOON
        )
    raise HttpProblem(
        503, f"{live.resource} is {live.state}: no engine is ready yet", headers=RETRY_SOON
    )


def choose_engine(engines: list[EngineClient], affinity: str | None) -> EngineClient:
    """The engine for a request: where its key's others are, or else the one with least to do.

    A key goes to the engine that it always goes to, as long as that one has no more than its share
    of all streams and some: a popular key must not make one replica work while others wait. An
    engine that is full is passed over while another has room.

    Args:
        engines: the ones that are connected, at least one.
        affinity: `prompt_cache_key`, or `user`.
    """
    open_to_more = [engine for engine in engines if engine.has_room] or engines
    if affinity is not None:
        streams = sum(engine.open_streams for engine in open_to_more)
        fair = _FAIR_SHARE * (streams + 1) / len(open_to_more) + _FAIR_STREAMS
        # The highest hash wins, so the end of one engine moves only that engine's keys.
        for engine in sorted(open_to_more, key=lambda e: _weight(e.name, affinity), reverse=True):
            if engine.open_streams < fair:
                return engine
    return min(open_to_more, key=lambda engine: engine.open_streams)


def _weight(name: str, affinity: str) -> bytes:
    return hashlib.sha256(f"{name}\0{affinity}".encode()).digest()


def _wake(app: web.Application, resource: str) -> None:
    waking = app[WAKING]
    if resource in waking:
        return

    def ended(task: asyncio.Task[None]) -> None:
        del waking[resource]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("waking %s failed: %s", resource, error)

    task = asyncio.ensure_future(app[REGISTRY].wake(resource))
    waking[resource] = task
    task.add_done_callback(ended)


async def _stop_waking(app: web.Application) -> None:
    tasks = list(app[WAKING].values())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
