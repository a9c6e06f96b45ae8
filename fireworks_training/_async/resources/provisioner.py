"""Provisions a service's resources at the first need, and cleans them up at the end.

An attempt runs in a task of its own, so that a cancelled caller, `close()` or the interpreter's
exit can end it and wait until its resources are deleted. It does not know how resources are made:
`plans` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.platform.platform import Platform
from fireworks_training._async.resources.ownership import Claim, RunResources
from fireworks_training._async.resources.plans import (
    Resources,
    provision,
    reference_config,
    separate_reference,
    until_running,
)
from fireworks_training._async.resources.usage_records import RunRecord, UsageRecorder
from fireworks_training._async.runtime.cancellation import (
    ended,
    finish_in_spite_of_cancellation,
    first_of,
)
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._portal import at_exit
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import ClientClosed


class Provisioner:
    """Provisions the resources of one service, once, and cleans them up.

    Args:
        connection: the platform.
        config: the service's configuration.
    """

    def __init__(self, connection: Platform, config: FiretitanProvisioningConfig) -> None:
        self.resources = Resources()
        self.holdings = RunResources(
            connection.address, embedded=connection.embedded, run=config.display_name
        )
        self.recorder = UsageRecorder(
            RunRecord(
                self.holdings.run, self.holdings.nonce, connection.address, config.base_model
            ),
            lambda: connection.usage,
        )
        self._connection = connection
        self._config = config
        self._ready = False
        self._closing = False
        self._lock = asyncio.Lock()
        self._attempts: set[asyncio.Task[None]] = set()
        self._forget_exit: Callable[[], None] = lambda: None

    async def provisioned(self) -> Resources:
        """Provision at the first call; a failed or cancelled attempt leaves nothing behind.

        With a bare Tinker server there is nothing to provision.

        Raises:
            ProvisioningError: a resource failed.
            ProvisioningTimeout: one was not ready within its budget.
            NotSupported: an option is known to the local platform only.
        """
        async with self._lock:
            if not self._ready and not self._connection.tinker_only:
                try:
                    await self._run(self._provision, _managed)
                except BaseException:
                    self.resources = Resources()
                    raise
                self._ready = True
                meter = self._connection.transport.usage
                meter.hold("trainer", self._config.trainer_replica_count or 1)
                if self.resources.deployment is not None:
                    meter.hold("replica", self._config.replica_count)
        return self.resources

    async def reference(self) -> Resources:
        """Give the separate reference trainer; made at first use."""
        await self.provisioned()
        async with self._lock:
            if self.resources.reference is None:
                await self._run(self._provision_reference, _managed)
                self._connection.transport.usage.hold("trainer", 1)
            assert self.resources.reference is not None
            return self.resources.reference

    async def hold(
        self, claim: Claim, work: Callable[[AsyncControlPlane], Coroutine[Any, Any, None]]
    ) -> None:
        """Make or find a further resource; what a failed attempt made is deleted."""
        await self._run(work, lambda made: made is claim)

    async def revive(self, resources: Resources) -> None:
        """Start a trainer job again after its process was lost, and wait until it is ready."""
        async with self._lock:
            plane, job_id = await self._connection.open(), resources.job_id
            assert job_id is not None
            resources.job = await until_running(plane, self._config, job_id, resumable=True)

    async def _run(
        self,
        work: Callable[[AsyncControlPlane], Coroutine[Any, Any, None]],
        is_of: Callable[[Claim], bool],
    ) -> None:
        """Carry out one attempt in a task of its own, which `close` and the exit can wait for.

        Args:
            is_of: recognizes this attempt's claims among those made meanwhile.
        """
        if self._closing:
            raise ClientClosed.of("service")
        attempt = asyncio.create_task(
            self._try(work, is_of), name="fireworks_training: provisioning"
        )
        self._attempts.add(attempt)
        try:
            await asyncio.shield(attempt)
        except asyncio.CancelledError:
            if attempt.cancelled() and self._is_closing():
                raise ClientClosed.of("service") from None
            attempt.cancel()
            await finish_in_spite_of_cancellation(ended(attempt))
            raise
        finally:
            self._attempts.discard(attempt)
        self.recorder.start()

    def _is_closing(self) -> bool:
        return self._closing

    async def _try(
        self,
        work: Callable[[AsyncControlPlane], Coroutine[Any, Any, None]],
        is_of: Callable[[Claim], bool],
    ) -> None:
        plane = await self._connection.open()
        self._forget_exit()
        what = f"the service of {self._config.base_model}"
        self._forget_exit = at_exit(what, self._clean_up_at_exit)
        before = list(self.holdings.claims)
        failure: BaseException | None = None
        try:
            await work(plane)
        except BaseException as error:
            failure = first_of(error)
        if failure is not None:  # raised out here, where no group becomes its context
            made = [c for c in self.holdings.claims if c not in before and is_of(c)]
            await finish_in_spite_of_cancellation(self.holdings.abandon(plane, made))
            raise failure

    async def _provision(self, plane: AsyncControlPlane) -> None:
        resources = Resources()
        async with asyncio.TaskGroup() as group:
            group.create_task(provision(plane, self._config, resources, self.holdings))
            self.resources = resources
            if self._config.reference_required and separate_reference(self._config):
                group.create_task(self._provision_reference(plane))

    async def _provision_reference(self, plane: AsyncControlPlane) -> None:
        config, resources = reference_config(self._config), Resources()
        await provision(plane, config, resources, self.holdings, role="reference")
        self.resources.reference = resources

    async def release_references(self) -> None:
        """Clean up the separate reference trainer."""
        async with self._lock:
            self.resources.reference = None
            plane = await self._connection.open()
            await finish_in_spite_of_cancellation(self.holdings.give_back(plane, "reference"))

    async def record_usage(self) -> None:
        """Keep the counts of the run for `fireworks-training usage`, and stop counting."""
        await self.recorder.finish(self._connection.release_usage())

    async def clean_up(self, errors: list[BaseException]) -> None:
        """End attempts under way and clean up what was made; the errors on the way are added."""
        self._closing = True
        await self._end_attempts()
        if self.holdings.open:
            await self.holdings.give_back(await self._connection.open())
        self._forget_exit()
        errors.extend(self.holdings.errors)

    async def _end_attempts(self) -> None:
        """Cancel the attempts of this loop, and wait until what they made is deleted."""
        here = asyncio.get_running_loop()
        attempts = [attempt for attempt in self._attempts if attempt.get_loop() is here]
        for attempt in attempts:
            attempt.cancel()
        for attempt in attempts:
            await ended(attempt)

    async def _clean_up_at_exit(self) -> None:
        """Clean up at interpreter exit, on the portal's loop, over a pool of its own."""
        await self._end_attempts()
        await self.record_usage()
        if self._connection.temporary or not self.holdings.open:
            return
        async with self._connection.make_transport(OwnerLoop(portal=True)) as transport:
            plane = AsyncControlPlane(transport)
            if self._ready:
                await self.holdings.give_back(plane)
            else:
                await self.holdings.abandon(plane)


def _managed(claim: Claim) -> bool:
    """Whether a claim belongs to the service's own trainer, deployment or reference."""
    return claim.role != "inference"
