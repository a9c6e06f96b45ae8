"""The operation queue of a training client: one operation after the other takes its ids and goes.

`_core.operations.OperationLine` decides; this module waits, sends and settles. Operations are
accepted from any thread and in order; everything else happens on the owner loop. An operation holds
the line until its last request has its id, so wire order is call order; results are awaited outside
the line, so operations overlap on the wire as far as the server allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.failure_log import FailureLog
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training._async.training.context import (
    Operation,
    OperationContext,
    refuse_wait_in_loss,
)
from fireworks_training._async.training.data_plane import DataPlane, Look
from fireworks_training._async.training.encoding import EncodingQueue
from fireworks_training._async.training.requests import (
    MAX_UPLOADS,
    MakeRequest,
    Request,
    RequestPipeline,
)
from fireworks_training._core.operations import LineStep, OperationLine, Role, Skip, Ticket, WaitFor
from fireworks_training._core.saved_states import SavedStates
from fireworks_training._outcome import LOOP_ADVICE, Outcome, done_here, mark_retrieved
from fireworks_training._portal import at_exit
from fireworks_training._wire.training.bodies import discard_gradients
from fireworks_training.errors import (
    ClientClosed,
    FireworksTrainingError,
    LossFailed,
    NotSupported,
    OperationCancelled,
    OwnerLoopGone,
    PrecedingOperationFailed,
    SessionEnded,
    SessionLost,
    TrainerLost,
)
from fireworks_training.events import FailureEvent
from fireworks_training.futures import APIFuture

T = TypeVar("T")

MAX_RUNNING = 32
"""Operations of one client that are sent and not done; more wait as they are, which costs little.
Deep enough for the pipeline of a server that is 200 ms away, and shallow enough that thousands
called at once neither fill its queue nor hold thousands of tasks here, which the garbage collector
would keep moving."""

DRAIN_TIMEOUT = 60.0
"""Seconds that `close()` gives accepted operations to finish."""

logger = logging.getLogger("fireworks_training.trainer")


class QueuedOperation(Outcome[T]):
    """An operation in the queue, and its outcome.

    The operation is let go of when it is done, since futures live longer.
    """

    __slots__ = ("_queue", "cancelled", "operation", "started", "ticket")

    def __init__(self, queue: OperationQueue, ticket: Ticket, operation: Operation[T]) -> None:
        super().__init__(label=operation.label)
        self._queue = queue
        self.ticket = ticket
        self.operation: Operation[T] | None = operation
        self.started = False
        self.cancelled: OperationCancelled | None = None

    def _loop_of_work(self) -> asyncio.AbstractEventLoop | None:
        return self._queue.loop

    def _cancel_work(self) -> bool:
        return self._queue.cancel(self)

    def handed_out(self) -> None:
        """Note in the line that the caller has seen the failure."""
        self._queue.saw(self)

    def interrupted(self) -> None:
        """Take back a pass whose waiter was ended by Ctrl-C."""
        self._queue.withdraw(self)

    def refuse_endless_wait(self) -> None:
        """Raise `WrongLoop` inside a custom loss that holds up this operation."""
        if not self.done():
            refuse_wait_in_loss(self._queue.line, self.ticket, self.label)


class OperationQueue:
    """Carries out the operations of one model in call order.

    Args:
        plane: the trainer's HTTP interface.
        owner: the loop that does the work.
        model_id: the model, and its name in messages.
        line: the state of the rules.
        filler_request: makes a request that changes nothing, for a place that must not stay empty.
        failing_request: makes one that a trainer which enforces steps takes as failed.
        states: the states that the client saved, for messages.
        gone: takes a second look whether the trainer is gone; why, or None.
        look: looks at the state of the job while requests fail.
        forward_only: the model's weights stay as they are.
        batch_polls: whether one poll of this trainer gives all finished results of the model.
        parallel: whether requests go out side by side.

    Attributes:
        ended: why no more operations are accepted; None while they are.
        failures: tells those that nobody waits for, and keeps those that nobody has asked about.
    """

    def __init__(
        self,
        plane: DataPlane,
        *,
        owner: OwnerLoop,
        model_id: str,
        line: OperationLine,
        filler_request: MakeRequest,
        failing_request: MakeRequest,
        states: SavedStates,
        gone: Callable[[], Awaitable[str | None]],
        look: Look,
        forward_only: bool = False,
        batch_polls: bool = False,
        parallel: bool = True,
    ) -> None:
        self.line = line
        self.ended: FireworksTrainingError | None = None
        self.failures = FailureLog(model_id)
        self._lacking = 0  # void steps that a save was last warned of
        self._forget_exit: Callable[[], None] | None = None
        self._forward_only = forward_only
        self._owner = owner
        self._model_id = model_id
        self._events = plane.events
        self._states = states
        self._requests = RequestPipeline(
            plane,
            filler_request=filler_request,
            failing_request=failing_request if line.step_protocol else None,
            name=model_id,
            states=states,
            on_session_end=self._end_session,
            gone=gone,
            look=look,
            uploads=MAX_UPLOADS if parallel else 1,
            batch_polls=batch_polls,
        )
        self._encodings = EncodingQueue()
        self._lock = threading.Lock()
        self._waiting: deque[QueuedOperation[Any]] = deque()
        self._new: list[QueuedOperation[Any]] = []
        self._by_ticket: dict[Ticket, QueuedOperation[Any]] = {}
        self._places = asyncio.Semaphore(MAX_RUNNING)
        self._pump: asyncio.Task[None] | None = None

    # -- from any thread ---------------------------------------------------------------------------

    def freeze(self) -> None:
        """Take forward passes only from now on: the weights are what they are to be."""
        self._forward_only = True

    def submit(self, operation: Operation[T]) -> APIFuture[T]:
        """Take the next place in the line for an operation.

        Raises:
            NotSupported: it would change a model whose weights stay as they are.
            FireworksTrainingError: the session has ended, or the client was closed.
            OwnerLoopGone: nothing can run it.
        """
        if self._forward_only and operation.role not in (Role.FORWARD, Role.OTHER):
            raise NotSupported(
                f"{operation.label}: this is a reference client, whose weights stay as they are; "
                "it offers forward"
            )
        loop = self._owner.get()
        with self._lock:
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            ticket = self.line.issue(operation.role, passes=operation.passes)
            queued = QueuedOperation(self, ticket, operation)
            self._waiting.append(queued)
            self._by_ticket[queued.ticket] = queued
            first = not self._new
            self._new.append(queued)
            if self._forget_exit is None:
                self._forget_exit = at_exit(self._model_id, self._say_at_exit)
        if ticket.gives_up is not None and ticket.step.emptied_by is not None:
            self._say_given_up(ticket.gives_up, ticket.step.emptied_by)
        if first:  # whatever is submitted before it runs is begun by the same callback
            self._owner.post(self._begin)
            if not loop.is_running():
                self._owner.watch(operation.label, self._fail_new)
        return APIFuture(queued)

    def _fail_new(self, error: OwnerLoopGone) -> None:
        """Fail what was submitted to a loop that stands still; none is sent if it runs again."""
        with self._lock:
            new, self._new = self._new, []
        for queued in new:
            if self.cancel(queued):
                queued.fail(error)

    def cancel(self, queued: QueuedOperation[Any]) -> bool:
        """Cancel an operation that has not begun; return whether it was cancelled."""
        with self._lock:
            if queued.started or queued.cancelled:
                return queued.cancelled is not None
            queued.cancelled = OperationCancelled(
                f"{queued.label} was cancelled before it was sent"
            )
            self.line.cancelled(queued.ticket, queued.cancelled)
            return True

    def saw(self, queued: QueuedOperation[Any]) -> None:
        """Note that the caller was handed the failure of an operation."""
        with self._lock:
            self.line.saw(queued.ticket)

    def withdraw(self, queued: QueuedOperation[Any]) -> None:
        """Take back a pass whose wait was ended by Ctrl-C: its step is over."""
        if queued.ticket.role is not Role.GRADIENT or self.cancel(queued):
            return
        error = OperationCancelled(f"{queued.label} was withdrawn: Ctrl-C ended the wait for it")
        mark_retrieved(error)
        with self._lock:
            withdrawn = self.line.withdraw(queued.ticket, error)
        if not withdrawn and not queued.done():
            logger.warning(
                "%s: Ctrl-C came when the optim_step behind it had been sent: the step is applied",
                queued.label,
            )

    def _say_given_up(self, step: LineStep, cause: BaseException) -> None:
        logger.warning(
            "%s: a new step begins, since you have seen that an operation failed (%s); %d passes "
            "of the step before that had succeeded are dropped with it",
            self._model_id,
            type(cause).__name__,
            step.given_up + step.succeeded,
        )

    async def _say_at_exit(self) -> None:
        void = self.line.void_steps
        self.failures.say_again("at exit", void_steps=void, unfinished=len(self._by_ticket))

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop that does the work."""
        return self._owner.bound

    # -- on the owner loop -------------------------------------------------------------------------

    def _begin(self) -> None:
        with self._lock:
            new, self._new = self._new, []
        for queued in new:
            operation = queued.operation
            if operation is not None and operation.encoding is not None:
                self._encodings.add(operation.encoding)
        if self._pump is None or self._pump.done():
            self._pump = self._requests.keep(self._work(), "line")

    async def _work(self) -> None:
        try:
            await self._take_turns()
        except asyncio.CancelledError:
            if self.ended is None:  # the loop ends, and no other will carry on
                self.end(self._loop_gone())
            raise

    def _loop_gone(self) -> OwnerLoopGone:
        return OwnerLoopGone(
            "the event loop that owns this service has ended, and the service was not closed. "
            + LOOP_ADVICE
        )

    async def _take_turns(self) -> None:
        while self._waiting:
            await self._places.acquire()
            with self._lock:
                if not self._waiting:
                    return
                queued = self._waiting.popleft()
                queued.started = True
            operation = queued.operation
            assert operation is not None
            context = OperationContext(self._requests, self.line, queued.ticket, queued.label)
            run = self._carry_out(queued, operation, context)
            task = self._requests.keep(run, queued.label)
            task.add_done_callback(partial(self._carried_out, queued, context))
            await context.over

    def _carried_out(
        self, queued: QueuedOperation[Any], context: OperationContext, _: object
    ) -> None:
        context.leave()
        self._places.release()
        if not queued.done():
            # A task that is cancelled before its first step never runs, so never settles.
            self._settle(queued, self._explain(asyncio.CancelledError()), [])

    async def _carry_out(
        self, queued: QueuedOperation[T], operation: Operation[T], context: OperationContext
    ) -> None:
        ticket = queued.ticket
        previous = self._by_ticket.get(ticket.previous) if ticket.previous else None
        error: BaseException | None = None
        result: list[T] = []
        try:
            await self._admit(queued, operation)
            result.append(await operation.run(context, *operation.args))
        except BaseException as caught:
            error = self._explain(caught)
        with self._lock:
            if ticket.withdrawn is not None:
                ticket.maybe_added |= error is None
                error = ticket.withdrawn
            if error is not None:
                self.line.will_fail(ticket, error)
        context.leave()
        if operation.encoding is not None:
            self._encodings.release(operation.encoding)
        if previous is not None and not previous.done():
            # Outcomes come in line order, so that a failure before this one is known by now. When
            # the session ends meanwhile, what is known stands.
            with contextlib.suppress(asyncio.CancelledError):
                await done_here(previous)
        if ticket.role is Role.DISCARD and error is None:
            result[:] = [context.dropped]  # which is known now
        voided = self.line.failure_before(ticket) if ticket.role.changes_model else None
        if ticket.role is Role.OPTIM and error is None and self.line.step_protocol:
            voided = None  # a trainer that enforces steps says that it is whole
        if voided is not None and (error is None or isinstance(error, PrecedingOperationFailed)):
            ticket.maybe_added |= error is None
            error = OperationLine.preceding_failed(voided)
        self._settle(queued, error, result)

    async def _admit(self, queued: QueuedOperation[Any], operation: Operation[Any]) -> None:
        """Return when the operation may be sent; raise if it must not be."""
        if queued.cancelled:
            raise queued.cancelled
        while True:
            with self._lock:
                if queued.ticket.withdrawn is not None:
                    raise queued.ticket.withdrawn
                verdict = self.line.verdict(queued.ticket, accept_partial=operation.accept_partial)
            if isinstance(verdict, WaitFor):
                await done_here(self._by_ticket[verdict.until])
            elif isinstance(verdict, Skip):
                if verdict.discard:
                    await self._discard()
                raise verdict.error
            else:
                if verdict.discard:
                    await self._discard()
                return

    async def _discard(self) -> None:
        """Have the trainer drop the gradients of a failed step."""
        request = Request(partial(discard_gradients, self._model_id))
        try:
            await self._requests.start(request, "discard_gradients").task
        except SessionEnded:
            raise
        except FireworksTrainingError as error:
            raise SessionLost(
                f"the gradients of a failed step could not be dropped: {error}",
                last_saved_state=self._states.newest,
                cause=error,
            ) from error

    def _explain(self, error: BaseException) -> BaseException:
        """Choose the error to hand out: what the end of the session cut fails with that."""
        if isinstance(error, asyncio.CancelledError):
            if self.ended is None:
                self.end(self._loop_gone())
            return self.ended or error
        if isinstance(error, TrainerLost) and error.last_saved_state is None:
            newest = self._states.newest
            return TrainerLost(
                f"{error.message}. Resume the job in a new service (trainer_job_id=...), then "
                f"load_state_with_optimizer({newest!r})."
                if newest
                else f"{error.message}. No state was saved by this client.",
                last_saved_state=newest,
                cause=error,
            )
        return error

    def _settle(
        self, queued: QueuedOperation[T], error: BaseException | None, result: list[T]
    ) -> None:
        del self._by_ticket[queued.ticket]
        queued.operation = None
        ticket = queued.ticket
        if error is None:
            with self._lock:
                self.line.succeeded(ticket)
            queued.settle(result[0])
            if ticket.role is Role.SAVE and self.line.void_steps > self._lacking:
                self._say_lacking(queued.label)
            return
        with self._lock:
            self.line.failed(ticket, error)
            cause = error.cause if isinstance(error, LossFailed) else None
            if isinstance(cause, KeyboardInterrupt):
                self.line.saw(ticket)
        what = f"operation {ticket.place + 1} ({queued.label}) of step {ticket.step.number + 1}"
        self.failures.note(error, what, waited_for=queued.is_waited_for)
        queued.fail(error)
        if (events := self._events) is not None:
            events.emit(
                FailureEvent(
                    at=events.now(),
                    kind="training",
                    what=queued.label,
                    id=self._model_id,
                    error=error,
                )
            )

    def _say_lacking(self, label: str) -> None:
        self._lacking = self.line.void_steps
        logger.warning(
            "%s: %s: the weights that were saved lack %d steps, whose optim_step was not applied",
            self._model_id,
            label,
            self._lacking,
        )

    # -- the end -----------------------------------------------------------------------------------

    def _end_session(self, error: SessionEnded) -> None:
        if self.ended is None:
            ending = self._explain(error)
            assert isinstance(ending, SessionEnded)
            self.end(ending)

    def end(self, error: FireworksTrainingError) -> None:
        """Fail everything that is open, and refuse everything to come."""
        with self._lock:
            if self.ended is not None:
                return
            self.ended = error
            waiting = list(self._waiting)
            self._waiting.clear()
        self._requests.cancel()
        for queued in waiting:
            self._settle(queued, error, [])

    async def close(self, *, drain: bool) -> None:
        """Finish what was accepted (or not), then refuse everything; cancelled, too."""
        finished = not drain or self.ended is not None
        try:
            finished = finished or await log_if_slow(
                self._drain(DRAIN_TIMEOUT),
                lambda: f"close() lets {len(self._by_ticket)} accepted operations finish",
            )
        finally:
            if not finished:
                logger.warning(
                    "close(): %d operations were not done and are given up", len(self._by_ticket)
                )
            self.failures.say_again("close()", void_steps=self.line.void_steps)
            if self._forget_exit is not None:
                self._forget_exit()
            self.end(ClientClosed.of("service"))
            self.ended = ClientClosed.of("service")
            await finish_in_spite_of_cancellation(self._stop())

    async def _drain(self, timeout: float) -> bool:
        """Wait until every accepted operation has its outcome; return whether that was in time."""
        waits = [done_here(queued) for queued in list(self._by_ticket.values())]
        if not waits:
            return True
        _, late = await asyncio.wait(waits, timeout=timeout)
        for wait in late:
            wait.cancel()
        return not late

    async def _stop(self) -> None:
        """Wait until nothing of this queue runs any more; after `end`."""
        await self._requests.gone()
        await self._encodings.stop()
