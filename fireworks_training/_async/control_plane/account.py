"""One account over HTTP: its id, and exchanges with its collections.

Knows accounts, pages and what 404 means; not what the rows hold. Every exchange runs on the
transport's owner loop, whichever loop asks for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlencode

import orjson

from fireworks_training._async.control_plane.rows import Row, naming, read_list, read_name
from fireworks_training._async.http.transport import Response, Transport, with_retries
from fireworks_training._core.backoff import BILLING_PATIENCE
from fireworks_training._core.control_patience import ControlPatience
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    InvalidArgument,
    NotFound,
    ProtocolError,
)
from fireworks_training.models import Observation

logger = logging.getLogger("fireworks_training.control_plane")

T = TypeVar("T")

PAGE_SIZE = 200
MOST_PAGES = 500
"""The most pages of one list that are read; bounds a server whose list never ends."""

LOOK_TIMEOUT = 10.0
"""Seconds for the answer to a look, beyond those for which the server may hold it."""

WRITE_TIMEOUT = 60.0
"""Seconds for an exchange that changes something."""


class SpokenPatience(ControlPatience):
    """Says once that an account's billing is paused, and that it is waited for.

    Args:
        what: names the request.
        known: whether the control plane has answered before.
    """

    def __init__(self, what: str, *, known: bool) -> None:
        super().__init__(known=known)
        self._what = what
        self._said = False

    def next_delay(self, error: ApiError, *, now: float) -> float | None:
        """Note a failed attempt; seconds to wait before the next one, or None to give up."""
        delay = super().next_delay(error, now=now)
        if self.billing_paused and delay is not None and not self._said:
            self._said = True
            logger.warning(
                "%s: the server asks for payment (402); this waits up to %.0f min for the "
                "account's billing to be settled: %s",
                self._what,
                BILLING_PATIENCE / 60,
                error,
            )
        return delay


class Account:
    """The account that a key belongs to.

    Args:
        transport: its base URL is the control plane's.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._id: str | None = None
        self._known = False
        self._lock = asyncio.Lock()

    async def id(self) -> str:
        """Look up the account's id, once.

        Raises:
            InvalidArgument: the key belongs to none, or to several.
        """
        return await self.transport.owner.run(self._find, label="account")

    async def _find(self) -> str:
        async with self._lock:
            if self._id is None:
                what = "look up the account"
                answer = await self._call("GET", "/v1/accounts?pageSize=2", what=what)
                rows = read_list(answer, "accounts", what=f"{what} (GET /v1/accounts)")
                with naming("GET /v1/accounts"):
                    names = [read_name(row) for row in rows]
                if len(names) != 1:
                    raise InvalidArgument(
                        f"the API key belongs to {len(names)} accounts; exactly one is needed"
                    )
                self._id = names[0].removeprefix("accounts/")
            return self._id

    async def path(self, collection: str, resource_id: str = "") -> str:
        """Build the path of a collection, or of one resource in it."""
        path = f"/v1/accounts/{await self.id()}/{collection}"
        return f"{path}/{resource_id}" if resource_id else path

    async def call(
        self,
        method: str,
        path: str,
        *,
        what: str,
        json: object = None,
        timeout: float = 30.0,
        after_retry: Callable[[ApiStatusError], Awaitable[Row | None]] | None = None,
    ) -> dict[str, Any]:
        """Make one exchange, with retries by the clock (`ControlPatience`); the answer's object.

        Args:
            after_retry: for a request that is not safe to repeat: told that a repeated one was
                refused with 400 or 409, since the first may have been carried out and its answer
                lost. It looks, and gives the row that is the outcome; None lets the refusal stand.
        """
        return await self.transport.owner.run(
            lambda: self._call(
                method, path, what=what, json=json, timeout=timeout, after_retry=after_retry
            ),
            label=what,
        )

    async def _call(
        self,
        method: str,
        path: str,
        *,
        what: str,
        json: object = None,
        timeout: float = 30.0,
        after_retry: Callable[[ApiStatusError], Awaitable[Row | None]] | None = None,
    ) -> dict[str, Any]:
        patience = self._patience(what)
        try:
            answer = await self.transport.call(
                method, path, what=what, json=json, timeout=timeout, backoff=patience
            )
        except ApiStatusError as error:
            self._known = True
            # The refusal itself is counted, too.
            if after_retry is None or patience.failures < 2 or error.status not in (400, 409):
                raise
            outcome = await after_retry(error)
            if outcome is None:
                raise
            return dict(outcome)
        self._known = True
        return answer

    def _patience(self, what: str) -> ControlPatience:
        return SpokenPatience(what, known=self._known)

    async def get(self, path: str) -> Row | None:
        """Look up a row; None where there is none."""
        try:
            return await self.call("GET", path, what=f"look up {path}")
        except NotFound:
            return None

    async def look(
        self, path: str, read: Callable[[Row], T], since: Observation[T] | None, hold_s: int
    ) -> Observation[T]:
        """Look up a row, answered once it differs from an earlier observation, or after `hold_s`.

        A server that can't hold an answer back answers at once.
        """
        return await self.transport.owner.run(
            lambda: self._look(path, read, since, hold_s), label=f"look up {path}"
        )

    async def _look(
        self, path: str, read: Callable[[Row], T], since: Observation[T] | None, hold_s: int
    ) -> Observation[T]:
        headers: dict[str, str] = {}
        if since is not None and since.tag is not None:
            headers["If-None-Match"] = since.tag
            if hold_s > 0:
                headers["Prefer"] = f"wait={hold_s}"
        what, clock = f"look up {path}", asyncio.get_running_loop().time
        asked = clock()

        async def once() -> Response:
            nonlocal asked
            asked = clock()
            response = await self.transport.exchange(
                "GET", path, headers=headers, timeout=hold_s + LOOK_TIMEOUT
            )
            if not response.ok and response.status not in (304, 404):
                raise response.error(what)
            return response

        response = await with_retries(
            once, what=what, backoff=self._patience(what), events=self.transport.events
        )
        self._known = True
        waited = "wait" in response.headers.get("Preference-Applied", "").lower()
        held_s = clock() - asked if waited else None
        if response.status == 304 and since is not None:
            return Observation(since.row, since.tag, held_s)
        if response.status == 404:
            return Observation(None)
        with naming(f"GET {path}"):
            row = read(response.object())
        return Observation(row, response.headers.get("ETag"), held_s)

    async def answers(self, inference_url: str, model: str, *, timeout_s: float) -> bool:
        """Ask a model for a completion of four tokens; whether it answers now."""
        body = {"model": model, "prompt": [1, 2], "max_tokens": 4, "temperature": 0.0}
        url = f"{inference_url}/inference/v1/completions"

        async def ask() -> bool:
            try:
                answer = await self.transport.exchange(
                    "POST", url, body=orjson.dumps(body), timeout=timeout_s
                )
            except ApiError:
                return False
            return answer.status == 200

        return await self.transport.owner.run(ask, label="probe")

    async def rows(self, collection: str, *keys: str, page_size: int = PAGE_SIZE) -> list[Row]:
        """Read all rows of a collection, page by page.

        Args:
            keys: the names under which a server may list the rows.

        Raises:
            ProtocolError: the list has no end.
        """
        path = await self.path(collection)
        found: list[Row] = []
        query: dict[str, object] = {"pageSize": page_size}
        for _ in range(MOST_PAGES):
            answer = await self.call("GET", f"{path}?{urlencode(query)}", what=f"list {collection}")
            found.extend(read_list(answer, *keys, what=f"list {collection} (GET {path})"))
            token = answer.get("nextPageToken")
            if not token:
                return found
            if not isinstance(token, str):
                raise ProtocolError(f"list {collection} (GET {path}): nextPageToken is no text")
            if token == query.get("pageToken"):
                raise ProtocolError(f"list {collection}: the server gave the same page twice")
            query["pageToken"] = token
        raise ProtocolError(f"list {collection}: no end after {MOST_PAGES} pages")

    async def delete(self, path: str) -> None:
        """Delete a resource; it is no error if it is gone."""
        try:
            await self.call("DELETE", path, what=f"delete {path}", timeout=WRITE_TIMEOUT)
        except ApiStatusError as error:
            if error.status not in (404, 410):
                raise
