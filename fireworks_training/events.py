"""The events that an `on_event` hook gets: one small record for each thing that happens.

Knows the fields and units of the records, and nothing of who sends them. A request's life is
`SubmitEvent`, any number of `RetryEvent`, `AckEvent` (training), then `FinishEvent` or
`FailureEvent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from fireworks_training.models import ServerMetrics

EventKind = Literal["training", "sampling", "control", "sync"]
"""Names the receiver of a request: a trainer's data plane, a deployment, the control plane (with
hot load and session calls), or a weight sync."""

SyncStage = Literal["saved", "loading", "waiting", "live"]
"""Names how far a weight sync has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        at: time at which it happened, in seconds of `time.monotonic()`.
    """

    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitEvent(Event):
    """A request goes out; a sampling request once for each attempt, when it has its slot.

    Attributes:
        kind: "training" or "sampling".
        what: the operation's name, or "completion".
        id: names the request in all its attempts: `<model_id>/<seq_id>` for a training
            request (an operation may have several), else its `X-Request-Id`.
        attempt: counts from 1; always 1 for a training request.
    """

    kind: EventKind
    what: str
    id: str
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AckEvent(Event):
    """A trainer accepts a request, and will not execute it twice.

    Attributes:
        kind, what, id: as in its `SubmitEvent`.
        request_id: the trainer's id of it.
        seconds: time since the submit.
    """

    kind: EventKind
    what: str
    id: str
    request_id: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEvent(Event):
    """A request failed and will be tried again.

    Attributes:
        kind: any but "sync".
        what: names the request.
        id: as in its `SubmitEvent`; "" for a training or control request.
        failures: failures in a row, this one included.
        delay: seconds until the next try.
        error: the reason; it holds no prompt, token or key.
    """

    kind: EventKind
    what: str
    id: str
    failures: int
    delay: float
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishEvent(Event):
    """A request has its result.

    Attributes:
        kind, what, id: as in its `SubmitEvent`.
        seconds: time since the submit; for a sampling request, since its last attempt's.
        metrics: cost of the attempt; None for training.
    """

    kind: EventKind
    what: str
    id: str
    seconds: float
    metrics: ServerMetrics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureEvent(Event):
    """An operation, a completion or a sync failed for good: the caller gets `error`.

    Attributes:
        kind: any but "control".
        what: names the operation.
        id: a completion's as in its `SubmitEvent`; the model of a training operation, since that
            may never have been sent; the snapshot's identity of a sync.
        error: the exception that the caller gets.
    """

    kind: EventKind
    what: str
    id: str
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowEvent(Event):
    """A concurrency controller changed its window.

    Attributes:
        before, after: number of requests that may be in flight.
    """

    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncEvent(Event):
    """A snapshot moves on its way into the deployment.

    Attributes:
        identity: the snapshot's; that of a link of its chain while the link is loaded.
        stage: "saved" by the trainer, "loading" when the deployment was asked for it, "waiting"
            when the reports of the late replicas changed, "live" when all of them serve it.
        seconds: time since the sync began.
        detail: report of each late replica, for "waiting".
    """

    identity: str
    stage: SyncStage
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapEvent(Event):
    """Every replica serves another snapshot than before.

    Attributes:
        identity: the snapshot that is served now.
        previous: the snapshot that this client last saw served; None if it saw none.
    """

    identity: str
    previous: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBlockedEvent(Event):
    """The loop that does the client's work stood still; sent when it goes on.

    Attributes:
        seconds: duration of the stop.
        where: the function that held the loop, with file and line.
    """

    seconds: float
    where: str


class OnEvent(Protocol):
    """A hook: a plain function of one event, called on the owner loop; its result is ignored."""

    def __call__(self, event: Event, /) -> object: ...
