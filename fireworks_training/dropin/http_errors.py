"""The helpers of `fireworks.training.sdk.errors`: words for errors, and requests with retries.

Programs import them beside the clients. They take responses of httpx and requests alike, and
know of them only `status_code`, `headers`, `json()` and `text`.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

DOCS_SDK = "https://docs.fireworks.ai/fine-tuning/training-sdk/introduction"
CONSOLE_URL = "https://app.fireworks.ai"
MAX_WAIT_TIME = 300
"""Seconds in which a request is sent again, unless the caller gives others."""

RETRYABLE_STATUS_CODES = (408, 425, 429, 500, 502, 503, 504)
RETRYABLE_EXCEPTIONS: tuple[type[BaseException], ...] = (ConnectionError, TimeoutError)

_LONGEST_PAUSE = 30.0
_RETRIED_BY_NAME = frozenset(
    {"TransportError", "ConnectError", "ReadError", "TimeoutException", "Timeout"}
    | {"ConnectionError", "RemoteProtocolError"}
)
"""Exceptions of httpx and requests after which a request is sent again; by name, since neither
needs to be installed."""


def format_sdk_error(
    what: str,
    cause: str,
    solution: str,
    docs_url: str | None = None,
    show_support: bool = False,
) -> str:
    """Write an error in lines: what failed, why, what to do, and where to read on."""
    lines = [what, f"  Cause: {cause}", f"  Solution: {solution}"]
    if docs_url:
        lines.append(f"  Docs: {docs_url}")
    if show_support:
        lines.append(f"  Support: {CONSOLE_URL}")
    return "\n".join(lines)


def parse_api_error(resp: Any) -> str:
    """Read the message of an error response; its first 200 characters where that is no JSON."""
    try:
        body = resp.json()
    except ValueError:
        return str(getattr(resp, "text", resp)).strip()[:200]
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def parse_retry_after(resp: Any) -> float | None:
    """Read `Retry-After` as seconds from now, at least 0; None where there is none to be read."""
    headers = getattr(resp, "headers", None) or {}
    given = str(headers.get("retry-after") or headers.get("Retry-After") or "").strip()
    if not given:
        return None
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(given)
    except ValueError:
        return None
    return max(0.0, (when - datetime.datetime.now(when.tzinfo)).total_seconds())


def _is_retryable(error: Exception, kinds: tuple[type[BaseException], ...]) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, kinds) or (bool(kinds) and bool(names & _RETRIED_BY_NAME))


def _pauses(seconds: float) -> Iterator[float]:
    """Yield the pauses before each further attempt, until the time is used up."""
    end = time.monotonic() + seconds
    for failures in itertools.count():
        left = end - time.monotonic()
        if left <= 0:
            return
        yield min(2.0**failures, _LONGEST_PAUSE, left)


def request_with_retries(
    func: Callable[..., Any], *args: Any, max_wait_time: float = MAX_WAIT_TIME, **kwargs: Any
) -> Any:
    """Call an HTTP client's method until its answer is final, or `max_wait_time` seconds are over.

    Raises:
        Exception: that of the last attempt, where it got no answer.
    """
    pauses = _pauses(max_wait_time)
    while True:
        try:
            response = func(*args, **kwargs)
        except Exception as error:
            pause = next(pauses, None) if _is_retryable(error, RETRYABLE_EXCEPTIONS) else None
            if pause is None:
                raise
        else:
            final = response.status_code not in RETRYABLE_STATUS_CODES
            pause = None if final else next(pauses, None)
            if pause is None:
                return response
        time.sleep(pause)


async def async_request_with_retries(
    func: Callable[..., Awaitable[Any]],
    *args: Any,
    max_wait_time: float = MAX_WAIT_TIME,
    retry_status_codes: tuple[int, ...] | None = None,
    retry_exceptions: tuple[type[BaseException], ...] | None = None,
    **kwargs: Any,
) -> Any:
    """Await an HTTP client's method as `request_with_retries` calls one.

    Args:
        retry_status_codes, retry_exceptions: after which to send again; an empty tuple for none.
    """
    statuses = RETRYABLE_STATUS_CODES if retry_status_codes is None else retry_status_codes
    kinds = RETRYABLE_EXCEPTIONS if retry_exceptions is None else retry_exceptions
    pauses = _pauses(max_wait_time)
    while True:
        try:
            response = await func(*args, **kwargs)
        except Exception as error:
            pause = next(pauses, None) if _is_retryable(error, kinds) else None
            if pause is None:
                raise
        else:
            pause = None if response.status_code not in statuses else next(pauses, None)
            if pause is None:
                return response
        await asyncio.sleep(pause)
