"""Carries out the line of a training client: one operation after the other takes its ids and goes.

`_core.operations.Line` decides; this module waits, sends and settles. Operations are accepted from
any thread and in order; everything else happens on the owner loop. An operation holds the line
until its last request has its id, so wire order is call order; results are awaited outside the
line, so operations overlap on the wire as far as the server allows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar, cast

import orjson

from fireworks_training._async.data_plane import RESULT_GONE, DataPlane, was_refused
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._core.operations import Hold, Line, Role, Ticket, Void
from fireworks_training._wire.training import filler_body
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    FireworksTrainingError,
    OperationCancelled,
    OperationError,
    PrecedingOperationFailed,
    RequestFailed,
    SessionEnded,
    SessionLost,
    TrainerLost,
)
from fireworks_training.futures import APIFuture, Outcome, was_retrieved

T = TypeVar("T")
Payload = Mapping[str, Any]

UPLOADS = 32
"""Submits under way at a time, for one client."""

POLLS = 64
"""Polls under way at a time, for one client; the oldest operations come first."""

logger = logging.getLogger("fireworks_training.trainer")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of an operation: where it goes, and its body once it has an id."""

    path: str
    body: Callable[[int], bytes]


class Turn:
    """An operation's time at the head of the line."""

    def __init__(self, runner: LineRunner, ticket: Ticket, label: str) -> None:
        self._runner = runner
        self._label = label
        self.ticket = ticket
        self.over = asyncio.Event()

    async def send(self, requests: Sequence[Request], *, last: bool = True) -> list[Payload]:
        """Send requests with consecutive ids, and wait for all their results.

        Args:
            last: whether the operation sends nothing more: the line then goes on, at once where the
                server enforces steps itself, else when it has taken these requests.

        Raises:
            FireworksTrainingError: the first failure that is not a consequence of another; the
                ticket then says whether a part may have been added.
        """
        exchanges = [self._runner.exchange(request, self._label) for request in requests]
        if last:
            if not self._runner.line.step_protocol:
                await asyncio.wait([exchange.taken for exchange in exchanges])
            self.over.set()
        results = await asyncio.gather(*(e.task for e in exchanges), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if not failures:
            return cast(list[Payload], results)
        self.ticket.maybe_added = self.ticket.role is Role.GRADIENT and any(
            not isinstance(result, BaseException) or not _nothing_added(result)
            for result in results
        )
        own = [failure for failure in failures if not isinstance(failure, PrecedingOperationFailed)]
        raise (own or failures)[0]

    def leave(self, _: object = None) -> None:
        """Let the next operation come to the head of the line."""
        self.over.set()


def _nothing_added(failure: BaseException) -> bool:
    """Whether a failed request certainly left no gradients behind."""
    if isinstance(failure, RequestFailed) and failure.error_class == RESULT_GONE:
        return False
    return isinstance(failure, OperationError) and not isinstance(failure, SessionEnded)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request under way: `taken` ends when the server has it or it failed."""

    taken: asyncio.Future[None]
    task: asyncio.Task[Payload]


@dataclass(eq=False)
class Entry(Generic[T]):
    """An operation in the line."""

    ticket: Ticket
    label: str
    run: Callable[[Turn], Awaitable[T]]
    accept_partial: bool
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    started: bool = False
    cancelled: bool = False
    outcome: Outcome[T] = field(init=False)


class LineRunner:
    """The line of one model.

    Args:
        plane: the trainer's HTTP interface.
        owner: the loop that does the work.
        model_id: whose line it is.
        line: the rules' state.
        name: of the client, for messages.
    """

    def __init__(
        self, plane: DataPlane, *, owner: OwnerLoop, model_id: str, line: Line, name: str
    ) -> None:
        self.line = line
        self._plane = plane
        self._owner = owner
        self._model_id = model_id
        self._name = name
        self._lock = threading.Lock()
        self._queue: deque[Entry[Any]] = deque()
        self._by_ticket: dict[Ticket, Entry[Any]] = {}
        self._next_seq = 1
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._polls = asyncio.Semaphore(POLLS)
        self._pump: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failures: list[BaseException] = []
        self.ended: FireworksTrainingError | None = None
        self.last_saved_state: str | None = None

    # -- from any thread ---------------------------------------------------------------------------

    def submit(
        self,
        role: Role,
        label: str,
        run: Callable[[Turn], Awaitable[T]],
        *,
        accept_partial: bool = False,
    ) -> APIFuture[T]:
        """Take the next place in the line for an operation.

        Raises:
            FireworksTrainingError: the session has ended, or the client was closed.
            OwnerLoopGone: nothing can run it.
        """
        loop = self._owner.get()
        with self._lock:
            if self.ended is not None:
                raise self.ended.with_traceback(None)
            entry = Entry(self.line.issue(role), label, run, accept_partial)
            entry.outcome = Outcome(
                loop=lambda: loop, cancel=lambda: self._cancel(entry), label=label
            )
            self._queue.append(entry)
            self._by_ticket[entry.ticket] = entry
            self._owner.post(self._start_pump)
        return APIFuture(entry.outcome)

    def _cancel(self, entry: Entry[Any]) -> bool:
        with self._lock:
            if entry.started:
                return False
            entry.cancelled = True
            return True

    # -- on the owner loop -------------------------------------------------------------------------

    def _start_pump(self) -> None:
        if self._pump is None or self._pump.done():
            self._pump = self._keep(self._work(), "line")

    def _keep(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine, name=f"{self._name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _work(self) -> None:
        while self._queue:
            with self._lock:
                entry = self._queue.popleft()
                entry.started = True
            turn = Turn(self, entry.ticket, entry.label)
            task = self._keep(self._carry_out(entry, turn), entry.label)
            task.add_done_callback(turn.leave)
            task.add_done_callback(partial(self._settle_unstarted, entry))
            await turn.over.wait()

    def _settle_unstarted(self, entry: Entry[Any], _: object) -> None:
        """A task that is cancelled before its first step never runs, so never settles."""
        if not entry.settled.is_set():
            self._settle(entry, self._explain(asyncio.CancelledError()), [])

    async def _carry_out(self, entry: Entry[T], turn: Turn) -> None:
        previous = self._by_ticket.get(entry.ticket.previous) if entry.ticket.previous else None
        error: BaseException | None = None
        result: list[T] = []
        try:
            await self._admit(entry)
            result.append(await entry.run(turn))
        except BaseException as caught:
            error = self._explain(caught)
            self.line.failing(entry.ticket, error)
        turn.leave()
        if previous is not None:
            # Outcomes come in line order, so that a failure before this one is known by now. When
            # the session ends meanwhile, what is known stands.
            with contextlib.suppress(asyncio.CancelledError):
                await previous.settled.wait()
        voided = self.line.failure_before(entry.ticket) if entry.ticket.role.weighty else None
        if voided is not None and (error is None or isinstance(error, PrecedingOperationFailed)):
            entry.ticket.maybe_added |= error is None
            error = Line.preceding_failed(voided)
        self._settle(entry, error, result)

    async def _admit(self, entry: Entry[Any]) -> None:
        """Return when the operation may be sent; raise if it must not be."""
        if entry.cancelled:
            raise OperationCancelled(f"{entry.label} was cancelled before it was sent")
        while True:
            verdict = self.line.verdict(entry.ticket, accept_partial=entry.accept_partial)
            if isinstance(verdict, Hold):
                await self._by_ticket[verdict.until].settled.wait()
            elif isinstance(verdict, Void):
                if verdict.discard:
                    await self._discard()
                raise verdict.error
            else:
                return

    async def _discard(self) -> None:
        def body(seq_id: int) -> bytes:
            return orjson.dumps({"model_id": self._model_id, "seq_id": seq_id})

        try:
            await self.exchange(Request("discard_gradients", body), "discard_gradients").task
        except SessionEnded:
            raise
        except FireworksTrainingError as error:
            raise SessionLost(
                f"the gradients of a failed step could not be dropped: {error}",
                last_saved_state=self.last_saved_state,
                cause=error,
            ) from error

    def exchange(self, request: Request, label: str) -> Exchange:
        """Give a request the next id and start it."""
        seq_id = self._next_seq
        self._next_seq += 1
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._keep(self._exchange(request, seq_id, label, taken), f"{label} {seq_id}")

        def release(_: object) -> None:
            if not taken.done():
                taken.set_result(None)

        task.add_done_callback(release)
        task.add_done_callback(self._notice_end)
        return Exchange(taken, task)

    def _notice_end(self, task: asyncio.Task[Payload]) -> None:
        """End the session when one exchange finds that it has ended: others may wait for ever."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SessionEnded) and self.ended is None:
            ending = self._explain(error)
            assert isinstance(ending, SessionEnded)
            self.end(ending)

    async def _exchange(
        self, request: Request, seq_id: int, label: str, taken: asyncio.Future[None]
    ) -> Payload:
        body = request.body(seq_id)
        try:
            async with self._uploads:
                request_id = await self._plane.submit(request.path, body, what=label)
        except ApiStatusError as error:
            if not was_refused(error):
                raise
            await self._fill(seq_id, error)
            raise _refusal(error, label) from error
        except ApiError as error:
            raise self._lost(seq_id, error) from error
        if not taken.done():
            taken.set_result(None)
        async with self._polls:
            try:
                return await self._plane.result(request_id, what=label)
            except ApiError as error:
                raise self._lost(seq_id, error) from error

    async def _fill(self, seq_id: int, refusal: ApiStatusError) -> None:
        """Fill the place of a refused request, so that the server's line goes on."""
        try:
            await self._plane.fill("forward", filler_body(self._model_id, seq_id))
        except ApiError as error:
            raise self._lost(seq_id, refusal) from error

    def _lost(self, seq_id: int, cause: BaseException) -> SessionLost:
        return SessionLost(
            f"the place {seq_id} in the trainer's line can't be accounted for: {cause}. Make a new "
            "training client, and load the last saved state.",
            last_saved_state=self.last_saved_state,
            cause=cause,
        )

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

    def _settle(self, entry: Entry[T], error: BaseException | None, result: list[T]) -> None:
        del self._by_ticket[entry.ticket]
        if error is None:
            self.line.succeeded(entry.ticket)
            entry.outcome.settle(result[0])
        else:
            self.line.failed(entry.ticket, error)
            self._failures = [e for e in self._failures if not was_retrieved(e)] + [error]
            entry.outcome.fail(error)
        entry.settled.set()

    # -- the end -----------------------------------------------------------------------------------

    def end(self, error: FireworksTrainingError) -> None:
        """Fail everything that is open, and refuse everything to come."""
        with self._lock:
            self.ended = error
            waiting = list(self._queue)
            self._queue.clear()
        for task in list(self._tasks):
            task.cancel()
        for entry in waiting:
            self._settle(entry, error, [])

    async def drain(self, timeout: float) -> bool:
        """Wait until every accepted operation has its outcome; whether that was in time."""
        open_entries = list(self._by_ticket.values())
        waits = [asyncio.ensure_future(entry.settled.wait()) for entry in open_entries]
        if not waits:
            return True
        _, late = await asyncio.wait(waits, timeout=timeout)
        for wait in late:
            wait.cancel()
        return not late

    async def settled(self) -> None:
        """Wait until nothing of this line runs any more; after `end`."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        if tasks:
            await asyncio.wait(tasks)

    @property
    def open_operations(self) -> int:
        """How many operations have no outcome yet."""
        return len(self._by_ticket)

    def first_unseen_failure(self) -> BaseException | None:
        """The first failure whose error nobody has retrieved."""
        return next((e for e in self._failures if not was_retrieved(e)), None)


def _refusal(error: ApiStatusError, label: str) -> RequestFailed:
    return RequestFailed(
        f"{label} was refused: {error.message}",
        category="user",
        error_class=error.error_class,
        request_id=error.request_id,
        cause=error,
    )
