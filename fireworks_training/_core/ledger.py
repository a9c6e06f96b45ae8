"""What this user's runs have made, and what of it may be taken away: decided without I/O.

The ledger is a list of entries, one JSON object a line, in the order in which things happened. A
*claim* is one run's relation to one resource: it begins with an intent (written before the create
request is sent) or an adoption, and ends when the resource is gone. Rules:

1. The ledger only says where to look. That a resource is ours, it must say itself: it carries the
   nonce of its claim, in a deployment's annotations or a job's display name.
2. What a live process holds is never touched, by whichever claim it holds it.
3. What was kept on purpose stays, unless the caller asks for that too.
4. What can't be decided (another machine's process, another account) stays, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

Kind = Literal["trainer", "deployment"]
Event = Literal["intent", "created", "adopted", "kept", "gone"]

ANNOTATION = "fireworks-training-run"
"""Key of the annotation that holds the nonce of a deployment."""

INTENT_GRACE = 120.0
"""Seconds after which a create request that nobody waits for can no longer take effect."""

_NONCE = re.compile(r"[0-9a-f]{12}")
_EVENTS = ("intent", "created", "adopted", "kept", "gone")
NAME_LIMIT = 63
"""Characters of a display name."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from any other that ever had its number.

    Attributes:
        machine: the host and the namespace in which `pid` counts.
        boot: of the machine; empty where it has no name.
        pid: its number.
        started: when it started, as the system writes it.
    """

    machine: str
    boot: str
    pid: int
    started: str


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line.

    Attributes:
        at: seconds since the epoch.
        event: what happened.
        kind, resource_id, account, base_url: which resource.
        nonce: of the run; proves ownership where the resource carries it.
        owner: the process.
        run: the run's name, for people.
        embedded: the platform lived in the owner's process and ended with it.
        note: why, for people.
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
    """One line, with its end."""
    return json.dumps(asdict(entry), separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> LedgerEntry | None:
    """A line; None for one that is torn or not ours."""
    try:
        fields: object = json.loads(line)
        if not isinstance(fields, dict):
            return None
        row = dict(cast(dict[str, Any], fields))
        row["at"], row["owner"] = float(row["at"]), Owner(**row["owner"])
        entry = LedgerEntry(**row)
    except (ValueError, TypeError, KeyError):
        return None
    return entry if entry.event in _EVENTS and entry.kind in ("trainer", "deployment") else None


# -- marks ---------------------------------------------------------------------------------------


def marked_name(name: str, nonce: str) -> str:
    """A job's display name that carries the nonce; a name too long for both is cut."""
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
    """A run's relation to a resource, as the ledger has it.

    Attributes:
        last: the entry that counts.
        since: when it began, seconds since the epoch.
    """

    last: LedgerEntry
    since: float

    @property
    def place(self) -> tuple[str, str, str, str]:
        """Which resource."""
        entry = self.last
        return entry.base_url, entry.account, entry.kind, entry.resource_id

    @property
    def holds(self) -> bool:
        """Whether its owner, if it lives, uses the resource."""
        return self.last.event in ("intent", "created", "adopted")


def fold(entries: Iterable[LedgerEntry]) -> list[OpenClaim]:
    """The claims that are open, oldest first."""
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
    """The lines that still matter: of each open claim the first and the last entry.

    `fold` finds the same in them. A JSON object that is no entry of this version is kept; what is
    torn is not.
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
    """Which claim an entry is of."""
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
    """Touch nothing; `reason` for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """There is nothing to take away any more: note that, with the reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete the resource, and note it."""


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
    """What to do about an open claim, before the platform is asked.

    Args:
        others: all open claims; those on the same resource count.
        lives: whether a process is alive; None where this machine can't know.
        older_than: seconds that a claim must have been open.
        kept: whether what was kept on purpose is wanted too.
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
    """What to do, given what the platform has under the claim's id.

    Args:
        present: whether there is such a resource, not deleted.
        carries: whether it carries the claim's nonce.
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
    """The entry that ends a claim."""
    return replace(claim.last, at=at, event="gone", owner=owner, note=note)
