"""`Transport`: the connection pool of a service; makes HTTP exchanges and their typed errors.

The pool lives on the owner loop and has no limit of its own: the concurrency controllers bound the
traffic of sampling, the operation queue that of training. It knows nothing of what the bodies mean:
callers pass bytes or JSON and get status, headers and bytes back.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Self, TypeVar, cast
from urllib.parse import urljoin

import aiohttp
import orjson

from fireworks_training._async.http.bodies import MAX_BODY, PARSE_INLINE, check_values, read_bounded
from fireworks_training._async.http.hosts import Hosts, advice, origin_of
from fireworks_training._async.http.quiet_handler import Connector
from fireworks_training._async.http.read_timeouts import ReadTimeouts
from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._async.runtime.usage_meter import UsageMeter
from fireworks_training._core.backoff import Backoff, parse_retry_after
from fireworks_training._wire.server_words import scrubbed, words_of
from fireworks_training.config import (
    attribution_headers,
    certificate_file,
    checked_key,
    checked_url,
    cloudflare_headers,
    environment_proxy,
)
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    ClientClosed,
    ConnectionFailed,
    ProtocolError,
    RequestTimedOut,
    for_status,
)
from fireworks_training.events import EventKind, RetryEvent
from fireworks_training.models import __version__

T = TypeVar("T")

Body = bytes | tuple[bytes, ...]
"""The body of a request, whole or in pieces."""

CONNECT_TIMEOUT = 30.0
"""Seconds to make a connection."""

PIECE = 1 << 18
"""Bytes of a large body that are handed to the connection at a time, so that the loop goes on."""

MAX_REDIRECTS = 5
"""Redirects of one exchange that are followed."""

USER_AGENT = f"fireworks-training/{__version__}"

logger = logging.getLogger("fireworks_training.transport")


@dataclass(frozen=True, slots=True)
class Response:
    """Holds one answer, read whole.

    Attributes:
        secrets: what no message about the answer may repeat.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    request_id: str | None
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Decode the body as JSON.

        Raises:
            ProtocolError: it is not JSON.
        """
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ProtocolError(
                f"the server answered {self.status} with a body that is not JSON "
                f"({len(self.body)} bytes); is the base URL right?",
                request_id=self.request_id,
            ) from error

    def object(self) -> dict[str, Any]:
        """Decode the body as a JSON object; an empty body is an empty object."""
        value: object = self.json() if self.body else {}
        if not isinstance(value, dict):
            raise ProtocolError(
                f"the server answered {self.status} with JSON that is not an object",
                request_id=self.request_id,
            )
        return cast(dict[str, Any], value)

    def error(self, what: str) -> ApiStatusError:
        """Make the typed error of an answer that is not `ok`."""
        message, error_class = words_of(self.body, self.secrets)
        return for_status(
            self.status,
            f"{what}: the server answered {self.status}: {message}",
            error_class=error_class,
            retry_after=parse_retry_after(
                self.headers.get("retry-after"), date=self.headers.get("date"), now=time.time()
            ),
            should_retry={"true": True, "false": False}.get(self.headers.get("x-should-retry", "")),
            request_id=self.request_id,
        )


@lru_cache(maxsize=4)
def _verifying(bundle: str) -> ssl.SSLContext:
    """Make the context that trusts a file's certificates; once, since reading them takes 60 ms."""
    return ssl.create_default_context(cafile=bundle)


