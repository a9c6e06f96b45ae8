"""Which snapshot to save, and which to load next: decided from what the replicas report.

Knows snapshots, their predecessors, and reports of replicas with a time; no requests, no clock.

A hot load is done when each replica that serves reports the identity asked for. An error counts
only if it is about that identity: one of an earlier load is stale. The rules of a chain:

1. What a snapshot is a difference to, the snapshot says. Where a server does not tell, differences
   are asked for only in an unbroken run of save, load, save, load of this client.
2. A difference is loaded only when every replica reports its predecessor (or has it already). Else
   the missing links are loaded in order, from the last whole snapshot on; where that one is not
   known, or a link is refused, a whole snapshot is saved.
3. A whole snapshot is loaded over anything.
4. A load that a replica has lost (it restarted, another client's load came between) is asked for
   again, a bounded number of times.
5. After a difference did not fit, a save failed, or another trainer was attached, the next save is
   whole: a server that does not tell may have written what it did not answer for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from fireworks_training.errors import ProtocolError
from fireworks_training.models import ReplicaStatus, Snapshot

LOST_AFTER = 1.0
"""Seconds after a request in which a replica may still report what it did before; twice as long
after each request that was lost."""

EXTRA_POSTS = 6
"""Requests of one sync beyond those that its links need; then its time has to run out."""

KNOWN_SNAPSHOTS = 4096
"""Snapshots whose predecessors are remembered."""

SaveType = Literal["base", "delta"]


# -- what replicas report ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Live:
    """Every replica serves it."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Not yet; `waiting_for` says what each late replica reports."""

    waiting_for: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Failed:
    """A replica can't load it."""

    reason: str
    replicas: Mapping[str, str]


Progress = Live | Pending | Failed


def read_replicas(payload: Mapping[str, Any]) -> list[ReplicaStatus]:
    """The replica rows of a hot load status.

    Raises:
        ProtocolError: there is no list of them.
    """
    rows = payload.get("replicas")
    if not isinstance(rows, list):
        raise ProtocolError("the hot load status lists no replicas")
    try:
        return [_read_row(row) for row in cast(list[Mapping[str, Any]], rows)]
    except (AttributeError, TypeError) as error:
        raise ProtocolError(f"the hot load status has a row that is none: {error}") from error


def _read_row(row: Mapping[str, Any]) -> ReplicaStatus:
    loading = cast(Mapping[str, Any], row.get("loading_state") or {})
    identity = row.get("current_snapshot_identity") or None
    for adapter in cast(list[Mapping[str, Any]], row.get("loaded_adapters") or []):
        if adapter.get("status") == "loaded":
            identity = adapter.get("identity") or identity
    return ReplicaStatus(
        identity=identity,
        ready=bool(row.get("readiness")),
        stage=loading.get("stage"),
        target=loading.get("target_snapshot_identity"),
        error=loading.get("error"),
        timings=loading.get("timings"),
    )


def judge(replicas: Sequence[ReplicaStatus], identity: str) -> Progress:
    """How far the load of `identity` has come; no replicas at all means it has not begun."""
    reports = _reports(replicas)
    for replica in replicas:
        if _failed(replica, identity):
            return Failed(replica.error or "no reason given", reports)
    late = {
        str(index): reports[str(index)]
        for index, replica in enumerate(replicas)
        if not (replica.ready and replica.identity == identity)
    }
    if late or not replicas:
        return Pending(late or {"-": "no replica is up yet"})
    return Live()


def _failed(replica: ReplicaStatus, identity: str) -> bool:
    return replica.stage == "error" and replica.target == identity


def _reports(replicas: Sequence[ReplicaStatus]) -> dict[str, str]:
    return {str(index): _describe(replica) for index, replica in enumerate(replicas)}


def _describe(replica: ReplicaStatus) -> str:
    holds = replica.identity or "no snapshot"
    stage = f", {replica.stage}" if replica.stage else ""
    target = f" {replica.target}" if replica.target and replica.target != replica.identity else ""
    return f"{holds}{stage}{target}"


# -- what this client saved --------------------------------------------------------------------


def choose_type(*, whole_only: bool, follows: bool) -> SaveType:
    """Choose what the trainer is asked to save.

    Args:
        whole_only: every snapshot stands alone (an adapter).
        follows: whether a delta to the snapshot before could be loaded.
    """
    return "delta" if follows and not whole_only else "base"


