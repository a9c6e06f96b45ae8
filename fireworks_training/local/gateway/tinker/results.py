"""Sampling requests that were taken, and their results until their clients have them.

Knows who asked for what, when it ended and for how long it is kept. Does not know what sampling is:
a request is a coroutine that gives the body of an answer and its content type.

A request is known by its id, and a repeated one finds the first. Results of an earlier process are
gone: asked for by name, they are answered with 410, on which clients sample anew; and so is a batch
poll for requests that are not under way here, since its client would wait for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field

import orjson

from fireworks_training.local.gateway.inference.engine_stream import EngineGone
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.results import FinishedRequests, RequestOutcome, SamplingTarget

log = logging.getLogger(__name__)

MAX_PENDING = 4096
"""Samples that run or wait, all requests together."""
MAX_RESULTS = 4096
MAX_LOGS = 4096
"""Sampling sessions and clones whose endings are remembered for batch polls."""
CLONE = 10**9
"""A clone's `seq_id`s begin at its own number times this."""

Result = tuple[bytes, str]


@dataclass(slots=True, eq=False)
class _Pending:
    digest: bytes
    samples: int
    task: asyncio.Task[Result]
    delivered: bool = False


@dataclass(slots=True, eq=False)
class _Log:
    """Keeps the endings of one clone's requests; `open` counts those that have not ended."""

    ended: FinishedRequests = field(default_factory=FinishedRequests)
    open: int = 0


class SampleResults:
    """Runs sampling requests in tasks, and keeps their results.

    Args:
        most: results that are kept; of those that have ended, delivered ones go first.
    """

    def __init__(self, most: int = MAX_RESULTS) -> None:
        self._most = most
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._logs: OrderedDict[tuple[str, int], _Log] = OrderedDict()
        self._waiting = 0

    def taken(self, session: str, seq_id: int, digest: bytes) -> tuple[str, bool]:
        """Return the id of a request, and whether it was taken already.

        Raises:
            HttpProblem: 409 when another request has this place.
        """
        request_id = f"{session}:sample-{seq_id}"
        known = self._pending.get(request_id)
        if known is not None and known.digest != digest:
            raise HttpProblem(409, f"seq_id {seq_id} was used for another request")
        return request_id, known is not None

    def take(
        self,
        session: str,
        seq_id: int,
        digest: bytes,
        samples: int,
        run: Callable[[], Coroutine[None, None, Result]],
    ) -> str:
        """Start a request, if it was not taken meanwhile; return its id.

        Raises:
            HttpProblem: 409 as `taken`, 429 when too much waits.
        """
        request_id, known = self.taken(session, seq_id, digest)
        if known:
            return request_id
        if self._waiting and self._waiting + samples > MAX_PENDING:
            text = f"{self._waiting} samples run or wait already"
            raise HttpProblem(429, text, headers={"Retry-After": "1"})
        task = asyncio.create_task(run(), name=request_id)
        self._pending[request_id] = _Pending(digest, samples, task)
        log_ = self._log(session, seq_id // CLONE)
        log_.open += 1
        self._waiting += samples

        def end(_: object) -> None:
            self._waiting -= samples
            log_.open -= 1
            log_.ended.add(request_id)

        task.add_done_callback(end)
        self._make_room()
        return request_id

    def _log(self, session: str, clone: int) -> _Log:
        found = self._logs.setdefault((session, clone), _Log())
        self._logs.move_to_end((session, clone))
        if len(self._logs) > MAX_LOGS:
            idle = (key for key, other in self._logs.items() if not other.open)
            oldest = next(idle)
            if oldest != (session, clone):
                del self._logs[oldest]
        return found

    def _make_room(self) -> None:
        if len(self._pending) <= self._most:
            return
        finished = [key for key, pending in self._pending.items() if pending.task.done()]
        finished.sort(key=lambda key: not self._pending[key].delivered)
        for key in finished[: len(self._pending) - self._most]:
            del self._pending[key]

    async def result(self, request_id: str, hold_s: float) -> Result | None:
        """Return a result and its content type; None when it is not there within `hold_s`.

        Raises:
            HttpProblem: 410 when the request is not known (any more), or has to be sent again.
        """
        pending = self._pending.get(request_id)
        if pending is None:
            raise HttpProblem(410, f"no result of {request_id[:150]!r} is here; sample again")
        await asyncio.wait([pending.task], timeout=hold_s)
        if not pending.task.done():
            return None
        if pending.task.cancelled():
            raise HttpProblem(410, f"{request_id!r} was cancelled")
        error = pending.task.exception()
        if isinstance(error, EngineGone):
            self._pending.pop(request_id, None)
            raise HttpProblem(410, f"{error}; sample again")
        pending.delivered = True
        if error is None:
            return pending.task.result()
        server = not isinstance(error, HttpProblem) or error.status >= 500
        if server:
            log.error("sampling failed", exc_info=error)
        failure = {"error": str(error), "category": "server" if server else "user"}
        return orjson.dumps(failure), "application/json"

    async def ended(
        self, target: SamplingTarget, cursor: int, hold_s: float
    ) -> tuple[list[RequestOutcome], int]:
        """Return what has ended of a clone's requests after a cursor; wait for it up to `hold_s`
        seconds.

        Raises:
            HttpProblem: 410 for a cursor that this process never gave, or when none of its requests
                is under way that could end.
        """
        key = target.sampling_session_id, target.cloned_sampler_id
        log_ = self._logs.get(key, _Log())
        behind = cursor < log_.ended.cursor
        if cursor > log_.ended.cursor or (hold_s > 0 and not behind and not log_.open):
            raise HttpProblem(
                410,
                f"nothing of {target.sampling_session_id!r} is under way here: the process that had"
                " its requests is gone. Make another sampling client",
            )
        await log_.ended.wait(cursor, hold_s)
        request_ids, cursor = log_.ended.after(cursor)
        return [self._ended(request_id) for request_id in request_ids], cursor

    def _ended(self, request_id: str) -> RequestOutcome:
        pending = self._pending.get(request_id)
        if pending is None:
            return RequestOutcome(
                request_id, failed=False
            )  # asked for by name, it is answered with 410
        if pending.task.cancelled() or pending.task.exception() is not None:
            return RequestOutcome(request_id, failed=True)
        return RequestOutcome(request_id, False, *pending.task.result())

    def retrieved(self, session: str, request_ids: Iterable[str]) -> None:
        """Mark results that their client has: they are among the first to be dropped. Others are
        ignored."""
        for request_id in request_ids:
            pending = self._pending.get(request_id)
            if pending is not None and request_id.startswith(f"{session}:"):
                pending.delivered = True

    def cancel(self, request_id: str) -> None:
        """Free what a request takes. Idempotent."""
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.task.cancel()

    async def close(self) -> None:
        """Cancel everything that runs."""
        tasks = [pending.task for pending in self._pending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
