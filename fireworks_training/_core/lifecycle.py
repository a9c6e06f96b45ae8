"""Decides how a wait for a trainer job or a deployment goes on, from its states and times.

A `ReadinessWait` is one wait for one resource. It takes each observation with its time, and gives
the next step: go on, poll again in so many seconds, or give up with the error to raise. It knows no
clock and no requests. Its rules:

1. Time in the queue and time from placement to ready have budgets of their own.
2. A state that is left from before a resume (stopped, right after it) is tolerated for a while.
3. The pause between polls is a share of the time for which nothing has changed: a change is seen
   late by that share at most, and a wait of hours polls rarely.
4. Where the platform holds an answer back until something changes, it is polled again at once, and
   asked to hold no longer than the budget lasts; never more often than the quickest pace.
5. A resource that was there and is not found is looked for again for a while: another server behind
   the control plane may not know of it yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from fireworks_training._core.waits.reports import FIRST_NOTICE, ReportSchedule
from fireworks_training.errors import ProvisioningError, ProvisioningTimeout

QUICKEST_HELD = 0.04
"""Seconds between two polls at least, where the platform holds its answers back."""

QUICKEST, SLOWEST = 0.1, 5.0
"""Seconds between two polls, at least and at most."""

SHARE = 0.25
"""Seconds between two polls for each second without a change. Over waits of 3 to 10 s these are no
more polls than twice those of the official client."""

MISSING = 15.0
"""Seconds for which a resource that was there may not be found."""

LONGEST_HOLD = 10
"""Seconds for which the platform is asked to hold an answer back: short enough to report a long
wait in time."""

SETTLE = 30.0
"""Seconds for which a resumed job may still show its old state."""

STOPPING_BUDGET = 120.0
"""Seconds for a job that is stopping to have stopped, so that it can be resumed; they count from
when it was first seen stopping."""


def pause(unchanged: float, slowest: float = SLOWEST) -> float:
    """Give the seconds until the next poll of a resource unchanged for `unchanged` seconds."""
    return min(max(SHARE * unchanged, QUICKEST), slowest)


class Readiness(Enum):
    """Classifies the states of a resource by what a wait does about them."""

    READY = "ready"
    STARTING = "starting"
    QUEUED = "queued"
    RESUMABLE = "resumable"
    STOPPING = "stopping"
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
    "JOB_STATE_CANCELLING": Readiness.STOPPING,
    "JOB_STATE_PAUSING": Readiness.STOPPING,
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
    """Classify the state of a trainer job; an unknown one counts as starting."""
    return _JOB.get(state, Readiness.STARTING)


def deployment_readiness(state: str) -> Readiness:
    """Classify the state of a deployment; an unknown one counts as starting."""
    return _DEPLOYMENT.get(state, Readiness.STARTING)


@dataclass(frozen=True, slots=True)
class Seen:
    """Holds a resource as one poll found it: its full name, state and message."""

    name: str
    state: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Go:
    """End the wait: the resource is ready."""


@dataclass(frozen=True, slots=True)
class Again:
    """Poll again in `delay` seconds, and ask to hold the answer back for `hold` seconds at most."""

    delay: float
    hold: int = 0


@dataclass(frozen=True, slots=True)
class Resume:
    """Start the resource again, then poll again."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the wait with an error."""

    error: ProvisioningError


Verdict = Go | Again | Resume | GiveUp


