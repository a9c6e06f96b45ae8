"""The models and live deployments that the gateway serves right now, and the connected engines.

Knows the live objects that the routes share. Does not know HTTP, processes or the database: each
deployment comes with its keeper, the part of the control plane that changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.states import DeploymentState, Transition

STAND_IN_PREFIX = "accounts/fireworks/"


class UnknownModel(LookupError):
    """Raised when no model has a name; the message lists the known ones."""


@dataclass(slots=True)
class ModelEntry:
    """Describes a model directory that this platform serves.

    Attributes:
        name: resource name, `accounts/local/models/<id>`.
        path: directory in the Hugging Face layout.
        max_context_length: tokens, prompt and completion together.
    """

    name: str
    path: Path
    max_context_length: int = 2048


class DeploymentKeeper(Protocol):
    """Changes deployments; the control plane's `Deployments`."""

    async def wake(self, resource: str) -> None:
        """Start the engines of a deployment that is scaled to zero; return when it is READY."""
        ...

    def record_loaded(self, resource: str, identity: str) -> None:
        """Store that all engines of a deployment have loaded a snapshot."""
        ...


@dataclass(slots=True, eq=False)
class LiveDeployment:
    """Joins a deployment and the engines that are connected for it.

    Attributes:
        keeper: wakes it, and stores what it has loaded.
        resource: `accounts/local/deployments/<id>`, also the model string of its completions.
        base_model: model name as the creator gave it (a stand-in's name stays as given).
        model: the model that is really served.
        engines: connected engines; empty while scaled to zero or starting.
        transition: how a hot load treats streams in flight.
        state: state that the control plane reports.
        desired_replicas: engines it should have; 0 = scaled to zero.
        loaded_identity: the last snapshot that every engine took; a new engine loads it before it
            joins. None = the model's own weights. Only `keeper.record_loaded` sets it.
    """

    keeper: DeploymentKeeper
    resource: str
    base_model: str
    model: ModelEntry
    engines: list[EngineClient] = field(default_factory=list[EngineClient])
    transition: Transition = "ASYNC"
    state: DeploymentState = "CREATING"
    desired_replicas: int = 1
    loaded_identity: str | None = None


@dataclass(slots=True, eq=False)
class ServingRegistry:
    """Holds the live resources of one gateway.

    Attributes:
        models: by resource name.
        deployments: by resource name; deleted ones are absent.
        default_model: the model that stands in for the cloud's names; None takes the only one.
    """

    models: dict[str, ModelEntry] = field(default_factory=dict[str, ModelEntry])
    deployments: dict[str, LiveDeployment] = field(default_factory=dict[str, LiveDeployment])
    default_model: str | None = None

    def find_model(self, name: str) -> tuple[ModelEntry, str | None]:
        """Return the model behind a resource name, and a notice when it stands in for another.

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
