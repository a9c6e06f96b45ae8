"""The choice of the engine that serves a request: deployment by name, state, waking, affinity.

Knows the registry and what a deployment's state means for a client. Does not know bodies or
streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time

from aiohttp import web

from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.registry import LiveDeployment, ServingRegistry
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.gateway.web.tasks import RunningTasks
from fireworks_training.local.settings import DEPLOYMENT_PREFIX

log = logging.getLogger(__name__)

SHORT_PREFIX = "local/"
RETRY_SOON = {"Retry-After": "1"}

_FAIR_SHARE = 1.25
_FAIR_STREAMS = 8
"""With these, a key keeps its engine unless that one has a quarter more streams than the average,
and eight: a few streams more are worth a known prompt."""

REGISTRY: web.AppKey[ServingRegistry] = web.AppKey("registry", ServingRegistry)
"""The models and deployments of an app, for the routes of all three APIs."""

WAKING: web.AppKey[RunningTasks[str]] = web.AppKey("waking", RunningTasks)
"""The deployments that are being woken, by resource name."""

REPLACED_WITHIN: web.AppKey[float] = web.AppKey("replaced_within", float)
"""Seconds for which a request waits for an engine in the place of one that died."""
REPLACED_WITHIN_S = 60.0
LOOK_S = 0.02


def add_waking(app: web.Application) -> None:
    """Give an app its memory of the deployments that are being woken, once."""
    app.setdefault(REPLACED_WITHIN, REPLACED_WITHIN_S)
    if WAKING not in app:
        app[WAKING] = RunningTasks()
        app.on_cleanup.append(_stop_waking)


def find_deployment(registry: ServingRegistry, name: str) -> LiveDeployment:
    """Return the deployment of a model string.

    Args:
        registry: holds the live deployments.
        name: `accounts/local/deployments/<id>`, the same after `<model>#`, or `local/<id>`.

    Raises:
        HttpProblem: 404, with the deployments there are.
    """
    resource = name.rpartition("#")[2]
    if resource.startswith(SHORT_PREFIX):
        resource = DEPLOYMENT_PREFIX + resource.removeprefix(SHORT_PREFIX)
    live = registry.deployments.get(resource)
    if live is None or live.state in ("DELETING", "DELETED"):
        known = ", ".join(sorted(registry.deployments)) or "none; create one first"
        raise HttpProblem(404, f"no deployment {name[:200]!r}; deployments here: {known}")
    return live


async def engines_within(
    app: web.Application, live: LiveDeployment, patience: float | None
) -> list[EngineClient]:
    """Return the engines that can take work, as `ready_engines` does; wait while one is replaced.

    An engine that died is there again in seconds, or in a minute where its model is large: a client
    that is sent away meanwhile gives up before that.

    Args:
        patience: seconds that the client waits; None for as long as it takes.

    Raises:
        HttpProblem: as `ready_engines`, at the end of the wait.
    """
    longest = app[REPLACED_WITHIN]
    end = time.monotonic() + (longest if patience is None else min(patience, longest))
    while _is_replaced(live) and time.monotonic() < end:  # noqa: ASYNC110 - an engine is no event
        await asyncio.sleep(LOOK_S)
    return ready_engines(app, live)


def _is_replaced(live: LiveDeployment) -> bool:
    """Return whether a deployment that served has no engine now, and is getting one."""
    gone = all(engine.is_closed for engine in live.engines)
    return gone and live.desired_replicas > 0 and live.state in ("READY", "UPDATING")


def ready_engines(app: web.Application, live: LiveDeployment) -> list[EngineClient]:
    """Return the engines that can take work now, at least one; wake a sleeping deployment.

    Raises:
        HttpProblem: 503 with Retry-After while there is none; 400 when there will be none.
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
        if live.resource not in app[WAKING]:
            app[WAKING].start(live.resource, _wake(live))
        raise HttpProblem(
            503, f"{live.resource} was scaled to zero and is being woken", headers=RETRY_SOON
        )
    raise HttpProblem(
        503, f"{live.resource} is {live.state}: no engine is ready yet", headers=RETRY_SOON
    )


def choose_engine(engines: list[EngineClient], affinity: str | None) -> EngineClient:
    """Choose the engine for a request: that of its affinity key, else the one with least to do.

    A key goes to the engine that it always goes to, as long as that one has no more than its share
    of all streams and some: a popular key must not make one replica work while others wait. An
    engine that is full is passed over while another has room.

    Args:
        engines: the connected engines, at least one.
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


async def _wake(live: LiveDeployment) -> None:
    try:
        await live.keeper.wake(live.resource)
    except Exception as error:
        log.error("waking %s failed: %s", live.resource, error)


async def _stop_waking(app: web.Application) -> None:
    await app[WAKING].close()
