"""What every part of the service client stands on: its platform, its loop, what it holds.

The service client is one class for its users and several modules for its readers: the parts in
`service_clients`, `service_samplers` and `service_facts` hold its methods by role, `service` puts
them together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fireworks_training._async.platform.platform import Platform
from fireworks_training._async.resources.plans import Resources
from fireworks_training._async.resources.provisioner import Provisioner
from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._async.training.factory import TrainingClients
from fireworks_training._async.weights.deployment import ServedDeployment
from fireworks_training._async.weights.publisher import WeightPublisher
from fireworks_training.config import Endpoint, FiretitanProvisioningConfig
from fireworks_training.errors import ClientClosed, InvalidArgument
from fireworks_training.events import OnEvent

T = TypeVar("T")


class ServiceCore:
    """The state of a service client."""

    def __init__(
        self,
        endpoint: Endpoint,
        config: FiretitanProvisioningConfig,
        *,
        additional_headers: Mapping[str, str] | None,
        verify_ssl: bool,
        user_metadata: Mapping[str, str] | None,
        pipeline_steps: bool,
        on_event: OnEvent | None = None,
    ) -> None:
        self._config = config
        events = EventHook.of(on_event)
        self._owner = OwnerLoop(on_blocked=None if events is None else events.blocked)
        self._connection = Platform(
            endpoint,
            owner=self._owner,
            additional_headers=additional_headers or {},
            verify_ssl=verify_ssl,
            events=events,
        )
        self._provisioner = Provisioner(self._connection, config)
        self._samplers = ServedDeployment(self._connection, config, self._provisioner)
        self._publishing = WeightPublisher(
            self._owner,
            self._samplers.chain,
            self._samplers.weights,
            self._samplers.of_probe,
            events,
        )
        self._trainers = self._make_trainers(
            config, self._provisioner.provisioned, user_metadata, pipeline_steps
        )
        self._references: TrainingClients | None = None
        self._closed = False
        self._closing: asyncio.Task[BaseException | None] | None = None

    def _make_trainers(
        self,
        config: FiretitanProvisioningConfig,
        resources: Callable[[], Awaitable[Resources]],
        user_metadata: Mapping[str, str] | None,
        pipeline_steps: bool,
    ) -> TrainingClients:
        return TrainingClients(
            self._connection,
            config,
            resources=resources,
            revive=self._provisioner.revive,
            owner=self._owner,
            publisher=self._publishing,
            user_metadata=user_metadata or {},
            pipeline_steps=pipeline_steps,
        )

    def _check_model(self, base_model: str | None) -> None:
        if base_model not in (None, self._config.base_model):
            raise InvalidArgument(
                f"base_model={base_model!r}, but the service was made for "
                f"{self._config.base_model!r}: make another service for another model"
            )

    def _check_client(self, name: str, client: AsyncFiretitanTrainingClient | None) -> None:
        if client is not None and not self._trainers.owns(client):
            raise InvalidArgument(f"{name} is a client of another service: pass one of this one")

    async def _on_owner(self, factory: Callable[[], Coroutine[Any, Any, T]], label: str) -> T:
        if self._closed:
            raise ClientClosed.of("service")
        return await self._owner.run(factory, label=label)

    def _bind_to_portal(self) -> None:
        self._owner.use_portal()
