"""What the state of a trainer job or a deployment means for somebody who waits for it."""

from __future__ import annotations

from enum import Enum


class Readiness(Enum):
    """What to do with a resource in some state."""

    READY = "ready"
    STARTING = "starting"
    QUEUED = "queued"
    RESUMABLE = "resumable"
    GONE = "gone"
    FAILED = "failed"


_JOB: dict[str, Readiness] = {
    "JOB_STATE_RUNNING": Readiness.READY,
    "JOB_STATE_IDLE": Readiness.READY,
    "JOB_STATE_PENDING": Readiness.QUEUED,
    "JOB_STATE_FAILED": Readiness.RESUMABLE,
    "JOB_STATE_CANCELLED": Readiness.RESUMABLE,
    "JOB_STATE_PAUSED": Readiness.RESUMABLE,
    "JOB_STATE_COMPLETED": Readiness.RESUMABLE,
    "JOB_STATE_EARLY_STOPPED": Readiness.FAILED,
    "JOB_STATE_CANCELLING": Readiness.FAILED,
    "JOB_STATE_DELETING": Readiness.GONE,
    "JOB_STATE_DELETED": Readiness.GONE,
    "JOB_STATE_ARCHIVED": Readiness.GONE,
}

_DEPLOYMENT: dict[str, Readiness] = {
    "READY": Readiness.READY,
    "UPDATING": Readiness.READY,
    "FAILED": Readiness.FAILED,
    "DELETING": Readiness.GONE,
    "DELETED": Readiness.GONE,
}


def job_readiness(state: str) -> Readiness:
    """Of a trainer job; an unknown state counts as starting."""
    return _JOB.get(state, Readiness.STARTING)


def deployment_readiness(state: str) -> Readiness:
    """Of a deployment; an unknown state counts as starting."""
    return _DEPLOYMENT.get(state, Readiness.STARTING)


def next_delay(delay: float) -> float:
    """Seconds before the next look at a resource: quick at first, never slower than 5 s."""
    return min(delay * 1.6, 5.0)


FIRST_DELAY = 0.05
"""Seconds before the second look."""
