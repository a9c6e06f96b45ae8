"""The Tinker API at the platform's root, so that `TINKER_BASE_URL` can point at it.

Requests that train go to a trainer job of their model (`training`), requests that sample to a
deployment of it (`sampling`); both are made when first needed. `records` lists and removes runs and
checkpoints, `sessions` lists clients' sessions, `refusals` answers what is not supported.

A new route takes three steps:

1. Its path and its handler go into the module of its subject: `training_routes`, `sampling`,
   `records` or `sessions`; one row in that module's `add_routes`. One that only passes its body on
   to the trainer of a run is a name in `training_routes._OF_A_RUN`.
2. A small body is checked with `web.bodies`, a large one with a pydantic model, as `sample_request`
   does.
3. State that outlives the process is a note of `local.store.tinker_store`; a route that is not
   supported is a row of `refusals.REFUSED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.gateway.tinker import (
    records,
    refusals,
    sampling,
    sessions,
    training_routes,
)
from fireworks_training.local.gateway.tinker.engines import TinkerEngines
from fireworks_training.local.gateway.tinker.sampling import SAMPLING, TinkerSampling
from fireworks_training.local.gateway.tinker.training import TRAINING, TinkerTraining
from fireworks_training.local.store.tinker_store import TinkerStore


def install(app: web.Application, state_dir: Path, offers: Sequence[str]) -> None:
    """Register all routes; the app holds `CONTROL_PLANE` and `REGISTRY`.

    Args:
        offers: names in `settings.OFFERS` that clients are asked to use.
    """
    plane, registry = app[CONTROL_PLANE], app[REGISTRY]
    app[TRAINING] = TinkerTraining(plane, registry, TinkerStore(state_dir / "tinker"), offers)
    app[SAMPLING] = TinkerSampling(app[TRAINING], TinkerEngines(plane, registry))

    async def close(app: web.Application) -> None:
        await app[SAMPLING].close()

    app.on_shutdown.append(close)
    training_routes.add_routes(app)
    sampling.add_routes(app)
    records.add_routes(app)
    sessions.add_routes(app)
    refusals.add_routes(app)
