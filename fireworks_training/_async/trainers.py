"""The training side of a service: one session with its trainer, and the models made in it.

Knows which client there is already and which is to be made; what a client does is `trainer`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

from fireworks_training._async.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.connection import Connection
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.provisioner import Provisioner
from fireworks_training._async.session import TrainerSession
from fireworks_training._async.trainer import AsyncFiretitanTrainingClient
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import InvalidArgument, TrainerLost

logger = logging.getLogger("fireworks_training.service")

Client = AsyncFiretitanTrainingClient


class Trainers:
    """The training clients of one trainer job; everything runs on the service's owner loop.

    Args:
        connection: the service's platform.
        config: what the service was made for.
        provisioner: gets the trainer up.
        owner: the service's loop.
        user_metadata: noted with the session.
        pipeline_steps: as for `from_firetitan_config`.
    """

    def __init__(
        self,
        connection: Connection,
        config: FiretitanProvisioningConfig,
        provisioner: Provisioner,
        *,
        owner: OwnerLoop,
        user_metadata: Mapping[str, str],
        pipeline_steps: bool,
    ) -> None:
        self._connection = connection
        self._config = config
        self._provisioner = provisioner
        self._owner = owner
        self._user_metadata = dict(user_metadata)
        self._pipeline_steps = pipeline_steps
        self._making = asyncio.Lock()
        self._session: TrainerSession | None = None
        self._policy: Client | None = None
        self.clients: list[Client] = []

    async def policy(self, user_metadata: Mapping[str, str] | None) -> Client:
        """The client of the service's model; the same one at every call."""
        await self._provisioner.provisioned()
        async with self._making:
            if self._policy is None:
                self._policy = await self._make(self._config, user_metadata)
            return self._policy

    async def base(self, user_metadata: Mapping[str, str] | None) -> Client:
        """A forward-only client of the base model, on the same trainer, with no adapter."""
        await self._provisioner.provisioned()
        async with self._making:
            config = replace(self._config, lora_rank=0, lora_alpha=None)
            return await self._make(config, user_metadata, base_only=True)

    async def recovered(self) -> Client:
        """A client that goes on where the lost one last saved, in the job started again."""
        async with self._making:
            lost = self._policy
            ended = None if lost is None else lost.ended
            if lost is None or not isinstance(ended, TrainerLost):
                raise InvalidArgument(
                    "the trainer is not lost: recover_training_client() is for a service whose "
                    "training client ended with TrainerLost"
                )
            state = lost.last_saved_state
            if state is None:
                raise ended.with_traceback(None)
            session, self._session = self._session, None
            if session is not None:
                await finish_in_spite_of_cancellation(session.close())
            await self._provisioner.revive()
            client = await self._make(self._config, None)
            await client.load_state_with_optimizer(state)
            self.clients.remove(lost)
            self._policy = client
            return client

    async def _make(
        self,
        config: FiretitanProvisioningConfig,
        user_metadata: Mapping[str, str] | None,
        *,
        base_only: bool = False,
    ) -> Client:
        session = await self._open_session(user_metadata)
        capabilities = await session.create_model(
            config, base_only=base_only, user_metadata=user_metadata
        )
        client = Client(
            session,
            capabilities,
            config,
            owner=self._owner,
            pipeline_steps=self._pipeline_steps,
            forward_only=base_only,
        )
        self.clients.append(client)
        return client

    async def _open_session(self, user_metadata: Mapping[str, str] | None) -> TrainerSession:
        if self._session is None:
            plane = await self._connection.open()
            resources = await self._provisioner.provisioned()
            session = TrainerSession(
                self._connection.transport,
                self._connection.make_transport,
                await plane.trainer_url(resources.job_id or ""),
            )
            try:
                await session.open({**self._user_metadata, **(user_metadata or {})})
            except BaseException:
                await finish_in_spite_of_cancellation(session.close())
                raise
            self._session = session
        return self._session

    @property
    def session_id(self) -> str | None:
        """Of the open session; None before there is one."""
        return self._session.session_id if self._session is not None else None

    @property
    def saved_a_state(self) -> bool:
        """Whether some client has saved a state."""
        return any(client.last_saved_state is not None for client in self.clients)

    async def close(self, *, drain: bool) -> BaseException | None:
        """Let accepted operations finish (or not), and end the session.

        Returns:
            The first failure that nobody has asked about.
        """
        try:
            for client in self.clients:
                await client._close(drain=drain)  # pyright: ignore[reportPrivateUsage]
        finally:
            if self._session is not None:
                await self._session.close()
        unseen = (
            client._first_unseen_failure()  # pyright: ignore[reportPrivateUsage]
            for client in self.clients
        )
        return next((failure for failure in unseen if failure is not None), None)
