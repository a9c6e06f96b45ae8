"""Makes the training clients of a trainer job, and the reference clients of a service.

Knows which client there is already and which is to be made; the client itself is in `client`, the
model behind it in `model`. A service has one of these for its own trainer, and another for a
separate reference trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fireworks_training._async.platform.platform import Platform
from fireworks_training._async.resources.plans import (
    Resources,
    reference_config,
    separate_reference,
)
from fireworks_training._async.resources.provisioner import Provisioner
from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation, first_of
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.arguments import check_state
from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._async.training.data_plane import DataPlane
from fireworks_training._async.training.model import ModelOptions, RemoteModel, configured
from fireworks_training._async.training.operations import load_state, unload_model
from fireworks_training._async.training.session import TrainerSession
from fireworks_training._async.weights.publisher import WeightPublisher
from fireworks_training._core.lifecycle import Readiness, job_readiness
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import (
    FireworksTrainingError,
    InvalidArgument,
    SessionEnded,
    SessionLost,
)

ENDED = (Readiness.RESUMABLE, Readiness.GONE, Readiness.FAILED)
"""What a job is whose trainer is gone."""

Client = AsyncFiretitanTrainingClient


class TrainingClients:
    """Makes and closes the training clients of one job; all on the service's owner loop.

    Args:
        platform: the service's platform.
        config: what the job was made for.
        resources: gets the job up.
        revive: starts the job again after its process was lost.
        owner: the service's loop.
        publisher: brings the snapshots that they save into the deployment.
        user_metadata: noted with the session and with each model.
        pipeline_steps, accept_partial: as for `from_firetitan_config`.
    """

    def __init__(
        self,
        platform: Platform,
        config: FiretitanProvisioningConfig,
        *,
        resources: Callable[[], Awaitable[Resources]],
        revive: Callable[[Resources], Awaitable[None]],
        owner: OwnerLoop,
        publisher: WeightPublisher,
        user_metadata: Mapping[str, str] = MappingProxyType({}),
        pipeline_steps: bool = False,
        accept_partial: bool = False,
    ) -> None:
        self._platform = platform
        self._config = config
        self._resources = resources
        self._revive = revive
        self._owner = owner
        self._publisher = publisher
        self._user_metadata = dict(user_metadata)
        self._pipeline_steps = pipeline_steps
        self._accept_partial = accept_partial
        self._making = asyncio.Lock()
        self._session: TrainerSession | None = None
        self._policy: Client | None = None
        self._base: Client | None = None
        self._clients: dict[Client, RemoteModel] = {}
        self._recovered: set[Client] = set()

    def beside(
        self, config: FiretitanProvisioningConfig, resources: Callable[[], Awaitable[Resources]]
    ) -> TrainingClients:
        """Make the clients of another job of the same service."""
        return TrainingClients(
            self._platform,
            config,
            resources=resources,
            revive=self._revive,
            owner=self._owner,
            publisher=self._publisher,
        )

    async def policy(
        self, options: ModelOptions, user_metadata: Mapping[str, str] | None = None
    ) -> Client:
        """Return the client of the service's model, the same at every call; with `max_lora_rank`
        make a new model at every call."""
        config = configured(self._config, options)
        await self._ready()
        async with self._making:
            if self._config.max_lora_rank is not None:
                return await self._make(config, user_metadata)
            if self._policy is not None and isinstance(self._policy.ended, SessionLost):
                await self._leave_session()
            if self._config.forward_only and _lost(self._policy) is not None:
                # Its weights are those that the job begins with: there is nothing to load.
                await self._restart()
                self._policy = None
            if self._policy is None:
                self._policy = await self._make(config, user_metadata)
            return self._policy

    async def from_state(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None,
        weights_access_token: str | None,
        lora_rank: int | None,
        *,
        optimizer: bool,
    ) -> Client:
        """Make a client whose model starts from a saved state; nothing is left if that fails."""
        policy = self._policy
        alive = policy is not None and not isinstance(policy.ended, SessionLost)
        if alive and self._config.max_lora_rank is None:
            raise InvalidArgument(
                "the service has its training client already, of which it makes one: call "
                "load_state or load_state_with_optimizer on that"
            )
        check_state("path", path)
        client = await self.policy(ModelOptions(lora_rank=lora_rank), user_metadata)
        load = client.load_state_with_optimizer if optimizer else client.load_state
        try:
            await load(path, weights_access_token)
        except BaseException:
            await finish_in_spite_of_cancellation(self._forget(client))
            raise
        return client

    async def _forget(self, client: Client) -> None:
        """Free a model that nobody was given."""
        if self._policy is client:
            self._policy = None
        model = self._clients.pop(client)
        with contextlib.suppress(FireworksTrainingError):
            await client.unload_model()
        await model.close(drain=False)

    async def base(self, user_metadata: Mapping[str, str] | None = None) -> Client:
        """Make a client of the base model, which computes logprobs only, on the same trainer; the
        same one until it is released."""
        await self._platform.open()
        await self._ready()
        async with self._making:
            if self._base is None:
                config = replace(self._config, lora_rank=0, lora_alpha=None, max_lora_rank=None)
                self._base = await self._make(config, user_metadata, base_only=True)
            return self._base

    async def at_state(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        policy: Client | None = None,
    ) -> Client:
        """Make a client that computes logprobs only, with the weights of a saved state; nothing is
        left if that fails.

        Args:
            policy: whose adapter the state fits; default the one that the service was made for.
        """
        await self._ready()
        async with self._making:
            config = self._config if policy is None else self._clients[policy].config
            lives = any(map(self._lives, self._clients.values()))
            if self._config.forward_only and not lives and any(map(_lost, self._clients)):
                await self._restart()  # the process of the separate trainer was lost
            model = await self._make_model(config, user_metadata)
            try:
                await model.queue.submit(load_state(model, path, None, optimizer=False))
            except BaseException:
                await finish_in_spite_of_cancellation(self._discard(model))
                raise
            model.freeze()
            client = Client(model, self._publisher)
            self._clients[client] = model
            return client

    async def _discard(self, model: RemoteModel) -> None:
        with contextlib.suppress(FireworksTrainingError):
            await model.queue.submit(unload_model(model))
        await model.close(drain=False)

    async def release_client(self, client: Client) -> None:
        """Free a model of `at_state`."""
        if client.ended is None:
            await finish_in_spite_of_cancellation(self._unload(client))

    async def release_base(self) -> None:
        """Free the base model; another call of `base` makes a new one."""
        async with self._making:
            base, self._base = self._base, None
            if base is not None and base.ended is None:
                await finish_in_spite_of_cancellation(self._unload(base))

    async def _unload(self, client: Client) -> None:
        try:
            await client.unload_model()
        finally:
            await self._clients[client].close(drain=True)

    async def recovered(self, lost: Client | None = None) -> Client:
        """Make a client that goes on where the lost one last saved, in the job started again.

        Args:
            lost: which one; default the one there is.
        """
        self.check_owns("lost", lost)
        several = self._config.max_lora_rank is not None
        if lost is None and several:
            raise InvalidArgument("lost= is needed: this service trains several models")
        async with self._making:
            lost = self._policy if lost is None else lost
            ended = _lost(lost)
            if lost is None or ended is None:
                raise InvalidArgument(
                    "the trainer is not lost: recover_training_client() is for a training client "
                    "that ended with TrainerLost or SessionLost"
                )
            if lost in self._recovered or not (several or lost is self._policy):
                raise InvalidArgument("this client was recovered already: use its successor")
            state = lost.last_saved_state
            if state is None:
                raise ended.with_traceback(None)
            # Another lost client may have had the job started again already.
            model = self._clients[lost]
            if self._session is None or model.session is self._session:
                await self._restart()
            client = await self._successor(model.config, state)
            self._recovered.add(lost)
            self._base = None
            if not several:
                self._policy = client
            return client

    async def _successor(self, config: FiretitanProvisioningConfig, state: str) -> Client:
        """Make a model with a lost one's saved state; nothing is left if that fails."""
        made: Client | None = None
        try:
            made = await self._make(config, None)
            await made.load_state_with_optimizer(state)
        except BaseException:
            if made is not None:
                await finish_in_spite_of_cancellation(self._forget(made))
            # A process that died again must be started again, not asked again.
            if self._session is not None and not any(map(self._lives, self._clients.values())):
                session, self._session = self._session, None
                await finish_in_spite_of_cancellation(session.close())
            raise
        return made

    def _lives(self, model: RemoteModel) -> bool:
        """Whether a model is of the open session, and has not ended."""
        return model.session is self._session and model.queue.ended is None

    async def _leave_session(self) -> None:
        """Let go of a session that can't go on; the next client opens another one."""
        self._policy = self._base = None
        session, self._session = self._session, None
        if session is not None:
            await finish_in_spite_of_cancellation(session.close())

    async def _restart(self) -> None:
        """Start the job again; the models and the session of its last process are gone."""
        session, self._session = self._session, None
        if session is not None:
            await finish_in_spite_of_cancellation(session.close())
        await self._revive(await self._resources())

    async def _ready(self) -> None:
        """Get the job up; meanwhile a thread imports what a training client needs, tinker above
        all, which would stop the loop for seconds at its first use."""
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_import_tinker())
                await self._resources()
        except BaseExceptionGroup as failures:
            failure = first_of(failures)
        if failure is not None:  # raised out here, where no group becomes its context
            raise failure

    def check_owns(self, name: str, client: Client | None) -> None:
        """Refuse the argument `name` if it is a client of another service; None passes.

        Raises:
            InvalidArgument: it is.
        """
        if client is not None and client not in self._clients:
            raise InvalidArgument(f"{name} is a client of another service: pass one of this one")

    def to_sync(self, client: Client | None) -> Client:
        """Return the client whose weights are to be synced: the given one, or the service's.

        Raises:
            InvalidArgument: it is of another service, or there is none yet.
        """
        self.check_owns("training_client", client)
        found = client or self._policy
        if found is None:
            raise InvalidArgument(
                "there is nothing to sync: call create_training_client() first, or name the "
                "training_client"
            )
        return found

    async def server_capabilities(self) -> dict[str, Any]:
        """Ask the trainer what it can do; gets the job up."""
        plane = DataPlane(self._platform.transport, await self._trainer_url())
        path = "get_server_capabilities"
        return await plane.get(path, what=path)

    async def _job_ended(self) -> str | None:
        """Ask the control plane whether the job has ended; why, or None."""
        job_id = (await self._resources()).job_id
        if job_id is None:
            return None
        job = await (await self._platform.open()).get_job(job_id)
        if job is None:
            return "its job was deleted"
        return f"its job is in {job.state}" if job_readiness(job.state) in ENDED else None

    async def _trainer_url(self) -> str:
        return await self._platform.trainer_url((await self._resources()).job_id)

    async def _make(
        self,
        config: FiretitanProvisioningConfig,
        user_metadata: Mapping[str, str] | None,
        *,
        base_only: bool = False,
    ) -> Client:
        model = await self._make_model(config, user_metadata, base_only=base_only)
        if config.forward_only:
            model.freeze()
        client = Client(model, self._publisher)
        self._clients[client] = model
        return client

    async def _make_model(
        self,
        config: FiretitanProvisioningConfig,
        user_metadata: Mapping[str, str] | None,
        *,
        base_only: bool = False,
    ) -> RemoteModel:
        noted = {**self._user_metadata, **(user_metadata or {})}
        session = await self._open_session(noted)
        capabilities = await session.create_model(config, base_only=base_only, user_metadata=noted)
        return RemoteModel(
            session,
            capabilities,
            config,
            owner=self._owner,
            pipeline_steps=self._pipeline_steps,
            accept_partial=self._accept_partial,
            # A separate reference that is yet to load a state is frozen afterwards.
            forward_only=base_only,
        )

    async def _open_session(self, user_metadata: Mapping[str, str]) -> TrainerSession:
        if self._session is None:
            url = await self._trainer_url()
            session = TrainerSession(
                self._platform.transport,
                self._platform.make_transport,
                url,
                tinker_only=self._platform.tinker_only,
                job_ended=None if self._platform.tinker_only else self._job_ended,
            )
            try:
                await session.open(user_metadata)
            except BaseException:
                await finish_in_spite_of_cancellation(session.close())
                raise
            self._session = session
        return self._session

    @property
    def session_id(self) -> str | None:
        """The trainer's name for the open session; None before there is one."""
        return self._session.session_id if self._session is not None else None

    @property
    def saved_a_state(self) -> bool:
        """Whether some client has saved a state."""
        return any(model.states.newest is not None for model in self._clients.values())

    async def close(self, *, drain: bool) -> BaseException | None:
        """Let accepted operations finish (or not), and end the session; idempotent.

        Returns:
            The first failure that nobody has asked about.
        """
        async with contextlib.AsyncExitStack() as stack:
            if self._session is not None:
                stack.push_async_callback(self._session.close)
            await asyncio.gather(*(model.close(drain=drain) for model in self._clients.values()))
        unseen = (model.queue.failures.first for model in self._clients.values())
        return next((failure for failure in unseen if failure is not None), None)


