"""The hot loads of a deployment: asked for, looked at, waited for.

A hot load counts as done when every replica reports the snapshot (`_core.snapshots`), not only the
first one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fireworks_training._async.resources.readiness import LookAgain, until_ready
from fireworks_training._async.weights.weight_sync import PATH as HOT_LOAD_PATH
from fireworks_training._core.lifecycle import Readiness, ReadinessWait, Seen
from fireworks_training._core.snapshots import (
    Failed,
    Live,
    Pending,
    Progress,
    judge,
    read_replicas,
)
from fireworks_training.compat.client import DEFAULT_BASE_URL, FireworksClient, Row
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    HotLoadTimeout,
    ProvisioningError,
    ProvisioningTimeout,
)
from fireworks_training.models import Observation

logger = logging.getLogger("fireworks_training.compat")

DEFAULT_DELTA_COMPRESSION = "arc_v2"
DEFAULT_CHECKSUM_FORMAT = "alder32"
HOT_LOAD_TIMEOUT_S = 400
HOT_LOAD_POLL_S = 5


class HotLoads(FireworksClient):
    """Hot loads, blocking; also everything that `FireworksClient` does.

    Args:
        hotload_api_url: where snapshots are loaded; default `base_url`.
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
        """Why the last `wait_for_hotload` gave False; None if it did not."""
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
            incremental_snapshot_metadata: of a delta: `previous_snapshot_identity`,
                `compression_format`, `checksum_format`.
            path: where the snapshot lies, if the deployment's own storage does not hold it.
            cmek_resource: the key that it is encrypted with.

        Raises:
            ApiStatusError: the platform refused it.
        """
        headers = {
            "x-fireworks-hot-load-source-url": path,
            "x-fireworks-hot-load-cmek-resource": cmek_resource,
        }
        body: Row = {"identity": snapshot_identity, "reset_prompt_cache": reset_prompt_cache}
        if incremental_snapshot_metadata:
            body["incremental_snapshot_metadata"] = incremental_snapshot_metadata

        async def work() -> Row:
            extra = {name: value for name, value in headers.items() if value}
            try:
                return await self._hot_load(
                    "POST", deployment_id, base_model, float(timeout), body, extra
                )
            except ApiStatusError as error:
                text = error.message.lower()
                # A platform that no longer knows the field says so, and resets the cache by itself.
                if "reset_prompt_cache" not in text or "extra inputs" not in text:
                    raise
            body.pop("reset_prompt_cache")
            return await self._hot_load(
                "POST", deployment_id, base_model, float(timeout), body, extra
            )

        return self._run(work, f"hot load {snapshot_identity}")

    def hotload_check_status(self, deployment_id: str, base_model: str, timeout: int = 30) -> Row:
        """What each replica holds and loads, as the platform says it."""
        return self._run(
            lambda: self._hot_load("GET", deployment_id, base_model, float(timeout)),
            "hot load status",
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

        False if one refused it or the time ran out; `last_hotload_error_message` says which.
        """
        self._last_hotload_error = None
        what = f"hot load of {expected_identity}"

        async def look(_: Observation[Seen], _hold_s: int) -> Observation[Seen]:
            status = await self._hot_load("GET", deployment_id, base_model, 30.0)
            return Observation(
                _seen(judge(read_replicas(status), expected_identity), expected_identity)
            )

        try:
            self._wait(what, look, timeout_seconds, poll_interval)
        except ProvisioningError as error:
            self._last_hotload_error = error.message
            logger.warning("%s", error.message)
            return False
        return True

    def _wait_for_manager(
        self, deployment_id: str, base_model: str, timeout_s: int, poll_interval_s: int
    ) -> None:
        """Wait until a deployment lists its replicas: before that it takes no hot load."""

        async def look(_: Observation[Seen], _hold_s: int) -> Observation[Seen]:
            try:
                status = await self._hot_load("GET", deployment_id, base_model, 30.0)
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
            watch = ReadinessWait(
                what,
                _readiness,
                started=asyncio.get_running_loop().time(),
                budget=timeout_s,
                queue_budget=timeout_s,
                slowest=poll_interval_s,
            )
            await until_ready(watch, look)

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
        """`hotload`, then `wait_for_hotload`."""
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

    async def _hot_load(
        self,
        method: str,
        deployment_id: str,
        base_model: str,
        timeout: float,
        body: Row | None = None,
        headers: dict[str, str] | None = None,
    ) -> Row:
        name = await self._plane.resource_name("deployments", deployment_id)
        return await self._transport.call(
            method,
            self.hotload_api_url + HOT_LOAD_PATH,
            what=f"hot load of {deployment_id}",
            json=body,
            headers={
                "fireworks-model": base_model,
                "fireworks-deployment": name,
                **(headers or {}),
            },
            timeout=timeout,
        )


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
