"""Carries out the line of a training client: one operation after the other takes its ids and goes.

`_core.operations.Line` decides; this module waits, sends and settles. Operations are accepted from
any thread and in order; everything else happens on the owner loop. An operation holds the line
until its last request has its id, so wire order is call order; results are awaited outside the
line, so operations overlap on the wire as far as the server allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast

import orjson

from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._async.training.data_plane import Answer, DataPlane
from fireworks_training._async.training.encoding import EncodingJob, EncodingQueue
from fireworks_training._async.training.requests import (
    UPLOADS,
    InFlightRequest,
    Request,
    RequestPipeline,
    WireRequest,
    nothing_added,
)
from fireworks_training._core.operations import OperationLine, Role, Skip, Ticket, WaitFor
from fireworks_training._outcome import Outcome, done_here
from fireworks_training.errors import (
    ClientClosed,
    FireworksTrainingError,
    NotSupported,
    OperationCancelled,
    OwnerLoopGone,
    PrecedingOperationFailed,
    SessionEnded,
    SessionLost,
    TrainerLost,
    WrongLoop,
)
from fireworks_training.events import FailureEvent
from fireworks_training.futures import APIFuture, was_retrieved

T = TypeVar("T")

UNDER_WAY = 32
"""Operations of one client that are sent and not done; more wait as they are, which costs little.
Deep enough for the pipeline of a server that is 200 ms away, and shallow enough that thousands
called at once neither fill its queue nor hold thousands of tasks here, which the garbage collector
would keep moving."""

DRAIN_TIMEOUT = 60.0
"""Seconds that `close()` gives accepted operations to finish."""

logger = logging.getLogger("fireworks_training.trainer")

_HOLDER: contextvars.ContextVar[tuple[OperationQueue, int] | None] = contextvars.ContextVar(
    "fireworks_training_holder", default=None
)
"""The line, and the place in it, that the code running here holds up: a custom loss's."""


class OperationContext:
    """An operation's time at the head of the line."""

    __slots__ = ("_label", "_runner", "over", "sent", "ticket")

    def __init__(self, runner: OperationQueue, ticket: Ticket, label: str) -> None:
        self._runner = runner
        self._label = label
        self.ticket = ticket
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent: list[int] = []

    async def send(self, requests: Sequence[Request], *, last: bool = True) -> list[Answer]:
        """Send requests with consecutive ids, and wait for all their results.

        Their ids are then in `sent`.

        Args:
            last: whether the operation sends nothing more: the line then goes on, at once where the
                server enforces steps itself, else when it has taken these requests.

        Raises:
            FireworksTrainingError: the first failure that is not a consequence of another; the
                ticket then says whether a part may have been added.
        """
        # What a custom loss sends before its last requests adds nothing.
        adds = last and self.ticket.role is Role.GRADIENT
        exchanges = [self._runner.exchange(r, self._label, adds=adds) for r in requests]
        self.sent = [exchange.seq_id for exchange in exchanges]
        if last:
            if not self._runner.line.step_protocol:
                await asyncio.wait([exchange.taken for exchange in exchanges])
            self.leave()
        if len(exchanges) == 1:  # as most do
            return [await self._only(exchanges[0], adds)]
        results = await asyncio.gather(*(e.task for e in exchanges), return_exceptions=True)
        self.ticket.maybe_added = adds and not all(map(nothing_added, results))
        failures = [result for result in results if isinstance(result, BaseException)]
        if not failures:
            return cast(list[Answer], results)
        own = [failure for failure in failures if not isinstance(failure, PrecedingOperationFailed)]
        raise (own or failures)[0]

    async def _only(self, exchange: InFlightRequest, adds: bool) -> Answer:
        try:
            answer = await exchange.task
        except BaseException as error:
            self.ticket.maybe_added = adds and not nothing_added(error)
            raise
        self.ticket.maybe_added = adds  # even if the answer can't be read
        return answer

    def hold(self, context: contextvars.Context) -> None:
        """Note in a context that what runs there holds up the line from this operation on."""
        context.run(_HOLDER.set, (self._runner, self.ticket.place))

    def leave(self) -> None:
        """Let the next operation come to the head of the line."""
        if not self.over.done():
            self.over.set_result(None)


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """An operation that is ready to take its place.

    Thousands may wait in a line, and the garbage collector walks all that they hold: so what a call
    of the common kinds holds is bytes, in a tuple, for a function that all of them share.

    Attributes:
        role: what it does to the model.
        label: its name in messages.
        run: carries it out, when its turn has come; takes the turn and `args`.
        args: what else `run` takes.
        ahead: work that is done before.
        accept_partial: see `optim_step`.
    """

    role: Role
    label: str
    run: Callable[..., Awaitable[T]]
    args: tuple[Any, ...] = ()
    ahead: EncodingJob[Any] | None = None
    accept_partial: bool = False


