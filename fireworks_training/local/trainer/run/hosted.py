"""A model that the trainer hosts: its request, its queue, its results, and the polls that wait.

Knows where the result of a request is, and which requests have ended. Does not run anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fireworks_training.local.model.model import LoraSettings
from fireworks_training.local.results import FinishedRequests
from fireworks_training.local.trainer.queue.leases import Leases
from fireworks_training.local.trainer.queue.line import (
    Expired,
    Failure,
    ModelLine,
    UnknownPlace,
)
from fireworks_training.local.trainer.queue.operations import Codec, EncodedResult, Operation
from fireworks_training.local.trainer.run.execution import TrainedModel
from fireworks_training.local.trainer.wire.datums import ModelLimits


class Gone(Exception):
    """Raised for a session, model or result that this process does not have any more (410)."""

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class UnknownRequest(Exception):
    """Raised for a request id under which nothing was submitted (404)."""


@dataclass(frozen=True, slots=True)
class SubmittedOperation:
    """Holds an operation in the queue, and the codec of its result."""

    operation: Operation
    codec: Codec


@dataclass(frozen=True, slots=True)
class CreateModel:
    """Holds the request for a model.

    Attributes:
        digest: hash of the request's content: equal ones are the same request.
        answer: fields of the answer once the model is made.
        make: makes the model, on the torch thread.
        limits: bounds of its datums.
        lora: settings of its adapter, or None.
        base_model: resource name, for answers.
    """

    digest: bytes
    answer: Mapping[str, object]
    make: Callable[[], TrainedModel]
    limits: ModelLimits
    lora: LoraSettings | None
    base_model: str = ""


@dataclass(slots=True)
class HostedModel:
    """Keeps a model with its queue, its results, and the polls that wait for them.

    Results are found by the part of their request's id behind the model's: a *tail*.

    Attributes:
        created: None until the model was made; then the answer, or the failure.
        unloading: whether an unload was requested.
        unloaded: None until the model was unloaded; then the answer.
        waiters: events of the polls that wait, by tail.
        ended: ids of the requests that have a result, in the order in which they got it.
    """

    model_id: str
    session_id: str
    request: CreateModel
    line: ModelLine[SubmittedOperation, EncodedResult]
    leases: Leases
    model: TrainedModel | None = None
    created: EncodedResult | Failure | None = None
    unloading: bool = False
    unloaded: EncodedResult | None = None
    waiters: dict[str, asyncio.Event] = field(default_factory=dict)
    ended: FinishedRequests = field(default_factory=FinishedRequests)

    def notify(self, tail: str) -> None:
        """Wakes the polls that wait for a new result, or for any."""
        waiter = self.waiters.pop(tail, None)
        if waiter is not None:
            waiter.set()
        self.ended.add(f"{self.model_id}:{tail}")

    async def result(self, tail: str) -> EncodedResult | Failure:
        """Waits for a result and hands it out.

        Raises:
            Gone, UnknownRequest: as `outcome` does.
        """
        while (outcome := self.outcome(tail)) is None:
            await self.waiters.setdefault(tail, asyncio.Event()).wait()
        self.delivered(tail)
        return outcome

    def outcome(self, tail: str) -> EncodedResult | Failure | None:
        """Looks up a result; None while it is not there.

        Raises:
            Gone: it was dropped.
            UnknownRequest: nothing was submitted under this id.
        """
        if tail == "create":
            return self.created
        if tail == "unload" and self.unloading:
            return self.unloaded
        seq_id = _seq_id(tail)
        if seq_id is None:
            raise UnknownRequest(f"there is no request {tail[:40]!r} of this model")
        try:
            return self.line.result(seq_id)
        except UnknownPlace as error:
            raise UnknownRequest(str(error)) from error
        except Expired as error:
            raise Gone(str(error), "ResultExpired") from error

    def delivered(self, tail: str) -> None:
        """Notes that a result was handed out: it is among the first to go when room is needed."""
        seq_id = _seq_id(tail)
        if seq_id is not None:
            self.line.delivered(seq_id)


def _seq_id(tail: str) -> int | None:
    number = tail.removeprefix("op-")
    ours = number.isascii() and number.isdigit() and len(number) < 19 and number != tail
    return int(number) if ours else None
