"""The requests of one model in flight: each gets its id, is sent until accepted, and polled.

Ids are given in call order and nothing here decides that order; it only sees to it that each id
reaches the server exactly once, or that its place is filled. One log line reports all requests of
the model that have waited long.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fireworks_training._async.runtime.worker import off_loop
from fireworks_training._async.training.batch_polls import BatchPolls
from fireworks_training._async.training.data_plane import (
    RESULT_GONE,
    Answer,
    DataPlane,
    Look,
    NotReady,
    read_outcome,
    was_refused,
)
from fireworks_training._core.patience import NOT_FOUND, is_conflict
from fireworks_training._core.saved_states import SavedStates
from fireworks_training._core.waits.reports import WaitReporter
from fireworks_training._wire.training.bodies import WireRequest
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    FireworksTrainingError,
    InvalidArgument,
    OperationError,
    RequestFailed,
    SessionEnded,
    SessionLost,
    TrainerLost,
    UsageError,
)
from fireworks_training.events import AckEvent, Event, FinishEvent, SubmitEvent

T = TypeVar("T")

MAX_UPLOADS = 16
"""Submits in flight at a time, for one client."""

FILL_AGAIN_AFTER = 60.0
"""Seconds after which a filler that was refused is sent again, before the session is given up."""

FILL_WHERE_NOTHING_IS = 1.5
"""Seconds instead, where the request and its filler were answered by 404 or 410: no trainer is
there that keeps a line, and whoever waits should hear of it soon."""

MAX_POLLS = 16
"""Polls in flight at a time, for one client; the oldest operations come first."""

ALWAYS_IN_THREAD = 1 << 62
"""Tokens of a request that is never made on the loop."""

logger = logging.getLogger("fireworks_training.trainer")


MakeRequest = Callable[[int], WireRequest]
"""Makes the request that has an id."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of an operation, to be made when it has its id.

    Attributes:
        make: makes the request for an id; may raise, and its place is then filled.
        accept: content types that its result may have; None: JSON.
        fallback: makes what is sent under the same id if the server refuses it; runs in a thread.
            For requests whose refusal leaves their place free.
        tokens: how many tokens take about as long to encode as `make`; many go to a thread.
    """

    make: MakeRequest
    accept: Mapping[str, str] | None = None
    fallback: MakeRequest | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class InFlightRequest:
    """A request that has its id: `accepted` is done when the server has it or it failed."""

    seq_id: int
    accepted: asyncio.Future[None]
    task: asyncio.Task[Answer]


class RequestPipeline:
    """Sends the requests of one model, and polls for their results.

    Args:
        plane: the trainer's HTTP interface.
        filler_request: makes a request that changes nothing, for a place that must not stay empty.
        failing_request: makes one that fails its step in the trainer, too; None where the trainer
            enforces no steps.
        name: of the client, for messages.
        states: the states that the client saved, for messages.
        on_session_end: called when a request finds that the session has ended.
        gone: takes a second look where a request finds no model; why the trainer is gone, or None.
        look: looks at the state of the job while requests fail.
        uploads: submits in flight at a time.
        batch_polls: whether one poll of this trainer gives all finished results of the model.

    Attributes:
        tasks: all that runs for the model.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        filler_request: MakeRequest,
        failing_request: MakeRequest | None,
        name: str,
        states: SavedStates,
        on_session_end: Callable[[SessionEnded], None],
        gone: Callable[[], Awaitable[str | None]],
        look: Look,
        uploads: int = MAX_UPLOADS,
        batch_polls: bool = False,
    ) -> None:
        self._plane = plane
        self._filler_request = filler_request
        self._failing_request = failing_request
        self._name = name
        self._states = states
        self._on_session_end = on_session_end
        self._gone = gone
        self._look = look
        self._next_seq = 1
        self._uploads = asyncio.Semaphore(uploads)
        self._polls = asyncio.Semaphore(MAX_POLLS)
        self._waits = WaitReporter()
        self._next_report: asyncio.TimerHandle | None = None
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
        accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self.keep(self._carry_out(request, seq_id, label, accepted, adds), label)
        task.add_done_callback(partial(self._ended, accepted))
        return InFlightRequest(seq_id, accepted, task)

    def _ended(self, accepted: asyncio.Future[None], task: asyncio.Task[Answer]) -> None:
        if not accepted.done():
            accepted.set_result(None)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SessionEnded):
            self._on_session_end(error)  # others may wait for ever

    async def _carry_out(
        self,
        request: Request,
        seq_id: int,
        label: str,
        accepted: asyncio.Future[None],
        adds: bool,
    ) -> Answer:
        loop = asyncio.get_running_loop()
        wait = self._waits.begin(seq_id, f"{label} ({seq_id})", "to be sent", loop.time())
        if self._next_report is None:
            self._next_report = loop.call_at(self._waits.next_look(loop.time()), self._report_waits)
        note = wait.note
        try:
            async with self._uploads:
                note("no answer to its submit yet")
                submitted = loop.time()
                self._emit(SubmitEvent, seq_id, label)
                request_id = await self._submit(request, seq_id, label, adds)
            seconds = loop.time() - submitted
            self._emit(AckEvent, seq_id, label, request_id=request_id, seconds=seconds)
            if not accepted.done():
                accepted.set_result(None)
            answer = await self._result(request_id, request, label, note)
            self._emit(FinishEvent, seq_id, label, seconds=loop.time() - submitted)
            return answer
        except RequestFailed as error:
            if error.error_class == RESULT_GONE:
                await self._check_trainer(error)
            raise
        except ApiStatusError as error:
            if error.status in NOT_FOUND:
                await self._check_trainer(error)
            if accepted.done():
                raise _unknown(error, label) from error
            if not was_refused(error):
                await self._settle_place(seq_id, error, adds)
                raise _unknown(error, label) from error
            await self._fill(seq_id, error, adds)
            raise _refusal(error, label) from error
        except ApiError as error:
            if not accepted.done():
                await self._settle_place(seq_id, error, adds)
            raise _unknown(error, label) from error
        finally:
            self._waits.end(seq_id)

    def _emit(self, event: Callable[..., Event], seq_id: int, label: str, **fields: object) -> None:
        if (events := self._plane.events) is not None:
            request = f"{self._name}/{seq_id}"
            events.emit(event(at=events.now(), kind="training", what=label, id=request, **fields))

    async def _result(
        self, request_id: str, request: Request, label: str, note: Callable[[str], None]
    ) -> Answer:
        if self._batch is not None:
            note("the trainer's batch polls have not told of its result yet")
            response = await self._batch.wait(request_id)
            if response is not None:
                answer = await read_outcome(response, request_id, label)
                if not isinstance(answer, NotReady):
                    self._batch.retrieved(request_id)
                    return answer
        note("for the results before it")
        async with self._polls:
            note("no answer to a poll for its result yet")
            answer = await self._plane.result(
                request_id, what=label, headers=request.accept, note=note, look=self._look
            )
        if self._batch is not None:
            self._batch.retrieved(request_id)
        return answer

    async def _submit(self, request: Request, seq_id: int, label: str, adds: bool) -> str:
        wire = await self._made(request.make, request.tokens, seq_id, label, adds)
        try:
            return await self._plane.submit(
                wire.path, wire.body, what=label, headers=wire.headers, look=self._look
            )
        except ApiStatusError as error:
            if request.fallback is None or not was_refused(error):
                raise
            logger.info("%s: %s; sent in full instead", label, error.message)
        wire = await self._made(request.fallback, ALWAYS_IN_THREAD, seq_id, label, adds)
        return await self._plane.submit(
            wire.path, wire.body, what=label, headers=wire.headers, look=self._look
        )

    async def _made(
        self, make: MakeRequest, tokens: int, seq_id: int, label: str, adds: bool
    ) -> WireRequest:
        """Make a request, or else fill its place: it has its id, and others stand behind it."""
        try:
            return await off_loop(tokens, partial(make, seq_id))
        except Exception as error:
            await self._fill(seq_id, error, adds)
            if not isinstance(error, (TypeError, ValueError)) or isinstance(error, UsageError):
                raise
            raise InvalidArgument(f"{label} can't be sent: {error}", cause=error) from error

    async def _check_trainer(self, error: FireworksTrainingError) -> None:
        """Look whether the trainer is gone, where a request finds no model or no result.

        Raises:
            TrainerLost: it is, and something else than this one answer says so.
        """
        if (reason := await self._gone()) is not None:
            raise TrainerLost(f"the trainer is gone: {reason}", cause=error) from error

    async def _settle_place(self, seq_id: int, error: ApiError, adds: bool) -> None:
        """Fill a place that may be empty: a 409 to the filler says that it was taken."""
        if is_conflict(error):
            raise self._lost(seq_id, error) from error
        await self._fill(seq_id, error, adds)

    async def _fill(self, seq_id: int, refusal: Exception, adds: bool) -> None:
        """Fill the place of a request that is not accepted, so that the server's line goes on.

        An `optim_step` behind it may be there already: the step has to fail for the server too.
        """
        failing = self._failing_request if adds else None
        wire = (failing or self._filler_request)(seq_id)
        fill = partial(
            self._plane.fill,
            wire.path,
            wire.body,
            wire.headers,
            fails=failing is not None,
            look=self._look,
        )
        try:
            await fill()
            return
        except ApiError as error:
            if isinstance(error, ApiStatusError) and error.status in NOT_FOUND:
                await self._check_trainer(error)
            pause = FILL_WHERE_NOTHING_IS if _nothing_there(refusal, error) else FILL_AGAIN_AFTER
            logger.warning(
                "%s: the place %d in the trainer's line can't be filled (%s); that is tried again "
                "in %.1f s",
                self._name,
                seq_id,
                type(error).__name__,
                pause,
            )
        await asyncio.sleep(pause)
        try:
            await fill()
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
            last_saved_state=self._states.newest,
            cause=cause,
        )

    def _report_waits(self) -> None:
        self._next_report = None
        if not len(self._waits):
            return
        loop = asyncio.get_running_loop()
        line = self._waits.look(loop.time())
        if line is not None:
            logger.warning("%s", line)
        self._next_report = loop.call_at(self._waits.next_look(loop.time()), self._report_waits)

    def cancel(self) -> None:
        """Cancel everything that runs."""
        if self._next_report is not None:
            self._next_report.cancel()
            self._next_report = None
        for task in list(self.tasks):
            task.cancel()

    async def gone(self) -> None:
        """Wait until nothing runs any more; after `cancel`."""
        tasks = [task for task in self.tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.wait(tasks)


def _nothing_there(refusal: Exception, filler: ApiError) -> bool:
    """Whether a request and its filler met no trainer."""
    return all(
        isinstance(error, ApiStatusError) and error.status in (404, 410)
        for error in (refusal, filler)
    )


def nothing_added(outcome: Answer | BaseException) -> bool:
    """Whether a request certainly left no gradients behind: it was not sent, or has failed."""
    if isinstance(outcome, RequestFailed) and outcome.category != "user":
        return False  # a trainer that broke in the midst of it may have added a part
    failed = isinstance(outcome, (OperationError, UsageError))
    return failed and not isinstance(outcome, SessionEnded)


def _unknown(error: ApiError, label: str) -> RequestFailed:
    """Make the error of a request of which nobody can say what became of it."""
    return RequestFailed(
        f"{label}: what became of it is not known, since the trainer gives no answer: "
        f"{error.message}",
        category="server",
        error_class=RESULT_GONE,
        request_id=error.request_id,
        cause=error,
    )


def _refusal(error: ApiStatusError, label: str) -> RequestFailed:
    return RequestFailed(
        f"{label} was refused: {error.message}",
        category="user",
        error_class=error.error_class,
        request_id=error.request_id,
        cause=error,
    )