class Chain:
    """The snapshots that one trainer session saved, as far as loads need them.

    Args:
        whole_only: every snapshot stands alone (an adapter).

    Attributes:
        last_saved: identity of the newest save whose answer is known.
        last_live: the identity that was last seen on every replica.
    """

    def __init__(self, *, whole_only: bool = False) -> None:
        self.last_saved: str | None = None
        self.last_live: str | None = None
        self._whole_only = whole_only
        self._known: dict[str, Snapshot] = {}
        self._steps: dict[str, int] = {}
        self._now: Callable[[], int] = lambda: 0
        self._next_whole = True
        self._tells = True

    def take_next_type(self, wanted: SaveType | None = None) -> SaveType:
        """What to ask the trainer for, at the moment when the request goes out.

        Args:
            wanted: what the caller asks for; None chooses.
        """
        whole, self._next_whole = self._next_whole, False
        unbroken = self.last_saved is not None and self.last_saved == self.last_live
        follows = not whole and (self._tells or unbroken)
        return choose_type(
            whole_only=self._whole_only, follows=follows if wanted is None else wanted == "delta"
        )

    def saved(self, snapshot: Snapshot, asked: SaveType, step: int | None = None) -> Snapshot:
        """Note a save; gives it back with kind and predecessor, told or concluded.

        Args:
            step: optimizer steps that came before it.
        """
        if step is not None:
            self._steps[snapshot.identity] = step
            while len(self._steps) > KNOWN_SNAPSHOTS:
                del self._steps[next(iter(self._steps))]
        if snapshot.kind is None:
            self._tells = False
            follows = asked == "delta" and not self._whole_only
            snapshot = replace(
                snapshot,
                kind="delta" if follows else "base",
                predecessor=self.last_saved if follows else None,
            )
        self._known.pop(snapshot.identity, None)
        self._known[snapshot.identity] = snapshot
        while len(self._known) > KNOWN_SNAPSHOTS:
            del self._known[next(iter(self._known))]
        self.last_saved = snapshot.identity
        return snapshot

    def failed(self) -> None:
        """A save failed, or nothing is known of it: the next one is whole."""
        self._next_whole = True

    def follow(self, steps: Callable[[], int]) -> None:
        """From now on a model saves whose optimizer steps so far `steps` tells; the next save is
        whole."""
        self.reset()
        self._steps.clear()
        self._now = steps

    def live(self, identity: str) -> None:
        """Every replica was seen with it."""
        self.last_live = identity

    def reset(self) -> None:
        """The next save is whole: what the deployment holds is not what was thought."""
        self._next_whole = True
        self.last_live = None

    def path(self, identity: str) -> list[str]:
        """Identities to load in order, the last one being `identity`.

        The first is whole, or the predecessor of which nothing more is known.
        """
        path = [identity]
        while (known := self._known.get(path[-1])) is not None and known.predecessor is not None:
            if known.predecessor in path:
                break
            path.append(known.predecessor)
        return path[::-1]

    def stands_alone(self, identity: str) -> bool:
        """Whether it may be loaded over anything, as far as is known; an unknown one may be."""
        known = self._known.get(identity)
        return known is None or known.predecessor is None

    def distance(self, identity: str | None) -> int | None:
        """Optimizer steps that were asked for since a snapshot was saved; None if unknown."""
        step = None if identity is None else self._steps.get(identity)
        return None if step is None else self._now() - step

    def step_of(self, identity: str) -> int | None:
        """Optimizer steps before the save of a snapshot; None if this session did not save it."""
        return self._steps.get(identity)

    def knows(self, identity: str) -> bool:
        """Whether this session saved it."""
        return identity in self._known


# -- one sync ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """Every replica serves the snapshot."""


@dataclass(frozen=True, slots=True)
class Post:
    """Ask for a load, then look again.

    Attributes:
        identity: what to load.
        previous: the predecessor, for a difference.
    """

    identity: str
    previous: str | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again later; `waiting_for` says what each late replica reports."""

    waiting_for: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NeedWhole:
    """The chain does not lead there; a whole snapshot would."""

    reason: str
    replicas: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Unloadable:
    """It can't be loaded."""

    reason: str
    replicas: Mapping[str, str]


Decision = Done | Post | Wait | NeedWhole | Unloadable


