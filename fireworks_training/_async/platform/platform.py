"""Connects a service to its platform: base URL, key and connection pool; starts an embedded one.

It knows where the platform is and who stops it; it does not know what the service does with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.http.hosts import Hosts
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.platform import local_platform
from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training.config import Endpoint
from fireworks_training.errors import NotSupported
from fireworks_training.usage import Usage


class Platform:
    """Connects one service to its platform.

    Args:
        endpoint: the platform's URLs and key, or that it is embedded.
        owner: the loop of the pool.
        additional_headers, verify_ssl, events: arguments of `Transport`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        owner: OwnerLoop,
        additional_headers: Mapping[str, str],
        verify_ssl: bool,
        events: EventHook | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._owner = owner
        self._additional_headers = dict(additional_headers)
        self._verify_ssl = verify_ssl
        self._events = events
        self._lock = asyncio.Lock()
        self._hosts = Hosts()  # of all pools: a host that answered one is no stranger
        self._embedded = False
        self._base_url = endpoint.base_url
        self._api_key = endpoint.api_key or ""
        self._transport: Transport | None = None
        self._plane: AsyncControlPlane | None = None

    @property
    def base_url(self) -> str:
        """URL of the platform; of an embedded one once it runs."""
        return self._base_url

    @property
    def inference_url(self) -> str:
        """URL for sampling."""
        return self._endpoint.inference_url or self._base_url

    @property
    def hotload_url(self) -> str:
        """URL for hot loads."""
        return self._endpoint.hotload_api_url or self._base_url

    @property
    def transport(self) -> Transport:
        """The pool; after `open()`."""
        assert self._transport is not None
        return self._transport

    async def open(self) -> AsyncControlPlane:
        """Start the embedded platform if configured; gives the control plane. Idempotent.

        Raises:
            LocalPlatformError, MissingExtra: the embedded platform did not start.
            NotSupported: the platform is a Tinker server.
        """
        if self.tinker_only:
            raise NotSupported(
                "a Tinker server trains and saves, and has no control plane: jobs, deployments, "
                "their samplers, checkpoints of jobs and references need a Fireworks platform, "
                "see from_firetitan_config"
            )
        return await self._reached()

    async def trainer_url(self, job_id: str | None) -> str:
        """Find the base URL of a job's data plane, or of a Tinker server's one trainer."""
        plane = await self._reached()
        return self._base_url if self.tinker_only else await plane.trainer_url(job_id or "")

    async def _reached(self) -> AsyncControlPlane:
        async with self._lock:
            if self._plane is None:
                if self._endpoint.embedded:
                    platform = await local_platform.acquire(self._endpoint)
                    self._embedded = True
                    self._base_url, self._api_key = platform.base_url, platform.api_key
                self._transport = self.make_transport(self._owner, self._events)
                self._plane = AsyncControlPlane(
                    self._transport,
                    trainer_gateway_url=self._endpoint.trainer_gateway_url,
                    inference_url=self.inference_url,
                )
            return self._plane

    def make_transport(self, owner: OwnerLoop, events: EventHook | None = None) -> Transport:
        """Make a connection pool for a loop, with events only if given; after `open()`."""
        return Transport(
            owner=owner,
            base_url=self._base_url,
            api_key=self._api_key,
            additional_headers=self._additional_headers,
            verify_ssl=self._verify_ssl,
            events=events,
            hosts=self._hosts,
        )

    async def close(self) -> None:
        """Close the pool, and release the embedded platform; idempotent."""
        if self._transport is not None:
            await self._transport.close()
        if self._embedded:
            self._embedded = False
            await in_thread(local_platform.release)

    @property
    def usage(self) -> Usage:
        """Usage over the pool so far; none before `open()`."""
        return Usage() if self._transport is None else self._transport.usage.read()

    def release_usage(self) -> Usage:
        """Stop counting the seconds of held resources; gives the whole usage."""
        if self._transport is not None:
            self._transport.usage.release()
        return self.usage

    @property
    def address(self) -> str:
        """The user's name of the platform: a URL, "local" or "local:/path"."""
        return self._endpoint.base_url

    @property
    def tinker_only(self) -> bool:
        """Whether the platform is a Tinker server, which has no control plane."""
        return self._endpoint.tinker_only

    @property
    def embedded(self) -> bool:
        """Whether the platform is this process's own."""
        return self._endpoint.embedded

    @property
    def temporary(self) -> bool:
        """Whether the platform's state is deleted with it."""
        return self._endpoint.embedded and self._endpoint.state_dir is None
