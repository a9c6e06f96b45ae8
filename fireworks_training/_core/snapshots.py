"""Decides which snapshot to save and which to hot load next, from the reports of the replicas.

It knows snapshots, their predecessors, and reports of replicas with a time; no requests, no clock.

A hot load is done when each serving replica reports the identity asked for. An error counts only if
it is about that identity: the error of an earlier load is stale. The rules of a chain:

1. A snapshot names its predecessor, to which it is a difference. Where a server does not name it,
   differences are asked for only in an unbroken run of save, load, save, load of this client.
2. A difference is loaded only when every replica reports its predecessor (or has it already).
   Otherwise the missing links are loaded in order, from the last whole snapshot on; where that one
   is not known, or a link is refused, a whole snapshot is saved.
3. A whole snapshot is loaded over anything, and asked for at once, also where no replica is listed
   or ready: a deployment may become ready only by its first load.
4. A load that a replica has lost (it restarted, another client's load came between) is asked for
   again, a bounded number of times. A replica may notice a request late: it counts as lost at once
   only where the server notes requests before it answers, else after a minute at the earliest, and
   a difference is then never sent again, since its predecessor may be gone by the time it arrives.
5. After a difference did not fit, a save failed, or another trainer was attached, the next save is
   whole: a server that names no predecessor may have written a snapshot without answering.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from fireworks_training.errors import ProtocolError
from fireworks_training.models import ReplicaStatus, Snapshot, SnapshotKind

PROMPT_LOST_AFTER = 1.0
"""Seconds after a request in which a replica may still report what it did before, where the server
notes requests before it answers; twice as long after each request that was lost."""

LOST_AFTER = 60.0
"""Seconds after which a replica that had begun with a load and reports something else counts as
having lost it, where the server promises nothing."""

UNNOTICED_AFTER = 240.0
"""Seconds after which a replica that has never reported the load counts as having missed it."""

STALE_FOR = 10.0
"""Seconds after a request in which the error of an earlier try may still be reported."""

UNLISTED_FOR, NOT_READY_FOR = 2.0, 30.0
"""Seconds for which a difference waits for replicas to be listed, and for one that is not ready to
report what it holds; then the chain is loaded from its beginning."""

HOLD_FIRST, HOLD_LONGEST = 0.1, 5.0
"""Seconds between a request that was refused for a passing reason and the next one."""

EXTRA_POSTS = 6
"""Requests of one sync beyond those that its links need; then its time has to run out."""

KNOWN_SNAPSHOTS = 4096
"""Snapshots whose predecessors are remembered."""

NO_REPLICAS: Mapping[str, str] = {"-": "no replica is up yet"}
"""Stands for the reports where there is no replica."""

UNREADABLE: Mapping[str, str] = {"-": "the status of the deployment could not be read"}
"""Stands for the reports where a look at them failed."""

SaveType = Literal["base", "delta"]


# -- what replicas report ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Live:
    """Every replica serves the snapshot."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Some replicas do not serve the snapshot yet; `waiting_for` holds their reports."""

    waiting_for: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Failed:
    """A replica can't load the snapshot."""

    reason: str
    replicas: Mapping[str, str]


Progress = Live | Pending | Failed


def read_replicas(payload: Mapping[str, Any]) -> list[ReplicaStatus]:
    """Read the replica rows of a hot load status.

    Raises:
        ProtocolError: there is no list of them, or a row is not an object.
    """
    rows = payload.get("replicas")
    if not isinstance(rows, list):
        raise ProtocolError("the hot load status lists no replicas")
    try:
        return [_read_row(row) for row in cast(list[Mapping[str, Any]], rows)]
    except (AttributeError, TypeError) as error:
        raise ProtocolError(f"a row of the hot load status is not an object: {error}") from error


