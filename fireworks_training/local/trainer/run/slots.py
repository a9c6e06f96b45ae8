"""A trainer's models: what was asked for, its line, its results, and who waits for them.

Knows where the result of a request is and what has ended. Does not run anything.
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
    """What the request names does not exist any more, or never did in this process (410)."""

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class UnknownRequest(Exception):
    """No such request (404)."""


@dataclass(frozen=True, slots=True)
class Job:
    """An operation, and how its result is told."""

    operation: Operation
    codec: Codec


@dataclass(frozen=True, slots=True)
class CreateModel:
    """A model as it was asked for; equal values are the same request."""

    digest: bytes
    answer: Mapping[str, object]
    make: Callable[[], TrainedModel]
    limits: ModelLimits
    lora: LoraSettings | None
    base_model: str = ""


@dataclass(slots=True)
class Slot:
    """A model and all that belongs to it.

    Results are known by the part of their request's id behind the model's: a *tail*.

    Attributes:
        created: None until the model was made; then its answer or why it failed.
        unloaded: likewise for its end; `unloading` once it was asked for.
        ended: ids of the requests that have a result, in the order in which they got it.
    """

    model_id: str
    session_id: str
    request: CreateModel
    line: ModelLine[Job, EncodedResult]
    leases: Leases
    model: TrainedModel | None = None
    created: EncodedResult | Failure | None = None
    unloading: bool = False
    unloaded: EncodedResult | None = None
    waiters: dict[str, asyncio.Event] = field(default_factory=dict)
    ended: FinishedRequests = field(default_factory=FinishedRequests)

    def notify(self, tail: str) -> None:
        """A result is there: wakes those who wait for it, and those who wait for any."""
        waiter = self.waiters.pop(tail, None)
        if waiter is not None:
            waiter.set()
        self.ended.add(f"{self.model_id}:{tail}")

    async def result(self, tail: str) -> EncodedResult | Failure:
        """A result, waited for, handed out.

        Raises:
            Gone, NotFound: as `outcome` does.
        """
        while (outcome := self.outcome(tail)) is None:
            await self.waiters.setdefault(tail, asyncio.Event()).wait()
        self.delivered(tail)
        return outcome

    def outcome(self, tail: str) -> EncodedResult | Failure | None:
        """A result; None while it is not there.

        Raises:
            Gone: it was dropped.
            NotFound: nothing was submitted under this id.
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
        """A result was handed out: among the first to be dropped when room is needed."""
        seq_id = _seq_id(tail)
        if seq_id is not None:
            self.line.delivered(seq_id)


def _seq_id(tail: str) -> int | None:
    number = tail.removeprefix("op-")
    ours = number.isascii() and number.isdigit() and len(number) < 19 and number != tail
    return int(number) if ours else None
