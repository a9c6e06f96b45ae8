"""Brings a snapshot into a deployment, and knows when it is live there.

One load at a time. A load is done when every replica reports the identity (`_core.snapshots`);
loading what is loaded is a no-op on the server's side, and costs one status request here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fireworks_training._async.transport import Transport
from fireworks_training._core.backoff import Backoff
from fireworks_training._core.notices import Notices
from fireworks_training._core.snapshots import Failed, Live, Progress, judge, read_replicas
from fireworks_training.errors import ApiStatusError, HotLoadFailed, HotLoadTimeout
from fireworks_training.models import ReplicaStatus

logger = logging.getLogger("fireworks_training.weight_sync")

PATH = "/hot_load/v1/models/hot_load"
FIRST_POLL = 0.05
"""Seconds before the second look at the replicas; each later one waits 1.5 times as long."""
SLOWEST_POLL = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where a snapshot goes.

    Attributes:
        url: base URL of the hot load API.
        deployment: full resource name.
        base_model: full resource name.
    """

    url: str
    deployment: str
    base_model: str


class WeightSync:
    """The weights of one deployment.

    Args:
        transport: the service's pool.
        target: the deployment.
        timeout: seconds for every replica to report a snapshot.
    """

    def __init__(self, transport: Transport, target: Target, *, timeout: float) -> None:
        self._transport = transport
        self._target = target
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self.current: str | None = None
        """The identity that was last seen live on every replica."""

    async def replicas(self) -> list[ReplicaStatus]:
        """What each replica holds."""
        answer = await self._transport.call(
            "GET", self._target.url + PATH, what="read the hot load status", headers=self._headers()
        )
        return read_replicas(answer)

    async def load(self, identity: str) -> None:
        """Load a snapshot and wait until every replica serves it.

        Raises:
            HotLoadFailed: a replica refused it; the old weights keep serving.
            HotLoadTimeout: not every replica reported it in time.
        """
        async with self._turn:
            if isinstance(judge(await self.replicas(), identity), Live):
                self.current = identity
                return
            await self._request(identity)
            await self._wait(identity)
            self.current = identity

    async def _request(self, identity: str) -> None:
        body: dict[str, Any] = {"identity": identity, "reset_prompt_cache": True}
        try:
            answer = await self._transport.call(
                "POST",
                self._target.url + PATH,
                what=f"hot load {identity}",
                json=body,
                headers=self._headers(),
                timeout=60.0,
                backoff=Backoff(max_elapsed=self._timeout, attempts=20, cap=5.0),
            )
        except ApiStatusError as error:
            raise HotLoadFailed(
                f"the deployment refused the snapshot {identity}: {error.message}. What it served "
                "before keeps serving.",
                identity=identity,
                cause=error,
            ) from error
        if answer.get("notice"):
            logger.info("hot load of %s: %s", identity, answer["notice"])

    async def _wait(self, identity: str) -> None:
        loop = asyncio.get_running_loop()
        notices = Notices(loop.time())
        delay = FIRST_POLL
        while True:
            progress: Progress = judge(await self.replicas(), identity)
            if isinstance(progress, Live):
                return
            if isinstance(progress, Failed):
                raise HotLoadFailed(
                    f"the snapshot {identity} was not loaded: {progress.reason}. What was served "
                    "before keeps serving.",
                    identity=identity,
                    replicas=dict(progress.replicas),
                )
            waited = notices.age(loop.time())
            if waited > self._timeout:
                raise HotLoadTimeout(
                    f"the snapshot {identity} is not on every replica after {waited:.0f} s: "
                    f"{_listed(progress.waiting_for)}. Look at the deployment, or raise "
                    "hotload_timeout_s.",
                    identity=identity,
                    replicas=dict(progress.waiting_for),
                )
            if notices.due(loop.time()):
                logger.warning(
                    "hot load of %s: waiting for %.0f s (%s)",
                    identity,
                    waited,
                    _listed(progress.waiting_for),
                )
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, SLOWEST_POLL)

    def _headers(self) -> dict[str, str]:
        return {
            "fireworks-model": self._target.base_model,
            "fireworks-deployment": self._target.deployment,
        }


def _listed(replicas: Mapping[str, str]) -> str:
    return "; ".join(f"replica {name}: {report}" for name, report in replicas.items())
