"""The checkpoints of a job as they lie on disk: saved states and sampler snapshots.

Knows names, times and manifests. Does not read tensors. The disk is the truth, so nothing is kept
in the database, and a deleted job's checkpoints are listed as long as its folder is there.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.settings import JOB_PREFIX
from fireworks_training.local.store.database import Body
from fireworks_training.local.store.expiry import expiry_of
from fireworks_training.local.store.retention import remove
from fireworks_training.local.store.snapshots import InvalidName, check_name

_SNAPSHOT_TYPES = {
    "base": "CHECKPOINT_TYPE_INFERENCE_BASE",
    "lora": "CHECKPOINT_TYPE_INFERENCE_LORA",
    "delta": "CHECKPOINT_TYPE_INFERENCE_ARC_V2",
}
STATE_TYPE = "CHECKPOINT_TYPE_TRAINING"
PROMOTABLE = frozenset({"base", "lora"})
"""Kinds that stand alone; a delta needs its predecessors."""


def list_checkpoints(job: str, states_dir: Path, snapshots_dir: Path) -> list[Body]:
    """List the checkpoints of a job, oldest first; states whose time is over are removed first.

    Blocks on the disk: call it in a thread.
    """
    for folder in _folders(states_dir):
        ends = expiry_of(folder)
        if ends is not None and ends <= time.time():
            with contextlib.suppress(FileNotFoundError):  # its trainer was quicker
                remove(folder)
    found = [_row(job, folder, STATE_TYPE) for folder in _folders(states_dir)]
    for folder in _folders(snapshots_dir):
        manifest = _manifest(folder)
        if manifest.get("job") == job:
            kind = _SNAPSHOT_TYPES.get(str(manifest.get("kind")), "CHECKPOINT_TYPE_UNSPECIFIED")
            changed, row = _row(job, folder, kind, promotable=manifest.get("kind") in PROMOTABLE)
            if manifest.get("predecessor") is not None:
                row["predecessor"] = manifest["predecessor"]
            found.append((changed, row))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def delete_checkpoint(
    job: str, checkpoint: str, states_dir: Path, snapshots_dir: Path, in_use: Collection[str]
) -> None:
    """Remove a state or a snapshot of a job, and free its disk. Blocks: call it in a thread.

    Args:
        in_use: identities that deployments serve or are loading.

    Raises:
        HttpProblem: 404 without such a checkpoint; 409 for a snapshot that a deployment serves, or
            that another snapshot is a difference to.
    """
    try:
        name = check_name(checkpoint)
    except InvalidName as error:
        raise HttpProblem(404, str(error)) from None
    state, snapshot = states_dir / name, snapshots_dir / name
    if state.is_dir():
        remove(state)
        return
    if _manifest(snapshot).get("job") != job:
        raise HttpProblem(404, f"job {job!r} has no checkpoint {checkpoint!r}")
    if name in in_use:
        raise HttpProblem(
            409,
            f"snapshot {name!r} is served by a deployment: load another one first",
            code="FAILED_PRECONDITION",
        )
    others = ((folder.name, _manifest(folder)) for folder in _folders(snapshots_dir))
    later = [other for other, manifest in others if manifest.get("predecessor") == name]
    if later:
        raise HttpProblem(
            409,
            f"snapshot {name!r} is what {later[0]!r} is a difference to: delete that one first",
            code="FAILED_PRECONDITION",
        )
    remove(snapshot)


def find_snapshot(job: str, identity: str, snapshots_dir: Path) -> Body:
    """Return the manifest of a job's snapshot, if it can become a model.

    Raises:
        HttpProblem: 404 without such a snapshot; 400 for one that can't be promoted.
    """
    try:
        folder = snapshots_dir / check_name(identity)
    except InvalidName as error:
        raise HttpProblem(404, str(error)) from None
    manifest = _manifest(folder)
    if not manifest or manifest.get("job") != job:
        raise HttpProblem(
            404,
            f"job {job!r} has no snapshot {identity!r}; its checkpoints name what is promotable",
        )
    if manifest.get("kind") not in PROMOTABLE:
        raise HttpProblem(
            400,
            f"snapshot {identity!r} is a difference to {manifest.get('predecessor')!r} and can't be"
            " promoted; save a base snapshot (checkpoint_type='base')",
        )
    return manifest


def _folders(parent: Path) -> list[Path]:
    """List the finished folders: a writer works under a name that starts with a dot."""
    if not parent.is_dir():
        return []
    return [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _manifest(folder: Path) -> Body:
    try:
        manifest: object = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}  # retention may be removing it at this moment
    return cast(Body, manifest) if isinstance(manifest, dict) else {}


def _row(job: str, folder: Path, kind: str, *, promotable: bool = False) -> tuple[float, Body]:
    changed = folder.stat().st_mtime
    written = _rfc3339(changed)
    ends = expiry_of(folder)
    return changed, {
        "name": f"{JOB_PREFIX}{job}/checkpoints/{folder.name}",
        "createTime": written,
        "updateTime": written,
        "checkpointType": kind,
        "promotable": promotable,
        **({} if ends is None else {"expireTime": _rfc3339(ends)}),
    }


def _rfc3339(seconds: float) -> str:
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")