class Sync:
    """One snapshot on its way to every replica.

    Args:
        chain: what is known of snapshots.
        identity: the snapshot.
    """

    def __init__(self, chain: Chain, identity: str) -> None:
        self.identity = identity
        self.loaded: list[str] = []
        """What was asked for, in order."""
        self._chain = chain
        self._path = chain.path(identity)
        self._posted: str | None = None
        self._posted_at = 0.0
        self._stale: dict[int, str] = {}
        self._lost = 0
        self._posts_left = len(self._path) + EXTRA_POSTS

    def look(self, replicas: Sequence[ReplicaStatus], now: float) -> Decision:
        """What to do, given what the replicas report.

        Args:
            now: seconds of any steady clock.
        """
        progress = judge(replicas, self.identity)
        if isinstance(progress, Live):
            self._chain.live(self.identity)
            return Done()
        reports = _reports(replicas)
        if not replicas:
            return Wait({"-": "no replica is up yet"})
        if self._posted is not None:
            refusal = self._refusal(replicas, self._posted, now)
            if refusal is not None:
                return self._broken(self._posted, refusal, reports)
            if not self._over(replicas, self._posted, now):
                return Wait(_late(replicas, reports, self._posted))
        if not all(replica.ready for replica in replicas):
            return Wait(_late(replicas, reports, self.identity))
        return self._next(replicas, reports, now)

    def refused(self, message: str, *, conflict: bool) -> Decision | None:
        """A request was refused; None: look again.

        Args:
            conflict: a replica does not hold the predecessor (any more).
        """
        posted, self._posted = self._posted, None
        assert posted is not None, "nothing was asked for"
        if conflict and self._posts_left > 0:
            return None
        return self._broken(posted, message, {})

    def _refusal(self, replicas: Sequence[ReplicaStatus], posted: str, now: float) -> str | None:
        """Why a replica could not load what was asked for."""
        for index, replica in enumerate(replicas):
            if _failed(replica, posted):
                reason = replica.error or "no reason given"
                # One that stood there before is of the last try, until it had time to change.
                if self._stale.get(index) != reason or now - self._posted_at > LOST_AFTER:
                    return reason
        return None

    def _over(self, replicas: Sequence[ReplicaStatus], posted: str, now: float) -> bool:
        """Whether the request has had its effect, or has none any more."""
        late = [replica for replica in replicas if replica.identity != posted]
        if not late:
            return True
        if now - self._posted_at <= LOST_AFTER * 2.0**self._lost:
            return False
        # One that reports neither a target nor a stage may be at it.
        idle = any(
            replica.ready
            and replica.target != posted
            and (replica.target is not None or replica.stage == "ready")
            for replica in late
        )
        if idle and self._posts_left > 0:
            self._lost += 1
            return True
        return False

    def _next(
        self, replicas: Sequence[ReplicaStatus], reports: Mapping[str, str], now: float
    ) -> Decision:
        first, target = self._path[0], self.identity
        if self._posts_left <= 0:
            return Wait(_late(replicas, reports, target))
        if len(self._path) == 1 or self._chain.stands_alone(target):
            return self._post(target, None, replicas, now)
        places = [
            self._path.index(replica.identity) if replica.identity in self._path else -1
            for replica in replicas
        ]
        lowest = min(places)
        if lowest >= 0 and max(places) <= lowest + 1:
            # One that is a link ahead has nothing to do in this turn.
            return self._post(self._path[lowest + 1], self._path[lowest], replicas, now)
        if self._chain.knows(first) and self._chain.stands_alone(first):
            return self._post(first, None, replicas, now)
        return NeedWhole(
            f"{target} is a difference to {self._path[-2]}, which is not what every replica holds,"
            " and the snapshots before it are not known to this client",
            reports,
        )

    def _post(
        self, identity: str, previous: str | None, replicas: Sequence[ReplicaStatus], now: float
    ) -> Post:
        self._stale = {
            index: replica.error or "no reason given"
            for index, replica in enumerate(replicas)
            if _failed(replica, identity)
        }
        self._posted, self._posted_at = identity, now
        self._posts_left -= 1
        self.loaded.append(identity)
        return Post(identity, previous)

    def _broken(self, posted: str, reason: str, reports: Mapping[str, str]) -> Decision:
        self._chain.reset()
        if posted != self.identity or not self._chain.stands_alone(posted):
            return NeedWhole(f"{posted} was not loaded: {reason}", reports)
        return Unloadable(reason, reports)


def _late(
    replicas: Sequence[ReplicaStatus], reports: Mapping[str, str], identity: str
) -> dict[str, str]:
    return {
        str(index): reports[str(index)]
        for index, replica in enumerate(replicas)
        if not (replica.ready and replica.identity == identity)
    } or dict(reports)


class Pace:
    """How long to wait between two looks: 50 ms at first, longer each time, 2 s at most."""

    FIRST = 0.05
    LONGEST = 2.0

    def __init__(self) -> None:
        self._delay = self.FIRST

    def next(self) -> float:
        """Seconds until the next look."""
        delay, self._delay = self._delay, min(self._delay * 1.5, self.LONGEST)
        return delay

    def restart(self) -> None:
        """Something new was asked for."""
        self._delay = self.FIRST
