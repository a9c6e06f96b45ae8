"""The requests of one model under way: each gets its id, is sent until it is taken, and polled.

Ids are given in call order and nothing here decides that order; it only sees to it that each id
reaches the server exactly once, or that its place is filled. What waits long is said, for all
requests of the model together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fireworks_training._async.http.transport import Body
from fireworks_training._async.runtime.worker import off_loop
from fireworks_training._async.training.batch_polls import BatchPolls
from fireworks_training._async.training.data_plane import (
    RESULT_GONE,
    Answer,
    DataPlane,
    NotReady,
    is_conflict,
    read_outcome,
    was_refused,
)
from fireworks_training._core.waits.reports import WaitReporter
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    InvalidArgument,
    OperationError,
    RequestFailed,
    SessionEnded,
    SessionLost,
    UsageError,
)
from fireworks_training.events import AckEvent, FinishEvent, SubmitEvent

T = TypeVar("T")

UPLOADS = 16
"""Submits under way at a time, for one client."""

POLLS = 16
"""Polls under way at a time, for one client; the oldest operations come first."""

ALWAYS_IN_THREAD = 1 << 62
"""Tokens of a request that is never made on the loop."""

logger = logging.getLogger("fireworks_training.trainer")


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request as it goes out; its body may be in pieces."""

    path: str
    body: Body
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request of an operation, once it has an id.

    Attributes:
        make: the request for an id; may raise, and its place is then filled.
        accept: content types that its result may have; None: JSON.
        instead: what to send under the same id if the server refuses it; made in a thread. For
            requests whose refusal leaves their place free.
        tokens: about how many `make` takes as long as to encode; many are made in a thread.
    """

    make: Callable[[int], WireRequest]
    accept: Mapping[str, str] | None = None
    instead: Callable[[int], WireRequest] | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class InFlightRequest:
    """A request under way: `taken` ends when the server has it or it failed."""

    seq_id: int
    taken: asyncio.Future[None]
    task: asyncio.Task[Answer]


class RequestPipeline:
    """The requests of one model.

    Args:
        plane: the trainer's HTTP interface.
        filler: makes a request that changes nothing, for a place that must not stay empty.
        failing: the same, that the trainer takes as one which has failed its step; None: it
            enforces no steps.
        name: of the client, for messages.
        saved_state: the newest state that the client saved, for messages.
        uploads: submits under way at a time.
        batch_polls: whether the trainer tells of all results of the model in one poll.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        filler: Callable[[int], WireRequest],
        failing: Callable[[int], WireRequest] | None,
        name: str,
        saved_state: Callable[[], str | None],
        uploads: int = UPLOADS,
        batch_polls: bool = False,
    ) -> None:
        self._plane = plane
        self._filler = filler
        self._failing = failing
        self._name = name
        self._saved_state = saved_state
        self._next_seq = 1
        self._uploads = asyncio.Semaphore(uploads)
        self._polls = asyncio.Semaphore(POLLS)
        self._watch = WaitReporter()
        self._look: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[Any]] = set()
        self._batch = BatchPolls(plane, name, self.keep) if batch_polls else None

    def keep(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a coroutine that ends with the client."""
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}: {name}")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def start(self, request: Request, label: str, *, adds: bool = False) -> InFlightRequest:
        """Give a request the next id and start it.

        Args:
            adds: it adds gradients, and others of its step may be sent already when it is refused.
        """
        seq_id = self._next_seq
        self._next_seq += 1
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self.keep(self._watched(request, seq_id, label, taken, adds), label)
        task.add_done_callback(partial(_release, taken))
        return InFlightRequest(seq_id, taken, task)

    async def _watched(
        self,
        request: Request,
        seq_id: int,
        label: str,
        taken: asyncio.Future[None],
        adds: bool,
    ) -> Answer:
        loop = asyncio.get_running_loop()
        wait = self._watch.begin(seq_id, f"{label} ({seq_id})", "to be sent", loop.time())
        if self._look is None:
            self._look = loop.call_at(self._watch.next_look(loop.time()), self._say_what_waits)
        note = wait.note
        try:
            async with self._uploads:
                note("no answer to its submit yet")
                submitted = loop.time()
                self._tell_submit(seq_id, label)
                request_id = await self._submit(request, seq_id, label, adds)
            self._tell_ack(seq_id, label, request_id, loop.time() - submitted)
            if not taken.done():
                taken.set_result(None)
            answer = await self._result(request_id, request, label, note)
            self._tell_finish(seq_id, label, loop.time() - submitted)
            return answer
        except ApiStatusError as error:
            if taken.done() or not was_refused(error):
                raise self._lost(seq_id, error) from error
            await self._fill(seq_id, error, adds)
            raise _refusal(error, label) from error
        except ApiError as error:
            raise self._lost(seq_id, error) from error
        finally:
            self._watch.end(seq_id)

    def _tell_submit(self, seq_id: int, label: str) -> None:
        if (events := self._plane.events) is not None:
            request = f"{self._name}/{seq_id}"
            events.emit(SubmitEvent(at=events.now(), kind="training", what=label, id=request))

    def _tell_ack(self, seq_id: int, label: str, request_id: str, seconds: float) -> None:
        if (events := self._plane.events) is not None:
            events.emit(
                AckEvent(
                    at=events.now(),
                    kind="training",
                    what=label,
                    id=f"{self._name}/{seq_id}",
                    request_id=request_id,
                    seconds=seconds,
                )
            )

    def _tell_finish(self, seq_id: int, label: str, seconds: float) -> None:
        if (events := self._plane.events) is not None:
            request = f"{self._name}/{seq_id}"
            events.emit(
                FinishEvent(
                    at=events.now(), kind="training", what=label, id=request, seconds=seconds
                )
            )

    async def _result(
        self, request_id: str, request: Request, label: str, note: Callable[[str], None]
    ) -> Answer:
        if self._batch is not None:
            note("the trainer's batch polls have not told of its result yet")
            told = await self._batch.wait(request_id)
            if told is not None:
                answer = await read_outcome(told, request_id, label)
                if not isinstance(answer, NotReady):
                    self._batch.retrieved(request_id)
                    return answer
        note("for the results before it")
        async with self._polls:
            note("no answer to a poll for its result yet")
            answer = await self._plane.result(
                request_id, what=label, headers=request.accept, note=note
            )
        if self._batch is not None:
            self._batch.retrieved(request_id)
        return answer

    async def _submit(self, request: Request, seq_id: int, label: str, adds: bool) -> str:
        sent = await self._made(request.make, request.tokens, seq_id, label, adds)
        try:
            return await self._plane.submit(sent.path, sent.body, what=label, headers=sent.headers)
        except ApiStatusError as error:
            if request.instead is None or not was_refused(error):
                raise
            logger.info("%s: %s; sent in full instead", label, error.message)
        sent = await self._made(request.instead, ALWAYS_IN_THREAD, seq_id, label, adds)
        return await self._plane.submit(sent.path, sent.body, what=label, headers=sent.headers)

    async def _made(
        self, make: Callable[[int], WireRequest], tokens: int, seq_id: int, label: str, adds: bool
    ) -> WireRequest:
        """The request, or its place filled: it has its id already, and others stand behind it."""
        try:
            return await off_loop(tokens, partial(make, seq_id))
        except Exception as error:
            await self._fill(seq_id, error, adds)
            if not isinstance(error, (TypeError, ValueError)) or isinstance(error, UsageError):
                raise
            raise InvalidArgument(f"{label} can't be sent: {error}", cause=error) from error

    async def _fill(self, seq_id: int, refusal: Exception, adds: bool) -> None:
        """Fill the place of a request that is not taken, so that the server's line goes on.

        An `optim_step` behind it may be there already: the step has to fail for the server too.
        """
        failing = self._failing if adds else None
        filler = (failing or self._filler)(seq_id)
        try:
            await self._plane.fill(
                filler.path, filler.body, filler.headers, fails=failing is not None
            )
        except ApiError as error:
            raise self._lost(seq_id, refusal) from error

    def _lost(self, seq_id: int, cause: Exception) -> SessionLost:
        why = (
            "another request holds it: does a second client drive this model"
            if isinstance(cause, ApiError) and is_conflict(cause)
            else str(cause)
        )
        return SessionLost(
            f"the place {seq_id} in the trainer's line can't be accounted for: {why}. Make a new "
            "training client, and load the last saved state.",
            last_saved_state=self._saved_state(),
            cause=cause,
        )

    def _say_what_waits(self) -> None:
        self._look = None
        if not len(self._watch):
            return
        loop = asyncio.get_running_loop()
        line = self._watch.look(loop.time())
        if line is not None:
            logger.warning("%s", line)
        self._look = loop.call_at(self._watch.next_look(loop.time()), self._say_what_waits)

    def cancel(self) -> None:
        """Cancel everything that runs."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        for task in list(self.tasks):
            task.cancel()

    async def gone(self) -> None:
        """Wait until nothing runs any more; after `cancel`."""
        tasks = [task for task in self.tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.wait(tasks)


def _release(taken: asyncio.Future[None], _: object) -> None:
    if not taken.done():
        taken.set_result(None)


def nothing_added(outcome: Answer | BaseException) -> bool:
    """Whether a request certainly left no gradients behind: it was not sent, or has failed."""
    if isinstance(outcome, RequestFailed) and outcome.error_class == RESULT_GONE:
        return False
    failed = isinstance(outcome, (OperationError, UsageError))
    return failed and not isinstance(outcome, SessionEnded)


def _refusal(error: ApiStatusError, label: str) -> RequestFailed:
    return RequestFailed(
        f"{label} was refused: {error.message}",
        category="user",
        error_class=error.error_class,
        request_id=error.request_id,
        cause=error,
    )
