"""The proxy to a job's trainer: passes bytes through a Unix socket, both ways, unread.

Knows which job a request is for and whether its worker lives. Does not know operations. The key
ends here: the worker never sees it. A worker that is gone answers 410 with ModelLost, at once for
requests in flight too.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import nullcontext

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict
from yarl import URL

from fireworks_training.local.gateway.control_plane.resources import check_account, check_id
from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.control_plane.trainer_jobs import (
    CREATING,
    DELETED,
    DELETING,
    PENDING,
    RUNNING,
    Trainer,
)
from fireworks_training.local.gateway.web.auth import KEY_HEADER
from fireworks_training.local.gateway.web.extensions import are_offered
from fireworks_training.local.gateway.web.problems import (
    REQUEST_ID,
    STARTED,
    HttpProblem,
    model_lost,
)

PREFIX = "/training/v1/rlorTrainerJobs/{account}/{job}"
MAX_BODY_BYTES = 64 << 20
MAX_IN_FLIGHT = 1024
LOST_WAIT_S = 0.5

# One place for a request's path: no dots, no empty parts, no escapes that hide either.
_TAIL = re.compile(r"api/v1/[A-Za-z0-9_-][A-Za-z0-9._:-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._:-]*)*")

_NOT_FORWARDED = frozenset(
    name.lower()
    for name in (
        hdrs.CONNECTION,
        hdrs.KEEP_ALIVE,
        hdrs.PROXY_AUTHENTICATE,
        hdrs.PROXY_AUTHORIZATION,
        hdrs.TE,
        hdrs.TRAILER,
        hdrs.TRANSFER_ENCODING,
        hdrs.UPGRADE,
        "Proxy-Connection",
        # Ours alone.
        hdrs.HOST,
        hdrs.AUTHORIZATION,
        hdrs.COOKIE,
        hdrs.EXPECT,
        KEY_HEADER,
    )
)

IN_FLIGHT: web.AppKey[dict[str, int]] = web.AppKey("in_flight", dict)


def add_routes(app: web.Application) -> None:
    """Register the proxy; the app holds `CONTROL_PLANE`."""
    app[IN_FLIGHT] = {}
    app.router.add_route("*", f"{PREFIX}/{{tail:.*}}", proxy)


def forwarded_headers(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Return the headers that are passed on: not those of one connection, nor the key."""
    named = {
        name.strip().lower()
        for value in headers.getall(hdrs.CONNECTION, [])
        for name in value.split(",")
    }
    dropped = _NOT_FORWARDED | named
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )


async def proxy(request: web.Request) -> web.StreamResponse:
    """Pass one request to the worker of its job."""
    check_account(request.match_info["account"])
    id_ = check_id(request.match_info["job"], "job id")
    tail = request.raw_path.partition("?")[0].split("/", 6)[-1]
    if _TAIL.fullmatch(tail) is None:
        raise HttpProblem(404, "a trainer serves paths below api/v1/ only")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise _too_long()
    jobs = request.app[CONTROL_PLANE].jobs
    trainer, row = jobs.trainer(id_), jobs.table.get(id_)
    if trainer is None:
        if row.state in (PENDING, CREATING, RUNNING):
            raise HttpProblem(503, f"trainer job {id_!r} is starting", headers={"Retry-After": "1"})
        return model_lost(_lost_text(id_, row.state, row.message))
    in_flight = request.app[IN_FLIGHT]
    if in_flight.get(id_, 0) >= MAX_IN_FLIGHT:
        text = f"{MAX_IN_FLIGHT} requests of job {id_!r} are in flight already"
        raise HttpProblem(429, text, headers={"Retry-After": "1"})
    in_flight[id_] = in_flight.get(id_, 0) + 1
    query = request.raw_path.partition("?")[2]
    body = await _body_of(request)
    try:
        return await exchange(request, trainer, id_, f"/{tail}{'?' if query else ''}{query}", body)
    finally:
        in_flight[id_] -= 1


