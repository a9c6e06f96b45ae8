"""Decides which resources of this user's runs may be removed, from the ledger and without I/O.

The ledger is a list of entries, one JSON object per line, in the order of the events. A *claim* is
one run's relation to one resource: it begins with an intent (written before the create request is
sent) or an adoption, and ends when the resource is gone. It has three forms: `LedgerEntry` is one
line, `OpenClaim` is a claim as its lines add up to, read by any process, and
`_async.resources.ownership.Claim` is its state in the memory of the run itself. Rules:

1. The ledger only shows where to look. The resource itself must prove that it is ours: it carries
   the nonce of its claim, in a deployment's annotations or a job's display name.
2. A resource that a live process holds is never touched, by whichever claim it holds it.
3. A resource that was kept on purpose stays, unless the caller asks for those too.
4. Where no decision is possible (another machine's process, another account) the resource stays,
   with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any, Literal, cast

Kind = Literal["trainer", "deployment"]
Event = Literal["intent", "created", "adopted", "kept", "gone"]

ANNOTATION = "fireworks-training-run"
"""Key of the annotation that holds a deployment's nonce."""

INTENT_GRACE = 120.0
"""Seconds after which a create request that nobody waits for can no longer take effect."""

_NONCE = re.compile(r"[0-9a-f]{12}")
_EVENTS = ("intent", "created", "adopted", "kept", "gone")
NAME_LIMIT = 63
"""Characters of a display name."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Identifies a process among all that ever had its number.

    Attributes:
        machine: the host and the namespace in which `pid` counts.
        boot: the machine's boot; empty where it has no name.
        pid: the process's number.
        started: when it started, as `_async.runtime.processes.start_of` gives it.
    """

    machine: str
    boot: str
    pid: int
    started: str


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Records one event of a claim: one line of the ledger.

    Attributes:
        at: seconds since the epoch.
        event: the event.
        kind, resource_id, account, base_url: identify the resource.
        nonce: the run's nonce; proves ownership where the resource carries it.
        owner: the process that wrote the line.
        run: the run's name, for people.
        embedded: whether the platform lived in the owner's process and ended with it.
        note: the reason, for people.
    """

    at: float
    event: Event
    kind: Kind
    resource_id: str
    account: str
    base_url: str
    nonce: str
    owner: Owner
    run: str = ""
    embedded: bool = False
    note: str = ""


def encode(entry: LedgerEntry) -> bytes:
    """Write an entry as one line, with its end."""
    return json.dumps(asdict(entry), separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> LedgerEntry | None:
    """Read a line; None for one that is torn or not ours."""
    try:
        fields: object = json.loads(line)
        if not isinstance(fields, dict):
            return None
        row = dict(cast(dict[str, Any], fields))
        row["at"], row["owner"] = float(row["at"]), Owner(**row["owner"])
        entry = LedgerEntry(**row)
        if not _well_typed(entry):
            return None
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return entry if entry.event in _EVENTS and entry.kind in ("trainer", "deployment") else None


def _well_typed(entry: LedgerEntry) -> bool:
    """Whether the values, which come from a file, are of the kinds that the fields declare."""
    owner = entry.owner
    texts: list[object] = [entry.event, entry.kind, entry.resource_id, entry.account]
    texts += [entry.base_url, entry.nonce, entry.run, entry.note]
    texts += [owner.machine, owner.boot, owner.started]
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(cast(object, entry.embedded), bool)
        and type(owner.pid) is int
        and isfinite(entry.at)
    )


# -- marks ---------------------------------------------------------------------------------------


def marked_name(name: str, nonce: str) -> str:
    """Make a job's display name that carries the nonce; a name too long for both is cut."""
    tag = f" ft-{nonce}"
    room = NAME_LIMIT - len(tag)
    return (name if len(name) <= room else name[: room - 1] + "…") + tag


def name_carries(display_name: str, nonce: str) -> bool:
    """Whether a display name proves that this run made the job."""
    return _NONCE.fullmatch(nonce) is not None and display_name.endswith(f" ft-{nonce}")


def annotations_carry(annotations: Mapping[str, str], nonce: str) -> bool:
    """Whether annotations prove that this run made the deployment."""
    return _NONCE.fullmatch(nonce) is not None and annotations.get(ANNOTATION) == nonce