def _read_row(row: Mapping[str, Any]) -> ReplicaStatus:
    loading = cast(Mapping[str, Any], row.get("loading_state") or {})
    adapters = tuple(
        str(adapter["identity"])
        for adapter in cast(list[Mapping[str, Any]], row.get("loaded_adapters") or [])
        if adapter.get("status") == "loaded" and adapter.get("identity")
    )
    alone = adapters[0] if len(adapters) == 1 else None
    return ReplicaStatus(
        identity=_text(row.get("current_snapshot_identity")) or alone,
        ready=bool(row.get("readiness")),
        stage=_text(loading.get("stage")),
        target=_text(loading.get("target_snapshot_identity")),
        error=_text(loading.get("error")),
        timings=loading.get("timings"),
        adapters=adapters,
    )


def _text(value: object) -> str | None:
    """Read a text that may be absent or empty."""
    return str(value) if value else None


def judge(replicas: Sequence[ReplicaStatus], identity: str) -> Progress:
    """Decide how far a load of `identity` that was asked for has come.

    Without replicas it has not begun. Adapters may be resident side by side: any that is loaded
    counts.
    """
    for replica in replicas:
        if _failed(replica, identity):
            return Failed(_reason(replica), _reports(replicas))
    late = _late(replicas, identity)
    if late or not replicas:
        return Pending(late or NO_REPLICAS)
    return Live()


def _holds(replica: ReplicaStatus, identity: str) -> bool:
    return replica.identity == identity or identity in replica.adapters


def _failed(replica: ReplicaStatus, identity: str) -> bool:
    return replica.stage == "error" and replica.target == identity


def _reason(replica: ReplicaStatus) -> str:
    return replica.error or "no reason given"


def _reports(replicas: Sequence[ReplicaStatus]) -> dict[str, str]:
    return {str(index): _describe(replica) for index, replica in enumerate(replicas)}


def _late(replicas: Sequence[ReplicaStatus], identity: str) -> dict[str, str]:
    """Collect the reports of the replicas that do not serve a snapshot."""
    return {
        str(index): _describe(replica)
        for index, replica in enumerate(replicas)
        if not (replica.ready and _holds(replica, identity))
    }


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


Steps = Callable[[], int]
"""Counts the optimizer steps of one model that were asked for so far."""


