"""Whether a snapshot is live: judged from what every replica reports, never from one of them.

A hot load is done when each replica that serves reports the identity asked for. An error counts
only if it is about that identity: one of an earlier load is stale. Knows reports, not requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fireworks_training.errors import ProtocolError
from fireworks_training.models import ReplicaStatus


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
    return [_read_row(row) for row in cast(list[Mapping[str, Any]], rows)]


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
    )


def judge(replicas: Sequence[ReplicaStatus], identity: str) -> Progress:
    """How far the load of `identity` has come; no replicas at all means it has not begun."""
    reports = {str(index): _describe(replica) for index, replica in enumerate(replicas)}
    for replica in replicas:
        if replica.stage == "error" and replica.target == identity:
            return Failed(replica.error or "no reason given", reports)
    late = {
        str(index): reports[str(index)]
        for index, replica in enumerate(replicas)
        if not (replica.ready and replica.identity == identity)
    }
    if late or not replicas:
        return Pending(late or {"-": "no replica is up yet"})
    return Live()


def _describe(replica: ReplicaStatus) -> str:
    holds = replica.identity or "no snapshot"
    stage = f", {replica.stage}" if replica.stage else ""
    target = f" {replica.target}" if replica.target and replica.target != replica.identity else ""
    return f"{holds}{stage}{target}"