class Transport:
    """Keeps the connection pool of a service, and makes its HTTP exchanges.

    Args:
        owner: the loop that the pool lives on.
        base_url: scheme, host and optional path, without a trailing slash.
        api_key: sent as `X-API-Key` and as bearer token; never part of a message or a repr.
        additional_headers: sent with every request; they win over the SDK's own.
        verify_ssl: False accepts any certificate; only on the caller's request. Otherwise
            `SSL_CERT_FILE` names certificates to trust, if set.
        events: gets the events of retries; None where nobody listens.
        hosts: the record of hosts that have answered; None begins one.

    Raises:
        InvalidArgument: `api_key` can't be sent, or `base_url` is not the URL of a host.
    """

    def __init__(
        self,
        *,
        owner: OwnerLoop,
        base_url: str,
        api_key: str,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
        events: EventHook | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.owner = owner
        self.events = events
        self.base_url = checked_url("base_url", base_url)
        self._api_key = checked_key(api_key) if api_key else api_key
        self._additional_headers = dict(additional_headers or {})
        self._verify_ssl = verify_ssl
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._attribution = attribution_headers()
        self._signed = {**cloudflare_headers(), **self._additional_headers}
        self._proxies: dict[str, str | None] = {}
        self.hosts = Hosts() if hosts is None else hosts
        self.usage = UsageMeter(time.monotonic)
        self.read_timeouts = ReadTimeouts()

    @property
    def additional_headers(self) -> Mapping[str, str]:
        """The caller's own headers, which are sent with every request."""
        return self._additional_headers

    @property
    def verify_ssl(self) -> bool:
        """Whether certificates are checked."""
        return self._verify_ssl

    def headers(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Build a request's headers: the SDK's own, then `extra`, then the caller's."""
        return {
            "X-API-Key": self._api_key,
            "Authorization": f"Bearer {self._api_key}",
            "User-Agent": USER_AGENT,
            **self._attribution,
            **(extra or {}),
            **self._signed,
        }

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may repeat: the key, and the values of the caller's own headers."""
        return (self._api_key, *self._signed.values())

    def proxy_for(self, url: str) -> str | None:
        """Find the proxy of a URL, from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

        They are read once for each host.
        """
        scheme, rest = url.split("://", 1)
        place = f"{scheme}://{rest.partition('/')[0]}"
        if place not in self._proxies:
            self._proxies[place] = environment_proxy(place)
        return self._proxies[place]

    def session(self) -> aiohttp.ClientSession:
        """Return the aiohttp session, made at first use. Call on the owner loop.

        Raises:
            ClientClosed: the transport was closed.
        """
        if self._closed:
            raise ClientClosed.of("service")
        if self._session is None:
            verify: ssl.SSLContext | bool = True
            if not self._verify_ssl:
                verify = False
            elif (bundle := certificate_file()) is not None:
                verify = _verifying(bundle)
            self._session = aiohttp.ClientSession(
                connector=Connector(verify),
                auto_decompress=True,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            )
        return self._session

    async def exchange(
        self,
        method: str,
        url: str,
        *,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        limit: int = MAX_BODY,
    ) -> Response:
        """Make one HTTP exchange, without retries; any status is an answer.

        A redirect is followed where it keeps the method; another host gets no key.

        Args:
            url: absolute, or a path below `base_url`.
            timeout: seconds until the answer begins, and again until it is whole; for a large
                body, since its last piece was taken, so that a slow upload is not cut while it
                goes on.
            limit: bytes that the answer's body may have, decompressed.

        Raises:
            ConnectionFailed: no connection, or it broke, or redirects go on.
            ProtocolError: the answer is larger than the limit.
            RequestTimedOut: no whole answer in time.
        """
        target = url if "://" in url else self.base_url + url
        sent = self.headers(headers)
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._once(method, target, body, sent, timeout, limit)
            place = response.headers.get("Location")
            keeps = response.status in (307, 308) or (
                response.status in (301, 302, 303) and method in ("GET", "HEAD")
            )
            if not keeps or not place:
                return response
            target, sent = self._redirected(target, place, sent)
        raise ConnectionFailed(
            f"{method} {_path(target)} at {self.base_url}: more than {MAX_REDIRECTS} redirects; "
            "check base_url"
        )

    def _redirected(
        self, target: str, place: str, sent: Mapping[str, str]
    ) -> tuple[str, dict[str, str]]:
        """Follow a redirect: its URL, and the headers that the host there may see."""
        there = urljoin(target, place)
        try:
            before, after = origin_of(target), origin_of(there)
        except ValueError:
            after = before = ("", "", 0)
        if after[0] not in ("http", "https") or (before[0], after[0]) == ("https", "http"):
            raise ConnectionFailed(
                f"{_path(target)} at {self.base_url} is redirected to what is no http(s) URL, or "
                "from https to plain http; check base_url"
            )
        if after == before:
            return there, dict(sent)
        own = ("X-API-Key", "Authorization", *self._attribution, *self._signed)
        private = {name.lower() for name in own}
        return there, {name: text for name, text in sent.items() if name.lower() not in private}

    async def _once(
        self,
        method: str,
        target: str,
        body: Body | None,
        headers: Mapping[str, str],
        timeout: float,
        limit: int,
    ) -> Response:
        session, sent = self.session(), dict(headers)
        pieces = body if isinstance(body, tuple) else (body or b"",)
        size = sum(map(len, pieces))
        content: bytes | AsyncIterator[memoryview] | None = None
        if body is not None and size <= PIECE:
            content = b"".join(pieces)
        try:
            async with asyncio.timeout(timeout) as clock:
                if size > PIECE:
                    sent["Content-Length"] = str(size)
                    content = _pieces(pieces, clock, timeout)
                async with session.request(
                    method,
                    target,
                    data=content,
                    headers=sent,
                    allow_redirects=False,
                    proxy=self.proxy_for(target),
                ) as response:
                    # A poll's head may come late in its time, and a large result behind it.
                    clock.reschedule(asyncio.get_running_loop().time() + timeout)
                    answer = await read_bounded(response, limit, f"{method} {_path(target)}")
        except TimeoutError as error:
            raise RequestTimedOut(
                f"{method} {_path(target)}: no answer within {timeout:g} s", cause=error
            ) from error
        except aiohttp.InvalidURL as error:
            raise ConnectionFailed(
                f"{_path(target)} at {self.base_url} is not a URL; check base_url", cause=error
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            told = scrubbed(str(error), self.secrets, limit=300) or "the connection broke"
            raise ConnectionFailed(
                f"{method} {_path(target)} at {self.base_url}: {type(error).__name__}: {told}. "
                f"{advice(target, error)}",
                cause=error,
            ) from error
        self.hosts.answered(target)
        request_id = response.headers.get("x-request-id")
        if request_id is not None:
            request_id = scrubbed(request_id, self.secrets, limit=200)
        return Response(response.status, response.headers, answer, request_id, self.secrets)

    async def call(
        self,
        method: str,
        url: str,
        *,
        what: str,
        json: object = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        backoff: Backoff | None = None,
    ) -> dict[str, Any]:
        """Make a JSON exchange with retries; the answer's object.

        Args:
            what: names the exchange in messages ("create the trainer job").
            backoff: the retry budget; None makes the usual one.

        Raises:
            ApiError: the last failure, once the retry budget is used up.
        """
        body = None if json is None else orjson.dumps(json)

        async def once() -> dict[str, Any]:
            response = await self.exchange(method, url, body=body, headers=headers, timeout=timeout)
            if not response.ok:
                raise response.error(what)
            if len(response.body) <= PARSE_INLINE:
                return response.object()
            check_values(response.body, response.request_id)
            return await in_thread(response.object)

        target = url if "://" in url else self.base_url + url
        return await with_retries(
            once,
            what=what,
            backoff=backoff or Backoff(),
            events=self.events,
            hopeless=partial(self.hosts.hopeless, target),
        )

    async def close(self) -> None:
        """Close the pool; idempotent."""
        self._closed = True
        self.read_timeouts.close()
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Transport {self.base_url}>"


async def _pieces(
    body: tuple[bytes, ...], limit: asyncio.Timeout, timeout: float
) -> AsyncIterator[memoryview]:
    """Yield a large body piece by piece; each piece that is sent moves the time limit on."""
    loop = asyncio.get_running_loop()
    for part in body:
        view = memoryview(part)
        for start in range(0, len(part), PIECE):
            yield view[start : start + PIECE]
            limit.reschedule(loop.time() + timeout)


def _path(url: str) -> str:
    """Return the path of a URL, for messages, which name the host once and queries never."""
    rest = url.split("://", 1)[-1]
    return "/" + rest.partition("/")[2].partition("?")[0]


async def with_retries(
    once: Callable[[], Awaitable[T]],
    *,
    what: str,
    backoff: Backoff,
    events: EventHook | None = None,
    kind: EventKind = "control",
    hopeless: Callable[[ApiError, float], bool] = lambda _error, _now: False,
) -> T:
    """Run `once` until it succeeds, fails for good, or the budget is used up.

    Args:
        hopeless: told of each failure and its time; True ends the retries.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return await once()
        except ApiError as error:
            delay = backoff.next_delay(error, now=loop.time())
            if delay is None or hopeless(error, loop.time()):
                raise
            logger.warning("%s failed (%s); next try in %.1f s", what, type(error).__name__, delay)
            report_retry(events, kind, what, backoff.failures, delay, error)
            await asyncio.sleep(delay)


def report_retry(
    events: EventHook | None,
    kind: EventKind,
    what: str,
    failures: int,
    delay: float,
    error: ApiError,
    request: str = "",
) -> None:
    """Emit the event that an exchange will be tried again."""
    if events is not None:
        events.emit(
            RetryEvent(
                at=events.now(),
                kind=kind,
                what=what,
                id=request,
                failures=failures,
                delay=delay,
                error=error,
            )
        )