class QueuedOperation(Outcome[T]):
    """An operation in the line, and its outcome.

    The call goes when it is done, since futures live longer.
    """

    __slots__ = ("call", "cancelled", "runner", "started", "ticket")

    def __init__(self, runner: OperationQueue, ticket: Ticket, call: Operation[T]) -> None:
        super().__init__(label=call.label)
        self.runner = runner
        self.ticket = ticket
        self.call: Operation[T] | None = call
        self.started = False
        self.cancelled = False

    def _loop_of_work(self) -> asyncio.AbstractEventLoop | None:
        return self.runner.loop

    def _cancel_work(self) -> bool:
        return self.runner.cancel(self)

    def refuse_endless_wait(self) -> None:
        """Raise `WrongLoop` inside a custom loss that holds up this operation."""
        holder = _HOLDER.get()
        if holder is None or self.done():
            return
        if holder[0] is self.runner and self.ticket.place >= holder[1]:
            raise WrongLoop(
                f"{self.label} was waited for inside a loss function that it has to wait "
                "for: an operation behind forward_backward_custom is sent when the loss is there. "
                "Wait for it after the loss has returned."
            )


class OperationQueue:
    """The line of one model.

    Args:
        plane: the trainer's HTTP interface.
        owner: the loop that does the work.
        model_id: whose line it is, and its name in messages.
        line: the rules' state.
        filler: makes a request that changes nothing, for a place that must not stay empty.
        failing: makes one that a trainer which enforces steps takes as failed.
        forward_only: the model's weights stay as they are.
        batch_polls: whether the trainer tells of all results of the model in one poll.
        parallel: whether requests go out side by side.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        owner: OwnerLoop,
        model_id: str,
        line: OperationLine,
        filler: Callable[[int], WireRequest],
        failing: Callable[[int], WireRequest],
        forward_only: bool = False,
        batch_polls: bool = False,
        parallel: bool = True,
    ) -> None:
        self.line = line
        self._forward_only = forward_only
        self._owner = owner
        self._model_id = model_id
        self._events = plane.events
        self._exchanges = RequestPipeline(
            plane,
            filler=filler,
            failing=failing if line.step_protocol else None,
            name=model_id,
            saved_state=lambda: self.last_saved_state,
            uploads=UPLOADS if parallel else 1,
            batch_polls=batch_polls,
        )
        self._ahead = EncodingQueue()
        self._lock = threading.Lock()
        self._queue: deque[QueuedOperation[Any]] = deque()
        self._new: list[QueuedOperation[Any]] = []
        self._by_ticket: dict[Ticket, QueuedOperation[Any]] = {}
        self._places = asyncio.Semaphore(UNDER_WAY)
        self._pump: asyncio.Task[None] | None = None
        self._failures: list[BaseException] = []
        self.ended: FireworksTrainingError | None = None
        self.last_saved_state: str | None = None
        self.saved_names: set[str] = set()

    # -- from any thread ---------------------------------------------------------------------------

    def submit(self, call: Operation[T]) -> APIFuture[T]:
        """Take the next place in the line for an operation.

        Raises:
            NotSupported: it would change a model whose weights stay as they are.
            FireworksTrainingError: the session has ended, or the client was closed.
            OwnerLoopGone: nothing can run it.
        """
        if self._forward_only and call.role not in (Role.FORWARD, Role.OTHER):
            raise NotSupported(
                f"{call.label}: this is a reference client, whose weights stay as they are; it "
                "offers forward"
            )
        loop = self._owner.get()
        with self._lock:
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            entry = QueuedOperation(self, self.line.issue(call.role), call)
            self._queue.append(entry)
            self._by_ticket[entry.ticket] = entry
            first = not self._new
            self._new.append(entry)
        if first:  # whoever comes before it runs is looked after by the same call
            self._owner.post(self._begin)
            if not loop.is_running():
                self._owner.watch(call.label, self._stands_still)
        return APIFuture(entry)

    def _stands_still(self, error: OwnerLoopGone) -> None:
        """What was submitted to a loop that does not run fails; should it ever, none is sent."""
        with self._lock:
            new, self._new = self._new, []
        for entry in new:
            if self.cancel(entry):
                entry.fail(error)

    def cancel(self, entry: QueuedOperation[Any]) -> bool:
        """Cancel an operation unless it has begun; whether that was so."""
        with self._lock:
            if entry.started:
                return False
            entry.cancelled = True
            return True

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that does the work."""
        return self._owner.bound

    # -- on the owner loop -------------------------------------------------------------------------

    def _begin(self) -> None:
        with self._lock:
            new, self._new = self._new, []
        for entry in new:
            call = entry.call
            if call is not None and call.ahead is not None:
                self._ahead.add(call.ahead)
        if self._pump is None or self._pump.done():
            self._pump = self._exchanges.keep(self._work(), "line")

    async def _work(self) -> None:
        while self._queue:
            await self._places.acquire()
            with self._lock:
                if not self._queue:
                    return
                entry = self._queue.popleft()
                entry.started = True
            assert entry.call is not None
            label = entry.call.label
            turn = OperationContext(self, entry.ticket, label)
            task = self._exchanges.keep(self._carry_out(entry, entry.call, turn), label)
            task.add_done_callback(partial(self._carried_out, entry, turn))
            await turn.over

    def _carried_out(self, entry: QueuedOperation[Any], turn: OperationContext, _: object) -> None:
        turn.leave()
        self._places.release()
        if not entry.done():
            # A task that is cancelled before its first step never runs, so never settles.
            self._settle(entry, self._explain(asyncio.CancelledError()), [])

    async def _carry_out(
        self, entry: QueuedOperation[T], call: Operation[T], turn: OperationContext
    ) -> None:
        ticket = entry.ticket
        previous = self._by_ticket.get(ticket.previous) if ticket.previous else None
        error: BaseException | None = None
        result: list[T] = []
        try:
            await self._admit(entry, call)
            result.append(await call.run(turn, *call.args))
        except BaseException as caught:
            error = self._explain(caught)
            self.line.failing(ticket, error)
        turn.leave()
        if call.ahead is not None:
            self._ahead.release(call.ahead)
        if previous is not None and not previous.done():
            # Outcomes come in line order, so that a failure before this one is known by now. When
            # the session ends meanwhile, what is known stands.
            with contextlib.suppress(asyncio.CancelledError):
                await done_here(previous)
        voided = self.line.failure_before(ticket) if ticket.role.changes_model else None
        if voided is not None and (error is None or isinstance(error, PrecedingOperationFailed)):
            ticket.maybe_added |= error is None
            error = OperationLine.preceding_failed(voided)
        self._settle(entry, error, result)

    async def _admit(self, entry: QueuedOperation[Any], call: Operation[Any]) -> None:
        """Return when the operation may be sent; raise if it must not be."""
        if entry.cancelled:
            raise OperationCancelled(f"{call.label} was cancelled before it was sent")
        while True:
            verdict = self.line.verdict(entry.ticket, accept_partial=call.accept_partial)
            if isinstance(verdict, WaitFor):
                await done_here(self._by_ticket[verdict.until])
            elif isinstance(verdict, Skip):
                if verdict.discard:
                    await self._discard()
                raise verdict.error
            else:
                return

    async def _discard(self) -> None:
        def make(seq_id: int) -> WireRequest:
            body = orjson.dumps({"model_id": self._model_id, "seq_id": seq_id})
            return WireRequest("discard_gradients", body)

        try:
            await self.exchange(Request(make), "discard_gradients").task
        except SessionEnded:
            raise
        except FireworksTrainingError as error:
            raise SessionLost(
                f"the gradients of a failed step could not be dropped: {error}",
                last_saved_state=self.last_saved_state,
                cause=error,
            ) from error

    def exchange(self, request: Request, label: str, *, adds: bool = False) -> InFlightRequest:
        """Give a request the next id and start it; `adds`: it adds gradients."""
        exchange = self._exchanges.start(request, label, adds=adds)
        exchange.task.add_done_callback(self._notice_end)
        return exchange

    def _notice_end(self, task: asyncio.Task[Answer]) -> None:
        """End the session when one exchange finds that it has ended: others may wait for ever."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SessionEnded) and self.ended is None:
            ending = self._explain(error)
            assert isinstance(ending, SessionEnded)
            self.end(ending)

    def _explain(self, error: BaseException) -> BaseException:
        """The error to hand out: an operation cut by the end of the session fails with that."""
        if isinstance(error, asyncio.CancelledError):
            return self.ended or OperationCancelled("the event loop cancelled the operation")
        if isinstance(error, TrainerLost) and error.last_saved_state is None:
            return TrainerLost(
                f"{error.message}. Resume the job in a new service (trainer_job_id=...), then "
                f"load_state_with_optimizer({self.last_saved_state!r})."
                if self.last_saved_state
                else f"{error.message}. No state was saved by this client.",
                last_saved_state=self.last_saved_state,
                cause=error,
            )
        return error

    def _settle(
        self, entry: QueuedOperation[T], error: BaseException | None, result: list[T]
    ) -> None:
        del self._by_ticket[entry.ticket]
        entry.call = None
        if error is None:
            self.line.succeeded(entry.ticket)
            entry.settle(result[0])
        else:
            self.line.failed(entry.ticket, error)
            self._note_failure(error)
            entry.fail(error)
            if (events := self._events) is not None:
                events.emit(
                    FailureEvent(
                        at=events.now(),
                        kind="training",
                        what=entry.label,
                        id=self._model_id,
                        error=error,
                    )
                )

    def _note_failure(self, error: BaseException) -> None:
        """Keep the failures that nobody has retrieved, and few others."""
        if self._failures and self._failures[-1] is error:
            return  # what ends a session fails thousands of operations
        self._failures.append(error)
        if (count := len(self._failures)) >= 64 and count & (count - 1) == 0:
            # At each power of two: in proportion to their number, however few are retrieved.
            self._failures = [e for e in self._failures if not was_retrieved(e)]

    # -- the end -----------------------------------------------------------------------------------

    def end(self, error: FireworksTrainingError) -> None:
        """Fail everything that is open, and refuse everything to come."""
        with self._lock:
            self.ended = error
            waiting = list(self._queue)
            self._queue.clear()
        self._exchanges.cancel()
        for entry in waiting:
            self._settle(entry, error, [])

    async def close(self, *, drain: bool) -> None:
        """Finish what was accepted (or not), then refuse everything; cancelled, too."""
        finished = not drain or self.ended is not None
        try:
            finished = finished or await log_if_slow(
                self.drain(DRAIN_TIMEOUT),
                lambda: f"close() lets {self.open_operations} accepted operations finish",
            )
        finally:
            if not finished:
                logger.warning(
                    "close(): %d operations were not done and are given up", self.open_operations
                )
            self.end(ClientClosed.of("service"))
            await finish_in_spite_of_cancellation(self.settled())

    async def drain(self, timeout: float) -> bool:
        """Wait until every accepted operation has its outcome; whether that was in time."""
        open_entries = list(self._by_ticket.values())
        waits = [done_here(entry) for entry in open_entries]
        if not waits:
            return True
        _, late = await asyncio.wait(waits, timeout=timeout)
        for wait in late:
            wait.cancel()
        return not late

    async def settled(self) -> None:
        """Wait until nothing of this line runs any more; after `end`."""
        await self._exchanges.gone()
        await self._ahead.stop()

    @property
    def open_operations(self) -> int:
        """How many operations have no outcome yet."""
        return len(self._by_ticket)

    def first_unseen_failure(self) -> BaseException | None:
        """The first failure whose error nobody has retrieved."""
        return next((e for e in self._failures if not was_retrieved(e)), None)