# -- claims --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenClaim:
    """Sums up the entries of a claim that has not ended, of any run.

    Attributes:
        last: its latest entry, which counts.
        since: when it began, seconds since the epoch.
    """

    last: LedgerEntry
    since: float

    @property
    def place(self) -> tuple[str, str, str, str]:
        """The resource that the claim is about."""
        entry = self.last
        return entry.base_url, entry.account, entry.kind, entry.resource_id

    @property
    def holds(self) -> bool:
        """Whether its owner, if it lives, uses the resource."""
        return self.last.event in ("intent", "created", "adopted")


def fold(entries: Iterable[LedgerEntry]) -> list[OpenClaim]:
    """Sum up entries as open claims, oldest first."""
    claims: dict[tuple[object, ...], OpenClaim] = {}
    for entry in entries:
        key = _key(entry)
        known = claims.get(key)
        if entry.event == "gone":
            claims.pop(key, None)
        else:
            claims[key] = OpenClaim(entry, entry.at if known is None else known.since)
    return sorted(claims.values(), key=lambda claim: claim.since)


def compact(lines: Sequence[bytes]) -> list[bytes]:
    """Keep the lines that still matter: of each open claim the first and the last entry.

    `fold` finds the same claims in them. A JSON object that is not an entry of this version is
    kept; a torn line is not.
    """
    ends: dict[tuple[object, ...], tuple[int, int]] = {}
    unknown = set[int]()
    for number, line in enumerate(lines):
        entry = decode(line)
        if entry is None:
            if _is_object(line):
                unknown.add(number)
            continue
        key = _key(entry)
        if entry.event == "gone":
            ends.pop(key, None)
        else:
            ends[key] = (ends.get(key, (number, number))[0], number)
    kept = unknown.union(*ends.values())
    return [lines[number] for number in sorted(kept)]


def _key(entry: LedgerEntry) -> tuple[object, ...]:
    """Identify the claim that an entry belongs to."""
    return entry.base_url, entry.account, entry.kind, entry.resource_id, entry.nonce


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class AskPlatform:
    """Ask the platform for the resource, and decide with `judge_found`."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Leave the resource; `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """Note that the claim has ended: there is nothing to remove any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete the resource, and note that."""


def judge(
    claim: OpenClaim,
    others: Sequence[OpenClaim],
    lives: Callable[[Owner], bool | None],
    *,
    now: float,
    older_than: float = 0.0,
    kept: bool = False,
    elsewhere: bool = False,
) -> AskPlatform | Leave | Close:
    """Decide about an open claim, before the platform is asked.

    Args:
        others: all open claims; those on the same resource count.
        lives: whether a process is alive; None where this machine can't know.
        older_than: seconds that a claim must have been open.
        kept: whether resources that were kept on purpose may be removed.
        elsewhere: whether owners of which nothing is known count as dead.
    """
    entry = claim.last
    for other in [claim, *others]:
        if other.place != claim.place or not other.holds:
            continue
        alive = lives(other.last.owner)
        if alive is None and not elsewhere:
            return Leave(f"held on another machine ({other.last.owner.machine})")
        if alive:
            return Leave(f"in use by process {other.last.owner.pid}")
    if entry.embedded:
        return Close("its embedded platform has ended")
    if entry.event == "adopted":
        return Close("it was found, not made, and its user has ended")
    if entry.event == "kept" and not kept:
        return Leave(f"kept on purpose{': ' if entry.note else ''}{entry.note}")
    if now - claim.since < older_than:
        return Leave(f"only {now - claim.since:.0f} s old")
    return AskPlatform()


def judge_found(
    claim: OpenClaim, *, present: bool, carries: bool, now: float
) -> Remove | Leave | Close:
    """Decide about an open claim, given the resource that the platform has under its id.

    Args:
        present: whether there is such a resource, not deleted.
        carries: whether the resource carries the claim's nonce.
    """
    intent = claim.last.event == "intent"
    if not present:
        if intent and now - claim.last.at < INTENT_GRACE:
            return Leave("its create request may still be on its way")
        return Close("it is gone")
    if carries:
        return Remove()
    if intent:
        return Close("never made: what is there under this id is not ours")
    return Leave("does not carry this run's nonce: it is not ours any more")


def close(claim: OpenClaim, *, at: float, owner: Owner, note: str) -> LedgerEntry:
    """Make the entry that ends a claim."""
    return replace(claim.last, at=at, event="gone", owner=owner, note=note)
