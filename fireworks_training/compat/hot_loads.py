"""Hot loads of a deployment by hand: asks for a load, reads its status, waits for its end.

A hot load counts as done when every replica reports the snapshot (`_core/snapshots.py`), not only
the first one. The requests are `_async/weights/hot_load_requests.py`'s.
"""

from __future__ import annotations

import logging
from typing import Any

from fireworks_training._async.resources.readiness import LookAgain, until_ready
from fireworks_training._async.weights.hot_load_requests import (
    CHECKSUM_FORMAT,
    DELTA_COMPRESSION,
    STATUS_TIMEOUT,
    HotLoadRequests,
    Target,
)
from fireworks_training._core.lifecycle import Readiness, Seen
from fireworks_training._core.snapshots import (
    Failed,
    Live,
    Pending,
    Progress,
    judge,
    read_replicas,
)
from fireworks_training.compat.client import (
    DEFAULT_BASE_URL,
    FireworksClient,
    Row,
    readiness_wait,
)
from fireworks_training.errors import (
    ApiError,
    HotLoadTimeout,
    ProvisioningError,
    ProvisioningTimeout,
)
from fireworks_training.models import Observation

logger = logging.getLogger("fireworks_training.compat")

DEFAULT_DELTA_COMPRESSION = DELTA_COMPRESSION
DEFAULT_CHECKSUM_FORMAT = CHECKSUM_FORMAT
HOT_LOAD_TIMEOUT_S = 400
HOT_LOAD_POLL_S = 5


class HotLoads(FireworksClient):
    """Hot loads, blocking; also everything that `FireworksClient` does.

    Args:
        hotload_api_url: URL of the hot load API; default `base_url`.
    """

    def __init__(
        self,
        api_key: str,
        base_url: str = DEFAULT_BASE_URL,
        hotload_api_url: str | None = None,
        additional_headers: dict[str, str] | None = None,
        verify_ssl: bool | None = None,
    ) -> None:
        super().__init__(api_key, base_url, additional_headers, verify_ssl)
        self.hotload_api_url = (hotload_api_url or base_url).rstrip("/")
        self._last_hotload_error: str | None = None

    @property
    def last_hotload_error_message(self) -> str | None:
        """The reason why the last `wait_for_hotload` gave False; None if it gave True."""
        return self._last_hotload_error

    def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        incremental_snapshot_metadata: dict[str, Any] | None = None,
        reset_prompt_cache: bool = True,
        timeout: int = 60,
        path: str | None = None,
        cmek_resource: str | None = None,
    ) -> Row:
        """Ask a deployment to load a snapshot; the platform's answer, before it is loaded.

        Args:
            incremental_snapshot_metadata: for a delta: `previous_snapshot_identity`,
                `compression_format`, `checksum_format`.
            path: URL of the snapshot, if the deployment's own storage does not hold it.
            cmek_resource: the key that the snapshot is encrypted with.

        Raises:
            ApiStatusError: the platform refused the load.
        """
        headers = {
            "x-fireworks-hot-load-source-url": path,
            "x-fireworks-hot-load-cmek-resource": cmek_resource,
        }

        async def work() -> Row:
            requests = await self._requests(deployment_id, base_model)
            return await requests.ask(
                snapshot_identity,
                incremental_snapshot_metadata,
                reset_prompt_cache=reset_prompt_cache,
                headers={name: value for name, value in headers.items() if value},
                timeout=float(timeout),
            )

        return self._run(work, f"hot load {snapshot_identity}")

    def hotload_check_status(self, deployment_id: str, base_model: str, timeout: int = 30) -> Row:
        """Read what each replica holds and loads, as the platform reports it."""
        return self._run(
            lambda: self._status(deployment_id, base_model, float(timeout)), "hot load status"
        )

    def wait_for_hotload(
        self,
        deployment_id: str,
        base_model: str,
        expected_identity: str,
        timeout_seconds: int = HOT_LOAD_TIMEOUT_S,
        poll_interval: int = HOT_LOAD_POLL_S,
    ) -> bool:
        """Wait until every replica serves a snapshot.

        Returns:
            False if a replica refused the snapshot or the time ran out; then
            `last_hotload_error_message` has the reason.
        """
        self._last_hotload_error = None
        what = f"hot load of {expected_identity}"

        async def look(_: Observation[Seen], _hold_s: int) -> Observation[Seen]:
            replicas = read_replicas(await self._status(deployment_id, base_model))
            return Observation(_seen(judge(replicas, expected_identity), expected_identity))

        try:
            self._wait(what, look, timeout_seconds, poll_interval)
        except ProvisioningError as error:
            self._last_hotload_error = error.message
            logger.warning("%s", error.message)
            return False
        return True

    def wait_for_hotload_manager(
        self, deployment_id: str, base_model: str, timeout_s: int, poll_interval_s: int
    ) -> None:
        """Wait until a deployment lists its replicas: before that it takes no hot load.

        Raises:
            HotLoadTimeout: it listed none in time.
        """

        async def look(_: Observation[Seen], _hold_s: int) -> Observation[Seen]:
            try:
                status = await self._status(deployment_id, base_model)
            except ApiError as error:
                return Observation(Seen(deployment_id, "NOT_THERE", error.message))
            return Observation(Seen(deployment_id, "LIVE" if status.get("replicas") else "EMPTY"))

        what = f"hot load manager of {deployment_id}"
        try:
            self._wait(what, look, timeout_s, poll_interval_s)
        except ProvisioningTimeout as error:
            raise HotLoadTimeout(error.message, identity="", replicas={}) from error

    def _wait(self, what: str, look: LookAgain[Seen], timeout_s: int, poll_interval_s: int) -> None:
        async def work() -> None:
            wait = readiness_wait(what, _readiness, timeout_s, poll_interval_s)
            await until_ready(wait, look)

        self._run(work, what)

    def hotload_and_wait(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        incremental_snapshot_metadata: dict[str, Any] | None = None,
        reset_prompt_cache: bool = True,
        timeout_seconds: int = HOT_LOAD_TIMEOUT_S,
        path: str | None = None,
        cmek_resource: str | None = None,
    ) -> bool:
        """Load a snapshot (`hotload`), and wait for it (`wait_for_hotload`)."""
        self.hotload(
            deployment_id,
            base_model,
            snapshot_identity,
            incremental_snapshot_metadata,
            reset_prompt_cache,
            path=path,
            cmek_resource=cmek_resource,
        )
        return self.wait_for_hotload(deployment_id, base_model, snapshot_identity, timeout_seconds)

    async def _requests(self, deployment_id: str, base_model: str) -> HotLoadRequests:
        name = await self._plane.resource_name("deployments", deployment_id)
        return HotLoadRequests(self._transport, Target(self.hotload_api_url, name, base_model))

    async def _status(
        self, deployment_id: str, base_model: str, timeout: float = STATUS_TIMEOUT
    ) -> Row:
        requests = await self._requests(deployment_id, base_model)
        return await requests.status(timeout=timeout)


def _seen(progress: Progress, identity: str) -> Seen:
    match progress:
        case Live():
            return Seen(identity, "LIVE")
        case Failed():
            return Seen(identity, "FAILED", progress.reason)
        case Pending():
            late = "; ".join(f"{name}: {told}" for name, told in progress.waiting_for.items())
            return Seen(identity, "LOADING", late)


def _readiness(state: str) -> Readiness:
    known = {"LIVE": Readiness.READY, "FAILED": Readiness.FAILED}
    return known.get(state, Readiness.STARTING)
