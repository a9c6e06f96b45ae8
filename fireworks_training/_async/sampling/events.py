"""Emits the events of sampling requests to an `on_event` hook.

It knows attempts and their outcomes; `run.py` decides what becomes of them. `submitted` and
`finished`, which each completion needs, take an `EventHook`: without one they are not called.
"""

from __future__ import annotations

from collections.abc import Mapping

from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.sampling.completion_stream import Attempt
from fireworks_training._async.sampling.concurrency import SamplingConcurrencyController
from fireworks_training.errors import ApiError, SamplingRequestError
from fireworks_training.events import FailureEvent, FinishEvent, RetryEvent, SubmitEvent
from fireworks_training.models import ServerMetrics

_WHAT = "completion"


def _id(headers: Mapping[str, str]) -> str:
    return headers.get("X-Request-Id", "")


def submitted(
    events: EventHook, attempt: Attempt, controller: SamplingConcurrencyController
) -> None:
    """Emit that an attempt has its slot and is sent, and the window if it has changed."""
    events.report_window(controller)
    events.emit(
        SubmitEvent(
            at=events.now(),
            kind="sampling",
            what=_WHAT,
            id=_id(attempt.headers),
            attempt=attempt.number,
        )
    )


def finished(events: EventHook, attempt: Attempt, metrics: ServerMetrics) -> None:
    """Emit that an attempt has made its completion."""
    events.emit(
        FinishEvent(
            at=events.now(),
            kind="sampling",
            what=_WHAT,
            id=_id(attempt.headers),
            seconds=metrics.client_latency or 0.0,
            metrics=metrics,
        )
    )


def retried(
    events: EventHook | None,
    headers: Mapping[str, str],
    failures: int,
    delay: float,
    error: ApiError,
) -> None:
    """Emit that an attempt failed, and that there will be another."""
    if events is not None:
        events.emit(
            RetryEvent(
                at=events.now(),
                kind="sampling",
                what=_WHAT,
                id=_id(headers),
                failures=failures,
                delay=delay,
                error=error,
            )
        )


def failed(
    events: EventHook | None, headers: Mapping[str, str], error: SamplingRequestError
) -> None:
    """Emit that a completion failed for good."""
    if events is not None:
        events.emit(
            FailureEvent(at=events.now(), kind="sampling", what=_WHAT, id=_id(headers), error=error)
        )
