"""Requests of the hot load API: ask a deployment for a load, read what its replicas hold.

Knows the URL, headers and bodies, and platforms that no longer take a field; not which snapshot to
ask for, which is decided in `_core/snapshots.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fireworks_training._async.http.transport import Transport
from fireworks_training._core.backoff import Backoff
from fireworks_training.errors import ApiStatusError

PATH = "/hot_load/v1/models/hot_load"
DELTA_COMPRESSION = "arc_v2"
CHECKSUM_FORMAT = "alder32"
ASK_TIMEOUT, STATUS_TIMEOUT = 60.0, 30.0

FIELD_REST = 16
"""Loads that are asked for without a field which was refused, before it is tried again: the
platform behind a deployment may change."""


@dataclass(frozen=True, slots=True)
class Target:
    """Addresses the deployment that a snapshot goes to.

    Attributes:
        url: base URL of the hot load API.
        deployment: full resource name.
        base_model: full resource name.
    """

    url: str
    deployment: str
    base_model: str


def difference_to(previous: str, compression: str = DELTA_COMPRESSION) -> dict[str, Any]:
    """Describe a delta snapshot for the platform: its predecessor, and its format."""
    return {
        "previous_snapshot_identity": previous,
        "compression_format": compression,
        "checksum_format": CHECKSUM_FORMAT,
    }


class HotLoadRequests:
    """Sends a deployment's hot load requests, each with retries; used on the transport's loop.

    Args:
        transport: the connections, and the key.
        target: the deployment.
    """

    def __init__(self, transport: Transport, target: Target) -> None:
        self._transport = transport
        self._url = target.url + PATH
        self._headers = {
            "fireworks-model": target.base_model,
            "fireworks-deployment": target.deployment,
        }
        self._rest_of_reset = 0

    async def ask(
        self,
        identity: str,
        difference: Mapping[str, Any] | None = None,
        *,
        reset_prompt_cache: bool = True,
        headers: Mapping[str, str] | None = None,
        timeout: float = ASK_TIMEOUT,
        backoff: Backoff | None = None,
    ) -> dict[str, Any]:
        """Ask the deployment to load a snapshot; the platform's answer, before it is loaded.

        Args:
            difference: of a delta snapshot, as `difference_to` makes it.
            reset_prompt_cache: drop the prompts' caches, which the old weights made. A platform
                that no longer takes the field is asked without it for a while, and drops them by
                itself.
            headers: sent beside those that name the deployment.
        """
        body: dict[str, Any] = {"identity": identity}
        if difference:
            body["incremental_snapshot_metadata"] = difference
        ask = partial(
            self._transport.call,
            "POST",
            self._url,
            what=f"hot load {identity}",
            headers={**self._headers, **(headers or {})},
            timeout=timeout,
            backoff=backoff,
        )
        if self._rest_of_reset == 0:
            try:
                return await ask(json={**body, "reset_prompt_cache": reset_prompt_cache})
            except ApiStatusError as error:
                text = error.message.lower()
                if "reset_prompt_cache" not in text or "extra inputs" not in text:
                    raise
            self._rest_of_reset = FIELD_REST
        self._rest_of_reset -= 1
        return await ask(json=body)

    async def status(
        self, query: str = "", *, timeout: float = STATUS_TIMEOUT, backoff: Backoff | None = None
    ) -> dict[str, Any]:
        """Read what each replica holds and loads, as the platform reports it."""
        return await self._transport.call(
            "GET",
            self._url + query,
            what="read the hot load status",
            headers=self._headers,
            timeout=timeout,
            backoff=backoff,
        )