class ReadinessWait:
    """Decides about one wait for one resource.

    Args:
        what: names the resource in messages ("trainer my-job").
        read: classifies its states.
        started: the time when the wait began, in seconds of any monotonic clock.
        budget: seconds from placement to ready.
        queue_budget: seconds to wait for capacity.
        resumable: whether a stopped resource may be started again: it was found, not made.
        resumed: whether somebody else may just have started it again, so that it shows its old
            state for a while.
        slowest: the longest pause between two polls, in seconds.
        advice: remedies for states that end the wait, by class; for the error.
    """

    def __init__(
        self,
        what: str,
        read: Callable[[str], Readiness],
        *,
        started: float,
        budget: float,
        queue_budget: float,
        resumable: bool = False,
        resumed: bool = False,
        slowest: float = SLOWEST,
        advice: Mapping[Readiness, str] = MappingProxyType({}),
    ) -> None:
        self._what = what
        self._read = read
        self._started = started
        self._budget = budget
        self._queue_budget = queue_budget
        self._resumable = resumable
        self._resumed_at = started if resumed else None
        self._slowest = slowest
        self._advice = advice
        self._placed_at: float | None = None
        self._stopping_since: float | None = None
        self._missing_since: float | None = None
        self._last: Seen | None = None
        self._since = started
        self._reports = ReportSchedule(started, first=FIRST_NOTICE)
        self.changed = False
        """Whether the last observation differed from the one before in state or message."""

    def see(
        self, row: Seen | None, now: float, *, answers: bool = True, held: float | None = None
    ) -> Verdict:
        """Take one observation into account, and decide the next step.

        Args:
            row: the resource; None if it does not exist.
            now: the time of the observation.
            answers: whether it also answers requests, or settled as asked; counts where its state
                is ready.
            held: seconds for which the platform held the answer back; None if it can't do that.
        """
        if self._may_come_back(row, now):
            return self._within_budget(now)
        self._note(row, now)
        readiness = Readiness.GONE if row is None else self._read(row.state)
        if self._still_old(readiness, now):
            readiness = Readiness.STARTING
        if readiness is Readiness.READY and answers:
            return Go()
        if readiness is Readiness.RESUMABLE and self._resumable and self._resumed_at is None:
            self._resumed_at, self._placed_at = now, None
            return Resume()
        stopping = readiness is Readiness.STOPPING and self._resumable
        if readiness in (Readiness.GONE, Readiness.FAILED, Readiness.RESUMABLE) or (
            readiness is Readiness.STOPPING and not stopping
        ):
            return self._give_up(ProvisioningError, self._reason(row), readiness)
        if not stopping:
            self._stopping_since = None
        elif self._stopping_since is None:
            self._stopping_since = now
        if readiness is Readiness.QUEUED:
            self._placed_at = None  # also after CREATING: it has lost its place
        elif self._placed_at is None:
            self._placed_at = now
        # Whether it answers is no part of the row, so a held answer would not show it.
        hold = readiness is not Readiness.READY
        return self._within_budget(now, hold=hold, held=held)

    def unseen(self, now: float) -> Verdict:
        """Take into account that a poll failed: the wait goes on within its budget."""
        return self._within_budget(now)

    def _within_budget(
        self,
        now: float,
        *,
        hold: bool = False,
        held: float | None = None,
    ) -> Again | GiveUp:
        placed = self._placed_at
        since, limit = (
            (self._started, self._queue_budget) if placed is None else (placed, self._budget)
        )
        if self._stopping_since is not None:
            since, limit = self._stopping_since, STOPPING_BUDGET
        if now - since > limit:
            waited = f"after {now - since:.0f} s (budget {limit:.0f} s)"
            reason = f"{self._reason(self._last)}, {waited}"
            state = "" if self._last is None else self._last.state
            return self._give_up(ProvisioningTimeout, reason, self._read(state))
        longest = min(LONGEST_HOLD, int(limit - (now - since))) if hold else 0
        if held is not None and longest > 0:
            return Again(max(QUICKEST_HELD - held, 0.0), longest)
        return Again(pause(now - self._since, self._slowest), longest)

    def is_ready(self, state: str) -> bool:
        """Whether a state ends the wait with success."""
        return self._read(state) is Readiness.READY

    def _note(self, row: Seen | None, now: float) -> None:
        self.changed = row != self._last
        if self.changed:
            self._since = now
        self._last = row

    def _may_come_back(self, row: Seen | None, now: float) -> bool:
        if row is not None or self._last is None:
            self._missing_since = None
            return False
        if self._missing_since is None:
            self._missing_since = now
        gone = self._read(self._last.state) is Readiness.GONE
        return not gone and now - self._missing_since < MISSING

    def _still_old(self, readiness: Readiness, now: float) -> bool:
        stands = readiness in (Readiness.RESUMABLE, Readiness.STOPPING)
        return stands and self._resumed_at is not None and now - self._resumed_at < SETTLE

    def _reason(self, row: Seen | None) -> str:
        if row is None:
            return f"{self._what} is not there"
        return f"{self._what} is {row.state}" + (f": {row.message}" if row.message else "")

    def _give_up(self, kind: type[ProvisioningError], reason: str, readiness: Readiness) -> GiveUp:
        advice, last = self._advice.get(readiness), self._last
        return GiveUp(
            kind(
                reason if advice is None else f"{reason}; {advice}",
                resource=None if last is None else last.name,
                state=None if last is None else last.state,
            )
        )

    def take_if_due(self, now: float) -> bool:
        """Decide whether to report the wait now; if so, the next report is due later."""
        return self._reports.take_if_due(now)

    def describe(self, now: float) -> str:
        """Describe state, age and message, for people."""
        return f"{self._reason(self._last)} ({self._reports.age(now):.1f} s)"
