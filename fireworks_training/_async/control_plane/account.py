"""One account over HTTP: who it is, and exchanges with its collections.

Knows accounts, pages and what 404 means; not what the rows hold. Every exchange runs on the
transport's owner loop, from whatever loop it is asked for.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast
from urllib.parse import urlencode

from fireworks_training._async.control_plane.rows import Row
from fireworks_training._async.transport import Transport
from fireworks_training.errors import ApiStatusError, InvalidArgument, NotFound, ProtocolError

PAGE_SIZE = 200
MOST_PAGES = 500
"""Pages of a list that are followed; a server that never ends one is cut off there."""

WRITE_TIMEOUT = 60.0
"""Seconds for an exchange that changes something."""


class Account:
    """The account that a key belongs to.

    Args:
        transport: its base URL is the control plane's.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._id: str | None = None
        self._lock = asyncio.Lock()

    async def id(self) -> str:
        """The account's id, looked up once.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        return await self.transport.owner.run(self._find, label="account")

    async def _find(self) -> str:
        async with self._lock:
            if self._id is None:
                answer = await self.transport.call(
                    "GET", "/v1/accounts?pageSize=2", what="look up the account"
                )
                names = [str(row["name"]) for row in answer.get("accounts", [])]
                if len(names) != 1:
                    raise InvalidArgument(
                        f"the API key belongs to {len(names)} accounts; exactly one is needed"
                    )
                self._id = names[0].removeprefix("accounts/")
            return self._id

    async def path(self, collection: str, resource_id: str = "") -> str:
        """Path of a collection, or of one resource in it."""
        path = f"/v1/accounts/{await self.id()}/{collection}"
        return f"{path}/{resource_id}" if resource_id else path

    async def call(
        self, method: str, path: str, *, what: str, json: object = None, timeout: float = 30.0
    ) -> dict[str, Any]:
        """An exchange with retries."""
        return await self.transport.owner.run(
            lambda: self.transport.call(method, path, what=what, json=json, timeout=timeout),
            label=what,
        )

    async def get(self, path: str) -> Row | None:
        """A row; None where there is none."""
        try:
            return await self.call("GET", path, what=f"look up {path}")
        except NotFound:
            return None

    async def rows(self, collection: str, *keys: str, page_size: int = PAGE_SIZE) -> list[Row]:
        """All rows of a collection, page by page.

        Args:
            keys: the names that a server may list them under.

        Raises:
            ProtocolError: the list has no end.
        """
        path = await self.path(collection)
        found: list[Row] = []
        query: dict[str, object] = {"pageSize": page_size}
        for _ in range(MOST_PAGES):
            answer = await self.call("GET", f"{path}?{urlencode(query)}", what=f"list {collection}")
            pages = (cast(list[Row], answer.get(key) or []) for key in keys)
            found.extend(next((page for page in pages if page), list[Row]()))
            token = answer.get("nextPageToken")
            if not token:
                return found
            if token == query.get("pageToken"):
                raise ProtocolError(f"list {collection}: the server gave the same page twice")
            query["pageToken"] = token
        raise ProtocolError(f"list {collection}: no end after {MOST_PAGES} pages")

    async def delete(self, path: str) -> None:
        """Delete a resource; one that is gone is fine."""
        try:
            await self.call("DELETE", path, what=f"delete {path}", timeout=WRITE_TIMEOUT)
        except ApiStatusError as error:
            if error.status not in (404, 410):
                raise
