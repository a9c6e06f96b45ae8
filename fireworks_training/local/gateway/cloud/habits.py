"""The habits of a cloud: which requests meet a fault, and how long things take.

Decides without I/O and without a clock: requests are counted, and every so many of a kind meet the
next fault of a fixed round, never two in a row. Durations are handed out in seconds, for others to
wait. So the same requests in the same order meet the same faults.

The rounds hold what the official client (1.2.30) lives through: polls that end with 408 or 5xx,
submits that are refused before they are taken, a status of a hot load that can't be read, a
deployment that is not found while it rolls, heartbeats that fail. Stray faults (`trouble`) are
drawn from a seed, by kind and count, and hold what it may not live through.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from fireworks_training.local.gateway.cloud.requests import Kind

JOB_S: Final = 3.0
"""Seconds that a job is CREATING, at a pace of 1."""

DEPLOYMENT_S: Final = 4.0
"""Seconds before a replica starts, at a pace of 1."""

NOTICE_S: Final = 3.0
"""Seconds after which the first replica notices a hot load, at a pace of 1; each further one takes
half as long again."""

STRAY_SHARE: Final = 0.04
"""Share of requests that meet a stray fault."""

REDIRECT: Final = 307


@dataclass(frozen=True, slots=True)
class CloudFault:
    """Describes the answer that a request gets in place of its own.

    Attributes:
        status: HTTP status; 307 sends the client to the same address again.
        after: the request is carried out first, and only its answer is lost.
        retry_after_s: sent as Retry-After; None = not sent.
    """

    status: int
    after: bool = False
    retry_after_s: int | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """Describes how often a kind of request meets a fault.

    Attributes:
        every: of so many requests one meets a fault, the last; at least 2.
        faults: in turn.
    """

    every: int
    faults: tuple[CloudFault, ...]


ROUNDS: Final[dict[Kind, Round]] = {
    "poll": Round(4, (CloudFault(408), CloudFault(408), CloudFault(503))),
    "submit": Round(
        7, (CloudFault(503), CloudFault(409), CloudFault(502), CloudFault(429, retry_after_s=1))
    ),
    "heartbeat": Round(3, (CloudFault(503), CloudFault(502))),
}

LOOKS: Final = (CloudFault(404), CloudFault(409), CloudFault(403), CloudFault(503))
"""The fault of the second look at each hot load, in turn."""

FIRST_COMPLETIONS: Final = (CloudFault(404), CloudFault(425), CloudFault(503, retry_after_s=1))
"""The fault of the first completion after each hot load, in turn."""

STRAYS: Final[dict[Kind, tuple[CloudFault, ...]]] = {
    "control": (
        CloudFault(503),
        CloudFault(502),
        CloudFault(403),
        CloudFault(404),
        CloudFault(408),
        CloudFault(429),
    ),
    "session": (CloudFault(404), CloudFault(503), CloudFault(408), CloudFault(REDIRECT)),
    "submit": (
        CloudFault(502, after=True),
        CloudFault(404),
        CloudFault(403),
        CloudFault(408),
        CloudFault(REDIRECT),
    ),
    "poll": (
        CloudFault(404),
        CloudFault(403),
        CloudFault(500),
        CloudFault(504),
        CloudFault(REDIRECT),
    ),
    "heartbeat": (CloudFault(404), CloudFault(403), CloudFault(REDIRECT)),
    "hot_load": (
        CloudFault(502, after=True),
        CloudFault(404),
        CloudFault(403),
        CloudFault(503),
        CloudFault(REDIRECT),
    ),
    "look": (CloudFault(404), CloudFault(403), CloudFault(502), CloudFault(REDIRECT)),
    "complete": (
        CloudFault(403),
        CloudFault(404),
        CloudFault(408),
        CloudFault(500),
        CloudFault(502),
        CloudFault(REDIRECT),
    ),
}


@dataclass(slots=True)
class _SinceLoad:
    """Counts what was asked of a deployment since its last hot load."""

    number: int
    looks: int = 0
    completions: int = 0


@dataclass(slots=True)
class Habits:
    """Hands out the faults and the delays.

    Attributes:
        pace: factor on every duration; 0 takes none.
        trouble: seed of the stray faults; None = none.
    """

    pace: float = 1.0
    trouble: int | None = None
    _counts: dict[Kind, int] = field(default_factory=dict["Kind", int])
    _struck: set[Kind] = field(default_factory=set["Kind"])
    _loads: dict[str, _SinceLoad] = field(default_factory=dict[str, _SinceLoad])
    _all_loads: int = 0

    def limits(self) -> dict[str, float | None]:
        """Return the delays of jobs and deployments, in the spelling of `limits.Limits`."""
        return {
            "trainerDelayS": JOB_S * self.pace,
            "deploymentDelayS": DEPLOYMENT_S * self.pace,
        }

    def notice_after(self, replica: int) -> float:
        """Return the seconds after which a replica notices a hot load.

        Args:
            replica: its place among the deployment's replicas, from 0.
        """
        return NOTICE_S * self.pace * (1 + replica / 2)

    def loading(self, deployment: str) -> None:
        """Note that a deployment was asked to load a snapshot."""
        self._loads[deployment] = _SinceLoad(self._all_loads)
        self._all_loads += 1

    def forget(self, deployment: str) -> None:
        """Forget a deployment that was deleted."""
        self._loads.pop(deployment, None)

    def lists_replicas(self, deployment: str) -> bool:
        """Return whether the status of a hot load has rows: the first look at each finds none."""
        load = self._loads.get(deployment)
        return load is None or load.looks != 1

    def meet(self, kind: Kind, deployment: str = "") -> CloudFault | None:
        """Count a request, and return the fault that it meets; None for most.

        Args:
            kind: the group of its operation.
            deployment: the deployment that it names, of a look or a completion.
        """
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        fault = self._habit(kind, count, deployment) or self._stray(kind, count)
        # Bounded: what failed succeeds when it is tried again.
        if kind in self._struck:
            self._struck.discard(kind)
            return None
        if fault is not None:
            self._struck.add(kind)
        return fault

    def _habit(self, kind: Kind, count: int, deployment: str) -> CloudFault | None:
        load = self._loads.get(deployment)
        if kind == "look" and load is not None:
            load.looks += 1
            return LOOKS[load.number % len(LOOKS)] if load.looks == 2 else None
        if kind == "complete" and load is not None:
            load.completions += 1
            first = load.completions == 1
            return FIRST_COMPLETIONS[load.number % len(FIRST_COMPLETIONS)] if first else None
        found = ROUNDS.get(kind)
        if found is None or count % found.every:
            return None
        return found.faults[(count // found.every - 1) % len(found.faults)]

    def _stray(self, kind: Kind, count: int) -> CloudFault | None:
        if self.trouble is None:
            return None
        drawn = random.Random(f"{self.trouble}/{kind}/{count}")  # noqa: S311 - repeatable
        return drawn.choice(STRAYS[kind]) if drawn.random() < STRAY_SHARE else None
