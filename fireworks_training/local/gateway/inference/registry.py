"""What the gateway serves right now: its models, and its deployments with their engines.

Knows the live objects that the routes share. Knows nothing about HTTP, processes or the database:
who changes a deployment (the control plane) hands in the two callables that do so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from fireworks_training.local.gateway.inference.states import DeploymentState, Transition

if TYPE_CHECKING:
    from fireworks_training.local.gateway.inference.engine_client import EngineClient

STAND_IN_PREFIX = "accounts/fireworks/"


class UnknownModel(LookupError):
    """No model of that name; the message lists the known ones."""


@dataclass(slots=True)
class ModelEntry:
    """A model directory that this platform serves.

    Attributes:
        name: resource name, `accounts/local/models/<id>`.
        path: directory in the Hugging Face layout.
        max_context_length: tokens, prompt and completion together.
    """

    name: str
    path: Path
    max_context_length: int = 2048


@dataclass(slots=True, eq=False)
class LiveDeployment:
    """A deployment and the engines that are connected for it.

    Attributes:
        resource: `accounts/local/deployments/<id>`, also the model string of its completions.
        base_model: model name as the creator gave it (a stand-in's name stays as given).
        model: the model that is really served.
        engines: connected engines; empty while scaled to zero or starting.
        transition: how a hot load treats streams in flight.
        state: as the control plane reports it.
        desired_replicas: engines it should have; 0 = scaled to zero.
        loaded_identity: the last snapshot that every engine took; a new engine loads it before it
            joins. None = the model's own weights. Set it through `ServingRegistry.record_loaded`.
    """

    resource: str
    base_model: str
    model: ModelEntry
    engines: list[EngineClient] = field(default_factory=list)
    transition: Transition = "ASYNC"
    state: DeploymentState = "CREATING"
    desired_replicas: int = 1
    loaded_identity: str | None = None


async def _nothing_to_wake(resource: str) -> None:
    raise LookupError(f"{resource} can't be woken: no control plane is attached")


def _nothing_to_record(resource: str, identity: str) -> None:
    """Without a control plane the registry itself is the only memory."""


@dataclass(slots=True, eq=False)
class ServingRegistry:
    """The live resources of one gateway.

    Attributes:
        models: by resource name.
        deployments: by resource name; deleted ones are absent.
        default_model: the model that stands in for the cloud's names; None takes the only one.
        waker: starts the replicas of a deployment and returns when it is READY.
        recorder: persists the identity that a deployment has loaded.
    """

    models: dict[str, ModelEntry] = field(default_factory=dict)
    deployments: dict[str, LiveDeployment] = field(default_factory=dict)
    default_model: str | None = None
    waker: Callable[[str], Awaitable[None]] = _nothing_to_wake
    recorder: Callable[[str, str], None] = _nothing_to_record

    async def wake(self, resource: str) -> None:
        """Start the replicas of a deployment that is scaled to zero; return when it is READY.

        Concurrent calls share one start; a deployment that has its engines returns at once.

        Raises:
            LookupError: no such deployment.
            RuntimeError: its engines could not be started; the message says why.
        """
        await self.waker(resource)

    def record_loaded(self, resource: str, identity: str) -> None:
        """Remember that every engine of a deployment has loaded `identity`."""
        self.deployments[resource].loaded_identity = identity
        self.recorder(resource, identity)

    def find_model(self, name: str) -> tuple[ModelEntry, str | None]:
        """The model behind a resource name, and a notice when it is a stand-in for another.

        Raises:
            UnknownModel: the name is neither served nor one of the cloud's.
        """
        if name in self.models:
            return self.models[name], None
        if name.startswith(f"{STAND_IN_PREFIX}models/") and self.models:
            entry = self.models[self.default_model or next(iter(self.models))]
            return entry, f"Warning: {name} is not served here; {entry.name} stands in for it"
        known = ", ".join(sorted(self.models)) or "none"
        raise UnknownModel(f"no model {name!r}; this platform serves: {known}")


REGISTRY: web.AppKey[ServingRegistry] = web.AppKey("registry", ServingRegistry)
