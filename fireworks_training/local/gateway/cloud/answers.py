"""What answers say on a cloud: without the fields, headers and statuses of this platform alone.

Pure functions over status and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from fireworks_training.local.gateway.cloud.requests import CloudOperation

Fields = dict[str, object]

RESULT_EXTENSIONS = frozenset(
    (
        "wire",
        "step_protocol",
        "snapshot_protocol",
        "supports_backward",
        "retrieve_futures",
        "snapshot",
        "error_class",
    )
)
"""Fields of a trainer's answers that only this platform has."""

REPLICA_FIELDS = ("current_snapshot_identity", "readiness", "loading_state", "loaded_adapters")
"""Fields of a replica's row in the status of a hot load."""

_LOADING_FIELDS = ("stage", "target_snapshot_identity")


def as_cloud(operation: CloudOperation, status: int, body: Fields) -> tuple[int, Fields]:
    """Return the status and the body that a cloud would answer with in place of these."""
    if operation.kind in ("hot_load", "look"):
        return status, _hot_load(body) if status < 400 else body
    if operation.kind in ("poll", "submit", "session", "heartbeat"):
        return _trainer(status, body)
    return status, body


def _trainer(status: int, body: Fields) -> tuple[int, Fields]:
    if status == 410 and body.get("error_class") == "ModelLost":
        # A router that no longer finds the pod behind a name.
        return 404, {"error": {"message": "trainer not found", "code": "NOT_FOUND"}}
    if body.get("type") == "try_again":
        return 408, {k: v for k, v in body.items() if k in ("queue_state", "queue_state_reason")}
    return status, {name: value for name, value in body.items() if name not in RESULT_EXTENSIONS}


def _hot_load(body: Fields) -> Fields:
    """Return the status without the wait that it offers; the answer to a POST says nothing."""
    if "replicas" not in body or not isinstance(body["replicas"], list):
        return {}
    rows = cast("list[Mapping[str, object]]", body["replicas"])
    return {"replicas": [_replica(row) for row in rows]}


def _replica(row: Mapping[str, object]) -> Fields:
    shown = {name: row[name] for name in REPLICA_FIELDS if name in row}
    loading = shown.get("loading_state")
    if isinstance(loading, dict):
        parts = cast("Mapping[str, object]", loading)
        shown["loading_state"] = {k: v for k, v in parts.items() if k in _LOADING_FIELDS}
    return shown
