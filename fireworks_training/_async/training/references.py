"""The reference clients of a service: the model before training, on one trainer or two.

A LoRA policy's reference is its trainer's base model with the adapter off; a full-parameter policy
has a forward-only trainer of its own for it. What is provisioned for that is `resources`' matter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from fireworks_training._async.resources.plans import separate_reference
from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._async.training.factory import ModelOptions, TrainingClients
from fireworks_training.config import FiretitanProvisioningConfig


class ReferenceClients:
    """The reference clients of one service; everything runs on its owner loop.

    Args:
        config: what the service was made for.
        policy: the clients of the policy's trainer.
        separate: makes the clients of a reference trainer.
        release: releases the reference trainer, by its policy.
    """

    def __init__(
        self,
        config: FiretitanProvisioningConfig,
        policy: TrainingClients,
        *,
        separate: Callable[[], TrainingClients],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        self._config = config
        self._policy = policy
        self._make_separate = separate
        self._release_trainer = release
        self._separate: TrainingClients | None = None

    async def client(
        self, user_metadata: Mapping[str, str] | None = None
    ) -> AsyncFiretitanTrainingClient:
        """The reference client, the same one until `release`."""
        if not separate_reference(self._config):
            return await self._policy.base(user_metadata)
        if self._separate is None:
            self._separate = self._make_separate()
        return await self._separate.policy(ModelOptions(), user_metadata)

    async def release(self) -> None:
        """Free the base model, and release a separate reference trainer by its policy."""
        separate, self._separate = self._separate, None
        await self._policy.release_base()
        if separate is not None:
            await separate.close(drain=True)
        await self._release_trainer()

    async def close(self, *, drain: bool) -> BaseException | None:
        """End the session of a separate reference trainer; the first failure nobody asked about."""
        return None if self._separate is None else await self._separate.close(drain=drain)
