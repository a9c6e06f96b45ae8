"""Retention: decides from what is on disk and in use which snapshots may go, and removes them.

Kept are: what a deployment serves or is loading; the newest snapshots of each job; what is young;
what was given a time that is not over; and, of all these, the chain that they are built up from.
Of what is not in use, a snapshot whose time is over goes, however new it is. Snapshots that
`weight_sync()` named itself (`weight-sync-...`) follow each other at every step, so few of them are
kept; those that a user named are kept longer.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fireworks_training.local.store.expiry import expiry_of
from fireworks_training.local.store.snapshots import SnapshotError, SnapshotStore

log = logging.getLogger(__name__)

OF_SYNCS = "weight-sync-"
KEEP_SYNCS = 4
KEEP_NAMED = 64
YOUNG_S = 120.0
"""Seconds in which a snapshot is on its way to whoever asked for it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Describes a snapshot on disk.

    Attributes:
        predecessor: identity that it is a difference to; None if it stands alone.
        job: the job that wrote it.
        written: when, in seconds of the clock that `to_remove` is given.
        expires: the end of its time by the same clock; None without one.
    """

    identity: str
    predecessor: str | None
    job: str
    written: float
    expires: float | None = None


def to_remove(stored: Sequence[Stored], in_use: Collection[str], now: float) -> list[str]:
    """Return the snapshots that nothing needs any more."""
    by_name = {one.identity: one for one in stored}
    kept = set(in_use) | {one.identity for one in stored if now - one.written < YOUNG_S}
    over = {one.identity for one in stored if one.expires is not None and one.expires <= now}
    kept |= {one.identity for one in stored if one.expires is not None and one.expires > now}
    groups: dict[tuple[str, bool], list[Stored]] = defaultdict(list)
    for one in stored:
        if one.identity not in over:
            groups[one.job, one.identity.startswith(OF_SYNCS)].append(one)
    for (_, of_syncs), members in groups.items():
        newest = sorted(members, key=lambda one: one.written, reverse=True)
        kept |= {one.identity for one in newest[: KEEP_SYNCS if of_syncs else KEEP_NAMED]}
    links = list(kept)
    while links:
        link = by_name.get(links.pop())
        if link is not None and link.predecessor is not None and link.predecessor not in kept:
            kept.add(link.predecessor)
            links.append(link.predecessor)
    return sorted(by_name.keys() - kept)


def remove(folder: Path) -> None:
    """Remove a checkpoint: under another name at once, so that a half-removed one is never found
    under its own. Blocks on the disk."""
    grave = folder.parent / f".tmp-removed.{uuid.uuid4().hex}"
    folder.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def clean(store: SnapshotStore, in_use: Collection[str], now: float) -> list[str]:
    """Remove the snapshots that may go; blocks on the disk, so call it in a thread.

    Args:
        in_use: identities that deployments serve or are loading.
        now: seconds since the epoch, as files' times are.

    Returns:
        What was removed.
    """
    stored = list[Stored]()
    for identity in store.identities():
        try:
            manifest = store.read(identity)
            written = store.path(identity).stat().st_mtime
        except (SnapshotError, OSError):
            continue  # damaged or being removed: not ours to judge
        expires = expiry_of(store.path(identity))
        stored.append(Stored(identity, manifest.predecessor, manifest.job, written, expires))
    gone = to_remove(stored, in_use, now)
    for identity in gone:
        remove(store.path(identity))
    if gone:
        log.info("removed %d snapshots that nothing needs any more", len(gone))
    return gone
