"""The Tinker API at the platform's root, so that `TINKER_BASE_URL` can point at it.

Everything that trains goes to a trainer job of the model's own (`training`), everything that
samples to a deployment of it (`sampling`); both are made when first needed. `records` lists and
removes what was saved, `sessions` lists clients' sessions, `refusals` says what is not there.
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
    """Registers all routes; the app holds `CONTROL_PLANE` and `REGISTRY`.

    Args:
        offers: of `settings.OFFERS`, what clients are told to use.
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