def _lost(client: Client | None) -> SessionEnded | None:
    """The error with which a client lost its trainer or its session, if it did."""
    ended = None if client is None else client.ended
    return ended if isinstance(ended, SessionEnded) else None


class ReferenceClients:
    """The reference clients of one service; everything runs on its owner loop.

    Args:
        config: what the service was made for.
        policy: the clients of the policy's trainer.
        provisioner: gets a separate reference trainer up, and releases it.
    """

    def __init__(
        self,
        config: FiretitanProvisioningConfig,
        policy: TrainingClients,
        provisioner: Provisioner,
    ) -> None:
        self._config = config
        self._policy = policy
        self._provisioner = provisioner
        self._separate: TrainingClients | None = None
        self._making = asyncio.Lock()
        self._at_states: dict[tuple[str, Client | None], tuple[TrainingClients, Client]] = {}

    async def client(
        self,
        base_model: str | None,
        lora_rank: int | None,
        policy: Client | None,
        user_metadata: Mapping[str, str] | None,
        model_path: str | None = None,
    ) -> Client:
        """Make the reference client; it stays the same one until `release`.

        Args and errors are those of `create_reference_client`.
        """
        config = self._config
        self._check_model(base_model)
        if lora_rank not in (None, config.lora_rank):
            raise InvalidArgument(f"lora_rank={lora_rank}, but the policy's is {config.lora_rank}")
        if config.max_lora_rank is not None and policy is None:
            raise InvalidArgument("policy_client= is needed: this service trains several models")
        self._policy.check_owns("policy_client", policy)
        if model_path is not None:
            return await self._at_state(model_path, policy, user_metadata)
        if not separate_reference(self._config):
            return await self._policy.base(user_metadata)
        return await self._separate_clients().policy(ModelOptions(), user_metadata)

    def _separate_clients(self) -> TrainingClients:
        if self._separate is None:
            self._separate = self._policy.beside(
                reference_config(self._config), self._provisioner.reference
            )
        return self._separate

    async def _at_state(
        self, path: str, policy: Client | None, user_metadata: Mapping[str, str] | None
    ) -> Client:
        check_state("model_path", path)
        config = self._config
        separate = separate_reference(config)
        if separate and (config.lora_rank or config.max_lora_rank):
            raise InvalidArgument(
                "model_path= of an adapter is loaded beside the policy: leave "
                "reference_training_shape_id and reference_trainer_job_id out, whose trainer holds "
                "all parameters"
            )
        async with self._making:
            made = self._at_states.get((path, policy))
            if made is not None and made[1].ended is None:
                return made[1]
            if separate:
                job = (await self._provisioner.provisioned()).job_id
                place = path if "://" in path else f"cross_job://{job}/{path}"
                clients = self._separate_clients()
                client = await clients.at_state(place, user_metadata)
            else:
                clients = self._policy
                client = await clients.at_state(path, user_metadata, policy)
            self._at_states[path, policy] = clients, client
            return client

    async def base(self, base_model: str | None, user_metadata: Mapping[str, str] | None) -> Client:
        """Make the client of the base model on the policy's trainer, with the adapter off.

        Args and errors are those of `create_base_training_client`.
        """
        self._check_model(base_model)
        if separate_reference(self._config) and not self._config.lora_rank:
            raise InvalidArgument(
                "a full-parameter trainer holds no base model beside the one it trains: "
                "create_reference_client gives it a trainer of its own"
            )
        return await self._policy.base(user_metadata)

    def _check_model(self, base_model: str | None) -> None:
        if base_model not in (None, self._config.base_model):
            raise InvalidArgument(
                f"base_model={base_model!r}, but the service was made for "
                f"{self._config.base_model!r}: make another service for another model"
            )

    async def release(self) -> None:
        """Free the base model, and release a separate reference trainer by its policy."""
        separate, self._separate = self._separate, None
        at_states, self._at_states = self._at_states, {}
        for clients, client in at_states.values():
            await clients.release_client(client)
        await self._policy.release_base()
        if separate is not None:
            await separate.close(drain=True)
        await self._provisioner.release_references()

    async def close(self, *, drain: bool) -> BaseException | None:
        """End the session of a separate reference trainer; the first failure nobody asked about."""
        return None if self._separate is None else await self._separate.close(drain=drain)


async def _import_tinker() -> None:
    """Import what a training client needs, in a daemon thread: an executor's would hold up a
    program that is interrupted meanwhile."""
    from fireworks_training._async.training.custom_loss import in_daemon_thread

    def load() -> None:
        for name in ("tinker", "fireworks_training._async.training.pass_operations"):
            importlib.import_module(name)

    await in_daemon_thread(load, name="import tinker", context=contextvars.copy_context())