class Chain:
    """Remembers the snapshots that one trainer session saved, as far as loads need them.

    Args:
        whole_only: whether every snapshot stands alone (an adapter).
        several: whether several models save into it, each with steps of its own.

    Attributes:
        last_saved: identity of the newest save whose answer is known.
        last_live: the identity that was last seen on every replica.
    """

    def __init__(self, *, whole_only: bool = False, several: bool = False) -> None:
        self.last_saved: str | None = None
        self.last_live: str | None = None
        self._whole_only = whole_only
        self._known: dict[str, Snapshot] = {}
        self._several = several
        self._steps: dict[str, tuple[int, Steps]] = {}
        self._now: Steps = lambda: 0
        self._next_whole = True
        self._last_was_named = True

    def take_next_type(self, wanted: SaveType | None = None) -> SaveType:
        """Choose the type of the next save; call it when the request goes out.

        A pending order for a whole snapshot is used up by that.

        Args:
            wanted: the caller's choice; None chooses here.
        """
        whole, self._next_whole = self._next_whole, False
        unbroken = self.last_saved is not None and self.last_saved == self.last_live
        follows = not whole and (self._last_was_named or unbroken)
        return choose_type(
            whole_only=self._whole_only, follows=follows if wanted is None else wanted == "delta"
        )

    def saved(
        self,
        snapshot: Snapshot,
        asked: SaveType,
        step: int | None = None,
        steps: Steps | None = None,
    ) -> Snapshot:
        """Note a save; gives the snapshot with kind and predecessor, as named or concluded.

        Args:
            step: optimizer steps before the save.
            steps: counts those of the model that saved it; None takes the one that is followed.
        """
        if step is not None:
            self._steps[snapshot.identity] = (step, steps or self._now)
            while len(self._steps) > KNOWN_SNAPSHOTS:
                del self._steps[next(iter(self._steps))]
        # Only of the last save: one answer without the field says nothing about the next one.
        self._last_was_named = snapshot.kind is not None
        if snapshot.kind is None:
            follows = asked == "delta" and not self._whole_only
            whole: SnapshotKind = "lora" if self._whole_only else "base"
            snapshot = replace(
                snapshot,
                kind="delta" if follows else whole,
                predecessor=self.last_saved if follows else None,
            )
        self.learn(snapshot)
        self.last_saved = snapshot.identity
        return snapshot

    def learn(self, snapshot: Snapshot) -> None:
        """Note the kind and predecessor of a snapshot, whoever saved it."""
        self._known.pop(snapshot.identity, None)
        self._known[snapshot.identity] = snapshot
        while len(self._known) > KNOWN_SNAPSHOTS:
            del self._known[next(iter(self._known))]

    def failed(self) -> None:
        """Note that a save failed, or may have failed: the next one is whole."""
        self._next_whole = True

    def follow(self, steps: Steps) -> None:
        """Follow another model, with `steps` for its optimizer steps; the next save is whole."""
        self.reset()
        if not self._several:  # else the models before this one go on
            self._steps.clear()
        self._now = steps

    def live(self, identity: str) -> None:
        """Note that every replica serves a snapshot."""
        self.last_live = identity

    def reset(self) -> None:
        """Make the next save whole: the deployment may hold another snapshot than was noted."""
        self._next_whole = True
        self.last_live = None

    def path(self, identity: str) -> list[str]:
        """List the identities to load in order, the last one being `identity`.

        The first is whole, or a predecessor of which nothing more is known.
        """
        path = [identity]
        while (known := self._known.get(path[-1])) is not None and known.predecessor is not None:
            if known.predecessor in path:
                break
            path.append(known.predecessor)
        return path[::-1]

    def stands_alone(self, identity: str) -> bool:
        """Whether a snapshot may be loaded over anything; an unknown one may be."""
        known = self._known.get(identity)
        return known is None or known.predecessor is None

    def distance(self, identity: str | None) -> int | None:
        """Count the optimizer steps that the model which saved a snapshot was asked for since.

        None if unknown, also where that model went back to an earlier state meanwhile.
        """
        known = None if identity is None else self._steps.get(identity)
        if known is None:
            return None
        step, steps = known
        distance = steps() - step
        return distance if distance >= 0 else None

    def step_of(self, identity: str) -> int | None:
        """Give the optimizer steps before a save; None if this session did not save it."""
        known = self._steps.get(identity)
        return None if known is None else known[0]

    def knows(self, identity: str) -> bool:
        """Whether kind and predecessor of a snapshot are known."""
        return identity in self._known


def links_to(identity: str, predecessors: Mapping[str, str | None]) -> list[Snapshot]:
    """Describe a snapshot and those before it, by the predecessors that a server lists.

    Args:
        predecessors: of each listed snapshot; None for one that stands alone.

    Returns:
        The links, the last one first; none where the list does not lead to a whole snapshot, so
        that nothing is concluded from a part of a chain.
    """
    links: list[Snapshot] = []
    link: str | None = identity
    while link is not None:
        if link not in predecessors or len(links) > len(predecessors):
            return []
        before = predecessors[link]
        links.append(Snapshot(link, "base" if before is None else "delta", before))
        link = before
    return links


# -- one sync ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """Every replica serves the snapshot."""


@dataclass(frozen=True, slots=True)
class Post:
    """Request a hot load, then poll again.

    Attributes:
        identity: the snapshot to load.
        previous: its predecessor, for a difference.
    """

    identity: str
    previous: str | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Poll again later; `waiting_for` holds the reports of the replicas that are late."""

    waiting_for: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NeedWhole:
    """Save a whole snapshot: the chain does not lead to this one."""

    reason: str
    replicas: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Unloadable:
    """Give up: the snapshot can't be loaded."""

    reason: str
    replicas: Mapping[str, str]