async def exchange(
    request: web.Request, trainer: Trainer, id_: str, path: str, body: _Body | bytes | None
) -> web.StreamResponse:
    """Pass one request on to the trainer of a job, and its answer back.

    Args:
        request: gives the method and the headers.
        path: path and query on the trainer.
        body: body on its way, or one that was read before and may have been changed.
    """
    headers = forwarded_headers(CIMultiDict(request.headers))
    headers["X-Request-Id"] = request[REQUEST_ID]
    if isinstance(body, bytes):
        headers.popall(hdrs.CONTENT_LENGTH, None)
    try:
        # A GET does not keep a trainer from being idle.
        with trainer.used() if request.method != hdrs.METH_GET else nullcontext():
            async with trainer.session.request(
                request.method,
                URL(f"http://trainer{path}", encoded=True),
                headers=headers,
                data=body.chunks() if isinstance(body, _Body) else body,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            ) as upstream:
                return await _answer_of(request, upstream)
    except aiohttp.ClientError as error:
        if isinstance(body, _Body) and body.too_long and not request.get(STARTED):
            raise _too_long() from None
        return await _after_failure(request, trainer, id_, error)
    except TimeoutError:
        raise HttpProblem(504, f"the trainer of job {id_!r} did not answer in time") from None


async def _answer_of(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    """Pass a worker's answer on."""
    if not are_offered(request.app) and upstream.content_type == "application/json":
        return await _whole_answer(upstream)
    response = web.StreamResponse(
        status=upstream.status,
        reason=upstream.reason,
        headers=forwarded_headers(CIMultiDict(upstream.headers)),
    )
    await response.prepare(request)
    # As it comes: a part of an answer is not held back until there is more of it.
    async for chunk in upstream.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response


async def _whole_answer(upstream: aiohttp.ClientResponse) -> web.Response:
    """Return a worker's answer in one piece, for a middleware to change."""
    headers = forwarded_headers(CIMultiDict(upstream.headers))
    headers.popall(hdrs.CONTENT_LENGTH, None)
    data = await upstream.read()
    return web.Response(status=upstream.status, reason=upstream.reason, headers=headers, body=data)


async def _body_of(request: web.Request) -> _Body | bytes | None:
    """Return the body to pass on: as it arrives, or whole where a middleware has read it."""
    if are_offered(request.app):
        return _Body(request) if request.can_read_body else None
    return await request.read() or None


class _Body:
    """Passes a request's body on as it arrives, and counts one without a length on the way."""

    def __init__(self, request: web.Request) -> None:
        self._content = request.content
        self.too_long = False

    async def chunks(self) -> AsyncIterator[bytes]:
        total = 0
        async for chunk in self._content.iter_any():
            total += len(chunk)
            if total > MAX_BODY_BYTES:
                # aiohttp's client hides the type of what is raised here.
                self.too_long = True
                raise _too_long()
            yield chunk


def _too_long() -> HttpProblem:
    return HttpProblem(413, f"the body is over {MAX_BODY_BYTES} bytes; send smaller chunks")


async def _after_failure(
    request: web.Request, trainer: Trainer, id_: str, error: aiohttp.ClientError
) -> web.StreamResponse:
    """Answer when the connection to the worker broke: it died, or only this exchange did."""
    if request.get(STARTED):
        # Half an answer is out; only closing the connection says that it is not whole.
        raise ConnectionResetError("the trainer's answer broke off") from error
    try:
        async with asyncio.timeout(LOST_WAIT_S):
            await trainer.lost.wait()
    except TimeoutError:
        raise HttpProblem(
            502, f"the trainer of job {id_!r} broke the connection ({type(error).__name__})"
        ) from error
    row = request.app[CONTROL_PLANE].jobs.table.get(id_)
    return model_lost(_lost_text(id_, row.state, row.message))


def _lost_text(id_: str, state: str, message: str) -> str:
    if state in (DELETING, DELETED):
        return f"trainer job {id_!r} was deleted"
    reason = f": {message}" if message else ""
    return (
        f"the trainer of job {id_!r} is gone, and the models in its memory with it"
        f" ({state}{reason}); resume the job and load a saved state"
    )
