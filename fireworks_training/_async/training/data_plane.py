"""The trainer's HTTP interface: submits a request until it is accepted, polls until it is done.

A submit whose answer was lost is sent again: the trainer knows requests by (model_id, seq_id). A
poll that is cut is made again. What an answer means for the line of operations is decided in
`requests` and `queue`; here it only becomes a payload or a typed error.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import orjson

from fireworks_training._async.http.transport import (
    Body,
    Response,
    Transport,
    report_retry,
)
from fireworks_training._async.runtime.worker import in_worker
from fireworks_training._core.backoff import Backoff
from fireworks_training._core.patience import (
    UNDECIDED,
    Patience,
    Verdict,
    judge_poll,
    judge_submit,
)
from fireworks_training._wire.server_words import scrubbed
from fireworks_training._wire.training import bodies
from fireworks_training._wire.training.batch_polls import FinishedRequest, decode_poll, encode_poll
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    OperationError,
    PrecedingOperationFailed,
    ProtocolError,
    RequestFailed,
    TrainerLost,
)

logger = logging.getLogger("fireworks_training.trainer")

Answer = Mapping[str, Any] | bytes
"""The payload of a result: a JSON object, or the bytes of a protobuf message."""

Look = Callable[[ApiError], Awaitable[None]]
"""Looks at the state of the job after a failure; raises `TrainerLost` if that has ended."""

PROTOBUF_TYPE = "application/x-protobuf"

SUBMIT_TIMEOUT = 40.0
"""Seconds that a submit may take, or that its upload may stand still; then it is sent again."""

ANSWER_TIMEOUT = 30.0
"""Seconds for an exchange that is answered at once."""

POLL_TIMEOUT = 45.0
"""Seconds for one poll, which servers answer before; then it is made again."""

QUICK_POLL = 0.5
"""Seconds; a "not ready" that comes sooner is answered by a pause of `QUICK_POLL_SHARE` of the time
waited so far, this at most and `QUICK_POLL_LEAST` at least, up to half of it shortened at random: a
short operation is not waited for long, no server is hammered, and many clients do not come in
step."""

QUICK_POLL_SHARE, QUICK_POLL_LEAST = 0.07, 0.02

IDEMPOTENCY_KEY = "X-Idempotency-Key"
"""The header that is the same each time a request is sent again."""

PARSE_INLINE = 1 << 16
"""Bytes of JSON that are parsed on the loop; more go to a thread."""

BEAT_TIMEOUT = 10.0
"""Seconds for one heartbeat, or for what can be done without."""

RESULT_GONE = "ResultExpired"
"""`error_class` of an operation whose result is lost: whether it was applied is not known."""


class DataPlane:
    """Calls the trainer's HTTP endpoints.

    Args:
        transport: the service's pool.
        base_url: of the trainer, without `/api/v1`.
        known: whether the host has answered before, so that it is waited for when it is away.
    """

    def __init__(self, transport: Transport, base_url: str, *, known: bool = False) -> None:
        self._transport = transport
        self.usage = transport.usage
        self.events = transport.events
        self._known = known
        self._base = f"{base_url.rstrip('/')}/api/v1"

    def url(self, path: str) -> str:
        """Make the absolute URL of an endpoint."""
        return f"{self._base}/{path}"

    async def call(self, path: str, payload: object, *, what: str) -> dict[str, Any]:
        """POST what is answered at once (sessions, get_info); retried by the clock, as requests of
        the control plane are."""
        return await self._answered("POST", path, payload, what)

    async def client_config(self) -> dict[str, Any]:
        """Ask how the trainer wants its requests; tried twice, since it can be done without."""
        return await self._transport.call(
            "POST",
            self.url("client/config"),
            json=bodies.client_config(),
            what="client/config",
            timeout=BEAT_TIMEOUT,
            backoff=Backoff(attempts=2),
        )

    async def get(self, path: str, *, what: str) -> dict[str, Any]:
        """GET what is answered at once; retried."""
        return await self._answered("GET", path, None, what)

    async def _answered(self, method: str, path: str, payload: object, what: str) -> dict[str, Any]:
        """Make an exchange that is answered at once, and again as `_core.patience` says; a server
        that has never answered yet is given up sooner."""
        loop = asyncio.get_running_loop()
        body = None if payload is None else orjson.dumps(payload)
        sent = None if body is None else {IDEMPOTENCY_KEY: uuid4().hex}
        patience, first = Patience(judge_submit), Backoff()
        while True:
            try:
                response = await self._transport.exchange(
                    method, self.url(path), body=body, headers=sent, timeout=ANSWER_TIMEOUT
                )
                if not response.ok:
                    raise response.error(what)
                return response.object()
            except ApiStatusError as error:
                if (lost := _lost(error)) is not None:
                    raise lost from error
                failure: ApiError = error
            except ApiError as error:
                failure = error
            budget = patience if self._has_answered() else first
            delay = budget.next_delay(failure, now=loop.time())
            if delay is None or self._hopeless(failure, loop.time()):
                raise failure
            report_retry(self.events, "training", what, budget.failures, delay, failure)
            _say_again(what, failure, delay, billing=judge_submit(failure) is Verdict.BILLING)
            await asyncio.sleep(delay)

    def _has_answered(self) -> bool:
        return self._known or self._transport.hosts.known(self._base)

    def _hopeless(self, error: ApiError, now: float) -> bool:
        """Whether a failed exchange need not be made again: nothing ever answered there."""
        return not self._known and self._transport.hosts.hopeless(self._base, error, now)

    async def beat(self, session_id: str) -> None:
        """Send one heartbeat, without a retry.

        Raises:
            ApiError: it did not arrive.
        """
        response = await self._transport.exchange(
            "POST",
            self.url("session_heartbeat"),
            body=bodies.heartbeat(session_id),
            timeout=BEAT_TIMEOUT,
        )
        if not response.ok:
            raise response.error("heartbeat")

    async def submit(
        self,
        path: str,
        body: Body,
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
        final: frozenset[int] = frozenset(),
        look: Look | None = None,
    ) -> str:
        """Send a request until the trainer accepts it; return its request id.

        How long it is sent again is `_core.patience`'s to say.

        Args:
            final: statuses that are an answer, though they are asked again elsewhere.
            look: looks whether the job has ended, when failures make that likely.

        Raises:
            TrainerLost: the trainer's process is gone.
            ApiStatusError: refused for good, or its place in the line holds another request.
            ApiError: not accepted for long; whether it was is not known.
        """
        loop = asyncio.get_running_loop()
        patience = Patience(judge_submit, final=final)
        sent = {IDEMPOTENCY_KEY: uuid4().hex, **(headers or {})}
        while True:
            try:
                return await self._submit_once(path, body, sent, what)
            except ApiError as error:
                now = loop.time()
                delay = patience.next_delay(error, now=now)
                if delay is None or self._hopeless(error, now):
                    raise
                report_retry(self.events, "training", what, patience.failures, delay, error)
                _say_again(what, error, delay, billing=judge_submit(error) is Verdict.BILLING)
                if look is not None and patience.look_due(error, now=now):
                    await look(error)
            await asyncio.sleep(delay)

    async def _submit_once(
        self, path: str, body: Body, headers: Mapping[str, str], what: str
    ) -> str:
        response = await self._transport.exchange(
            "POST", self.url(path), body=body, headers=headers, timeout=SUBMIT_TIMEOUT
        )
        if not response.ok:
            error = response.error(what)
            raise _lost(error) or error
        request_id = response.object().get("request_id")
        if not isinstance(request_id, str) or not request_id:
            raise ProtocolError(f"{what}: the trainer took the request but named no request_id")
        return request_id

    async def fill(
        self,
        path: str,
        body: Body,
        headers: Mapping[str, str] | None = None,
        *,
        fails: bool = False,
        look: Look | None = None,
    ) -> None:
        """Send a filler request; a 409 (the id is in use) counts as success.

        Args:
            fails: the trainer takes this one as failed, and answers with 400.
            look: as for `submit`.

        Raises:
            TrainerLost: the trainer's process is gone.
            ApiError: refused too, or no answer.
        """
        try:
            await self.submit(
                path, body, what="filler", headers=headers, final=frozenset({409}), look=look
            )
        except ApiStatusError as error:
            if error.status != 409 and not (fails and error.status == 400):
                raise

    async def result(
        self,
        request_id: str,
        *,
        what: str,
        headers: Mapping[str, str] | None = None,
        note: Callable[[str], None] = lambda _: None,
        look: Look | None = None,
    ) -> Answer:
        """Poll until the request is done; return its payload.

        Args:
            headers: of each poll, such as what content types are understood.
            note: called with what is waited for, whenever that changes.
            look: as for `submit`.

        Raises:
            RequestFailed: the trainer failed it.
            TrainerLost: the trainer's process is gone.
            ApiError: no answer from the trainer for long, or it was refused again and again; what
                became of the request is not known.
        """
        loop = asyncio.get_running_loop()
        url = self.url("retrieve_future")
        body = bodies.retrieve_future(request_id)
        patience, began = Patience(judge_poll), loop.time()
        while True:
            asked = loop.time()
            try:
                response = await self._transport.exchange(
                    "POST", url, body=body, headers=headers, timeout=POLL_TIMEOUT
                )
                outcome = await read_outcome(response, request_id, what)
            except ApiError as error:
                now = loop.time()
                delay = patience.next_delay(error, now=now)
                if delay is None:
                    raise _final(error, request_id, what) from error
                note(f"polls fail: {type(error).__name__}: {error}")
                report_retry(self.events, "training", what, patience.failures, delay, error)
                if judge_poll(error) is Verdict.BILLING:
                    _say_again(what, error, delay, billing=True)
                if look is not None and patience.look_due(error, now=now):
                    await look(error)
            else:
                if not isinstance(outcome, NotReady):
                    return outcome
                patience.reset()
                note(f"the trainer says it is under way ({outcome.reason})")
                now = loop.time()
                share = max(QUICK_POLL_LEAST, QUICK_POLL_SHARE * (now - began))
                pause = min(outcome.delay, share) * random.uniform(0.5, 1.0)  # noqa: S311
                delay = pause if now - asked < QUICK_POLL else 0.0
            await asyncio.sleep(delay)

    async def ended(
        self, model_id: str, cursor: int, retrieved: Sequence[str]
    ) -> tuple[list[FinishedRequest], int]:
        """Ask once, without a retry, which requests of a model have ended since a cursor.

        Returns:
            Those requests, and the next cursor.

        Raises:
            TrainerLost: the trainer's process is gone.
            ApiError: there was no such answer.
        """
        response = await self._transport.exchange(
            "POST",
            self.url("retrieve_futures"),
            body=encode_poll(model_id, cursor, retrieved),
            timeout=POLL_TIMEOUT,
        )
        if not response.ok:
            error = response.error("batch poll")
            raise _lost(error) or error
        return decode_poll(await _parsed(response))


def _say_again(what: str, error: ApiError, delay: float, *, billing: bool) -> None:
    if billing:
        logger.warning(
            "%s waits: the server answers 402, which is a matter of billing; it is asked again",
            what,
        )
    else:
        logger.warning("%s failed (%s); next try in %.1f s", what, type(error).__name__, delay)


class NotReady:
    """The answer to a poll for a request that is not done.

    Attributes:
        reason: the server's queue state, for messages.
        delay: seconds to wait before asking again, if the answer came at once.
    """

    __slots__ = ("delay", "reason")

    def __init__(self, reason: str, delay: float = QUICK_POLL) -> None:
        self.reason = reason
        self.delay = delay


async def read_outcome(response: Response, request_id: str, what: str) -> Answer | NotReady:
    """Read the answer to a poll: a JSON object, the bytes of a protobuf message, or not ready.

    Raises:
        RequestFailed: the operation failed.
        TrainerLost: the trainer's process is gone.
        ApiStatusError: the poll itself failed.
    """
    if response.status == 408:
        return _not_ready(_tolerant(response))
    if response.status == 410:
        error = response.error(what)
        # A trainer names its error; what comes without one may be another server's, for a moment.
        lost = _lost(error)
        if lost is None and error.error_class is not None:
            raise _gone(error, request_id, what)
        raise lost or error
    if not response.ok:
        raise response.error(what)
    if PROTOBUF_TYPE in response.headers.get("Content-Type", ""):
        return response.body
    payload = await _parsed(response)
    if payload.get("type") == "try_again":
        return _not_ready(payload)
    if "error" in payload:
        raise _failure(payload, request_id, what)
    return payload


def _gone(error: ApiError, request_id: str, what: str) -> RequestFailed:
    return RequestFailed(
        f"{what}: the trainer no longer has the result: {error.message}",
        category="server",
        error_class=RESULT_GONE,
        request_id=request_id,
    )


def _final(error: ApiError, request_id: str, what: str) -> ApiError | RequestFailed:
    """Make the error of a poll that is given up."""
    if isinstance(error, ApiStatusError) and error.status == 410:
        return _gone(error, request_id, what)
    return error


def _not_ready(payload: Mapping[str, Any]) -> NotReady:
    return NotReady(str(payload.get("queue_state_reason") or payload.get("queue_state")))


async def _parsed(response: Response) -> dict[str, Any]:
    if len(response.body) <= PARSE_INLINE:
        return response.object()
    return await in_worker(response.object)


def _failure(payload: Mapping[str, Any], request_id: str, what: str) -> OperationError:
    message = f"{what}: {scrubbed(str(payload['error']))}"
    if payload.get("error_class") == "PrecedingOperationFailed":
        return PrecedingOperationFailed(message, request_id=request_id)
    return RequestFailed(
        message,
        category=str(payload.get("category", "unknown")),
        error_class=payload.get("error_class"),
        request_id=request_id,
    )


def _tolerant(response: Response) -> Mapping[str, Any]:
    """Read the body of a "not ready", which may be empty or plain text."""
    try:
        return response.object()
    except ProtocolError:
        return {}


def _lost(error: ApiStatusError) -> TrainerLost | None:
    """Make the error for a trainer that is gone, if a status means that."""
    if error.status != 410 or error.error_class != "ModelLost":
        return None
    return TrainerLost(f"the trainer is gone: {error.message}", cause=error)


def was_refused(error: BaseException) -> bool:
    """Whether a submit was certainly refused, so that its place in the server's line is empty."""
    return (
        isinstance(error, ApiStatusError)
        and 400 <= error.status < 500
        and error.status not in UNDECIDED
        and error.status != 402
    )