Decision = Done | Post | Wait | NeedWhole | Unloadable


class Sync:
    """Decides how one snapshot gets to every replica.

    Args:
        chain: the snapshots that are known.
        identity: the snapshot.

    Attributes:
        loaded: the snapshots requested so far, in order.
        prompt: whether the server notes a request before it answers, so that a replica which
            reports something else afterwards has lost it.
    """

    def __init__(self, chain: Chain, identity: str) -> None:
        self.identity = identity
        self.loaded: list[str] = []
        self.prompt = False
        self._chain = chain
        self._path = chain.path(identity)
        self._posted: str | None = None
        self._posted_at = 0.0
        self._previous: str | None = None
        self._noticed: set[int] = set()
        self._stale: dict[int, str] = {}
        self._lost = 0
        self._difference_lost = False
        self._refusals = 0
        self._hold_until = 0.0
        self._unsure_since: float | None = None
        self._posts_left = len(self._path) + EXTRA_POSTS

    def look(self, replicas: Sequence[ReplicaStatus] | None, now: float) -> Decision:
        """Take the reports of the replicas into account, and decide the next step.

        Args:
            replicas: their reports; None where the look at them failed.
            now: seconds of any steady clock.
        """
        if replicas is None:
            if self._posted is None and self._may_post(now) and self._stands_alone():
                return self._post(self.identity, None, (), now)
            return Wait(UNREADABLE)
        if self._is_live(replicas):
            self._chain.live(self.identity)
            return Done()
        reports = _reports(replicas) or NO_REPLICAS
        if self._posted is not None:
            refusal = self._refusal(replicas, self._posted, now)
            if refusal is not None:
                return self._broken(self._posted, refusal, reports)
            if not self._over(replicas, self._posted, now):
                return Wait(_late(replicas, self._posted) or reports)
        return self._next(replicas, reports, now)

    def _is_live(self, replicas: Sequence[ReplicaStatus]) -> bool:
        if self.identity in self.loaded:
            return isinstance(judge(replicas, self.identity), Live)
        # Before it was asked for, an adapter that is merely resident beside others proves nothing.
        return bool(replicas) and all(r.ready and r.identity == self.identity for r in replicas)

    def refused(self, message: str, *, conflict: bool, now: float) -> Decision | None:
        """Take a refused request into account; None is to poll again.

        Args:
            conflict: a replica does not hold the predecessor (any more).
        """
        posted, self._posted = self._posted, None
        assert posted is not None, "nothing was asked for"
        if conflict and self._posts_left > 0:
            self._hold_until = now + min(HOLD_FIRST * 2.0**self._refusals, HOLD_LONGEST)
            self._refusals += 1
            return None
        return self._broken(posted, message, {})

    def _refusal(self, replicas: Sequence[ReplicaStatus], posted: str, now: float) -> str | None:
        """Find why a replica could not load the requested snapshot."""
        stale_for = PROMPT_LOST_AFTER if self.prompt else STALE_FOR
        for index, replica in enumerate(replicas):
            if _failed(replica, posted):
                reason = _reason(replica)
                # An error that was there before is of the last try, until it had time to change.
                if self._stale.get(index) != reason or now - self._posted_at > stale_for:
                    return reason
        return None

    def _over(self, replicas: Sequence[ReplicaStatus], posted: str, now: float) -> bool:
        """Whether the request has had its effect, or is lost."""
        late = {i: replica for i, replica in enumerate(replicas) if not _holds(replica, posted)}
        if not late:
            return bool(replicas)
        self._noticed |= {i for i, replica in enumerate(replicas) if replica.target == posted}
        self._noticed |= set(range(len(replicas))) - late.keys()
        waited = (now - self._posted_at) / 2.0**self._lost
        lost = any(
            replica.ready
            and replica.target != posted
            # One that reports neither a target nor a stage may be loading.
            and (replica.target is not None or replica.stage == "ready")
            and waited > self._lost_after(index)
            for index, replica in late.items()
        )
        if lost and self._posts_left > 0:
            self._lost += 1
            self._difference_lost = self._previous is not None and not self.prompt
            return True
        return False

    def _lost_after(self, index: int) -> float:
        if self.prompt:
            return PROMPT_LOST_AFTER
        return LOST_AFTER if index in self._noticed else UNNOTICED_AFTER

    def _may_post(self, now: float) -> bool:
        return self._posts_left > 0 and now >= self._hold_until

    def _stands_alone(self) -> bool:
        return len(self._path) == 1 or self._chain.stands_alone(self.identity)

    def _next(
        self, replicas: Sequence[ReplicaStatus], reports: Mapping[str, str], now: float
    ) -> Decision:
        first, target = self._path[0], self.identity
        held = bool(replicas) and all(replica.identity == target for replica in replicas)
        if held or not self._may_post(now):
            return Wait(_late(replicas, target) or reports)
        if self._stands_alone():
            return self._post(target, None, replicas, now)
        places = [
            self._path.index(replica.identity) if replica.identity in self._path else -1
            for replica in replicas
        ]
        lowest, highest = min(places, default=-1), max(places, default=-1)
        if lowest >= 0 and highest <= lowest + 1 and not self._difference_lost:
            # A replica that is a link ahead has nothing to do in this turn.
            return self._post(self._path[lowest + 1], self._path[lowest], replicas, now)
        if self._may_yet_report(replicas, places, now):
            return Wait(_late(replicas, target) or reports)
        if self._chain.knows(first) and self._chain.stands_alone(first):
            return self._post(first, None, replicas, now)
        return NeedWhole(
            f"{target} is a difference to {self._path[-2]}, which is not what every replica holds,"
            " and the snapshots before it are not known to this client",
            reports,
        )

    def _may_yet_report(
        self, replicas: Sequence[ReplicaStatus], places: Sequence[int], now: float
    ) -> bool:
        """Whether what is missing for a difference may be reported soon: a replica comes up."""
        coming = any(
            not replica.ready and place < 0 for replica, place in zip(replicas, places, strict=True)
        )
        if replicas and not coming:
            self._unsure_since = None
            return False
        if self._unsure_since is None:
            self._unsure_since = now
        return now - self._unsure_since < (NOT_READY_FOR if replicas else UNLISTED_FOR)

    def _post(
        self, identity: str, previous: str | None, replicas: Sequence[ReplicaStatus], now: float
    ) -> Post:
        self._stale = {
            index: _reason(replica)
            for index, replica in enumerate(replicas)
            if _failed(replica, identity)
        }
        self._posted, self._posted_at, self._previous = identity, now, previous
        self._noticed, self._difference_lost, self._unsure_since = set(), False, None
        self._posts_left -= 1
        self.loaded.append(identity)
        return Post(identity, previous)

    def _broken(self, posted: str, reason: str, reports: Mapping[str, str]) -> Decision:
        self._chain.reset()
        if posted != self.identity or not self._chain.stands_alone(posted):
            return NeedWhole(f"{posted} was not loaded: {reason}", reports)
        return Unloadable(reason, reports)


class Pace:
    """Paces the polls of one sync: pauses of 0.25 s at first, three times as long each time, 2.5 s
    at most. The official client looks every 5 s; over a whole load this is at most twice as many
    requests. A server that holds the answer back until the load has ended is asked once."""

    FIRST = 0.25
    LONGEST = 2.5

    def __init__(self) -> None:
        self._delay = self.FIRST

    def take_next(self) -> float:
        """Give the seconds until the next poll; the ones after it are longer."""
        delay, self._delay = self._delay, min(self._delay * 3.0, self.LONGEST)
        return delay

    def restart(self) -> None:
        """Poll quickly again, after a new request."""
        self._delay = self.FIRST
