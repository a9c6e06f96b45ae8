"""An operation, and the context by which it sends requests when its turn has come.

An operation is a coroutine that is given an `OperationContext`: it sends requests, waits for their
results, and may send again, as a custom loss does. Knows requests and the operation's place;
whether and when an operation may run is decided by `queue`.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from fireworks_training._async.training.data_plane import Answer
from fireworks_training._async.training.encoding import EncodingJob
from fireworks_training._async.training.requests import (
    InFlightRequest,
    Request,
    RequestPipeline,
    nothing_added,
)
from fireworks_training._core.operations import OperationLine, Role, Ticket
from fireworks_training.errors import PrecedingOperationFailed, WrongLoop

T = TypeVar("T")

_HELD_UP: contextvars.ContextVar[tuple[OperationLine, int] | None] = contextvars.ContextVar(
    "fireworks_training_held_up", default=None
)
"""Set while a custom loss runs: the line and the place in it that the loss holds up, so that
waiting for a later operation raises instead of dead-locking."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """An operation that is checked and ready to take its place in the line.

    Thousands may wait in a line, and the garbage collector walks all that they hold: so what an
    operation of the common kinds holds is bytes, in a tuple, for a function that all of them share.

    Attributes:
        role: what it does to the model.
        label: its name in messages.
        run: carries it out, when its turn has come; takes the context and `args`.
        args: what else `run` takes.
        encoding: work that is done before.
        accept_partial: apply a step of which the server may hold a failed part, too.
        passes: how many passes the step of an `optim_step` must hold; None: any number.
    """

    role: Role
    label: str
    run: Callable[..., Awaitable[T]]
    args: tuple[Any, ...] = ()
    encoding: EncodingJob[Any] | None = None
    accept_partial: bool = False
    passes: int | None = None


class OperationContext:
    """Sends the requests of one operation, from its turn in the line on.

    Args:
        requests: the model's requests.
        line: the line that the operation stands in.
        ticket: its place there.
        label: its name in messages.

    Attributes:
        over: done when the next operation may come to the head of the line.
        sent: the ids of the requests that were sent last.
    """

    __slots__ = ("_label", "_line", "_requests", "_ticket", "over", "sent")

    def __init__(
        self, requests: RequestPipeline, line: OperationLine, ticket: Ticket, label: str
    ) -> None:
        self._requests = requests
        self._line = line
        self._ticket = ticket
        self._label = label
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent: list[int] = []

    @property
    def given_up(self) -> int:
        """How many passes had succeeded in the steps that were given up before this one."""
        return self._ticket.step.given_up

    @property
    def dropped(self) -> Any:
        """How many passes had succeeded in the step that this operation puts an end to."""
        step = self._ticket.gives_up
        return 0 if step is None else step.given_up + step.succeeded

    @property
    def step(self) -> int:
        """How many `optim_step`s were issued before the operation."""
        return self._ticket.step.number

    async def send(self, requests: Sequence[Request], *, last: bool = True) -> list[Answer]:
        """Send requests with consecutive ids, and wait for all their results.

        Their ids are then in `sent`.

        Args:
            last: whether the operation sends nothing more: the line then goes on, at once where the
                server enforces steps itself, else when it has accepted these requests.

        Raises:
            FireworksTrainingError: the first failure that is not a consequence of another; the
                ticket then says whether a part may have been added.
        """
        ticket = self._ticket
        if ticket.withdrawn is not None:  # by a Ctrl-C, between two requests
            raise ticket.withdrawn
        # What a custom loss sends before its last requests adds nothing.
        adds = last and ticket.role is Role.GRADIENT
        in_flight = [self._requests.start(r, self._label, adds=adds) for r in requests]
        self.sent = [request.seq_id for request in in_flight]
        if last:
            if not self._line.step_protocol:
                await asyncio.wait([request.accepted for request in in_flight])
            self.leave()
        if len(in_flight) == 1:  # as most do
            return [await self._only(in_flight[0], adds)]
        results = await asyncio.gather(*(r.task for r in in_flight), return_exceptions=True)
        ticket.maybe_added = adds and not all(map(nothing_added, results))
        failures = [result for result in results if isinstance(result, BaseException)]
        if not failures:
            return cast(list[Answer], results)
        own = [failure for failure in failures if not isinstance(failure, PrecedingOperationFailed)]
        raise (own or failures)[0]

    async def _only(self, request: InFlightRequest, adds: bool) -> Answer:
        try:
            answer = await request.task
        except BaseException as error:
            self._ticket.maybe_added = adds and not nothing_added(error)
            raise
        self._ticket.maybe_added = adds  # even if the answer can't be read
        return answer

    def hold_up(self, caller_context: contextvars.Context) -> None:
        """Note in a context that the code it runs holds up the line from this operation on."""
        caller_context.run(_HELD_UP.set, (self._line, self._ticket.place))

    def leave(self) -> None:
        """Let the next operation come to the head of the line."""
        if not self.over.done():
            self.over.set_result(None)


def refuse_wait_in_loss(line: OperationLine, ticket: Ticket, label: str) -> None:
    """Raise `WrongLoop` inside a custom loss that holds up this operation."""
    held_up = _HELD_UP.get()
    if held_up is not None and held_up[0] is line and ticket.place >= held_up[1]:
        raise WrongLoop(
            f"{label} was waited for inside a loss function that it has to wait "
            "for: an operation behind forward_backward_custom is sent when the loss is there. "
            "Wait for it after the loss has returned."
        )
