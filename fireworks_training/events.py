"""What an `on_event` hook is told: one small record for each thing that happens.

The records, and nothing of who sends them. A request's life is `SubmitEvent`, any number of
`RetryEvent`, `AckEvent` (training), then `FinishEvent` or `FailureEvent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from fireworks_training.models import ServerMetrics

EventKind = Literal["training", "sampling", "control", "sync"]
"""Whose request it is: of a trainer's data plane, of a deployment, of the control plane (hot load
and session calls included), or a weight sync."""

SyncStage = Literal["saved", "loading", "waiting", "live"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        at: when it happened, in seconds of `time.monotonic()`.
    """

    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitEvent(Event):
    """A request goes out; a sampling request once for each attempt, when it has its slot.

    Attributes:
        kind: "training" or "sampling".
        what: the operation's name, or "completion".
        id: of the request, the same for all its attempts: `<model_id>/<seq_id>` of a training
            request (an operation may have several), else its `X-Request-Id`.
        attempt: counts from 1; that of a training request is always 1.
    """

    kind: EventKind
    what: str
    id: str
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AckEvent(Event):
    """The trainer has taken a request, and will not take it twice.

    Attributes:
        kind, what, id: as in its `SubmitEvent`.
        request_id: what the trainer calls it.
        seconds: since the submit.
    """

    kind: EventKind
    what: str
    id: str
    request_id: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEvent(Event):
    """An exchange failed and will be tried again.

    Attributes:
        kind: any but "sync".
        what: names the exchange.
        id: as in its `SubmitEvent`; of a training or control exchange "".
        failures: how many there were in a row, this one included.
        delay: seconds until the next try.
        error: why; it holds no prompt, token or key.
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
        seconds: since the submit; of a sampling request, since that of its last attempt.
        metrics: what the attempt cost; None for training.
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
        what: names it.
        id: of a completion as in its `SubmitEvent`; of a training operation its model, since it may
            never have been sent; of a sync the snapshot's identity.
        error: what the caller gets.
    """

    kind: EventKind
    what: str
    id: str
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowEvent(Event):
    """A concurrency controller changed its window.

    Attributes:
        before, after: requests that may be in flight.
    """

    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncEvent(Event):
    """A snapshot on its way into the deployment.

    Attributes:
        identity: of the snapshot; of a link of its chain while that is loaded.
        stage: "saved" by the trainer, "loading" when the deployment was asked for it, "waiting"
            when the reports of the late replicas changed, "live" when all of them serve it.
        seconds: since the sync began.
        detail: of "waiting": what each late replica reports.
    """

    identity: str
    stage: SyncStage
    seconds: float
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapEvent(Event):
    """Every replica serves another snapshot than before.

    Attributes:
        identity: what is served now.
        previous: what this client last saw served; None if it saw nothing.
    """

    identity: str
    previous: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopBlockedEvent(Event):
    """The loop that does the client's work stood still; told when it goes on.

    Attributes:
        seconds: for how long.
        where: the function that held it, with file and line.
    """

    seconds: float
    where: str


class OnEvent(Protocol):
    """A hook: a plain function of one event, called on the owner loop.

    What it returns is ignored.
    """

    def __call__(self, event: Event, /) -> object: ...
