"""Replicas of a deployment that load snapshots, late, in turn, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Replica:
    """How one replica takes a load; durations in seconds.

    `notices_s` passes between a request and the replica's first word of it, in which it reports
    what it held before; `loads_s` more until it serves. `listed_from_s` and `hidden` take it out of
    the list: before that time after the first request, or between two times after the last.
    `unready_before` reports readiness only once a snapshot is loaded. `adapters` is how loaded
    adapters are listed: "" (none, the field is absent), "new_first" or "new_last".
    `checks_predecessor` refuses a delta to what it does not hold. `stale_error` reports a failed
    load of another identity until the first load is done.
    """

    notices_s: float = 0.0
    loads_s: float = 0.0
    listed_from_s: float | None = None
    hidden: tuple[float, float] | None = None
    unready_before: bool = False
    adapters: str = ""
    checks_predecessor: bool = True
    stale_error: bool = False


class _State:
    """What one replica holds."""

    def __init__(self, habits: Replica) -> None:
        self.habits = habits
        self.held: list[str] = []
        self.asked: tuple[float, str, str | None] | None = None
        self.first: float | None = None
        self.failed: str | None = None

    def ask(self, identity: str, predecessor: str | None, now: float) -> None:
        self.settle(now)
        self.first = self.first if self.first is not None else now
        self.asked = (now, identity, predecessor)
        self.failed = None

    def settle(self, now: float) -> None:
        """Take in a load whose time has come."""
        if self.asked is None:
            return
        since, identity, predecessor = self.asked
        if now - since < self.habits.notices_s + self.habits.loads_s:
            return
        current = self.held[-1] if self.held else None
        self.asked = None
        if predecessor is not None and self.habits.checks_predecessor and predecessor != current:
            self.failed = identity
        else:
            self.held = [*(name for name in self.held if name != identity), identity]

    def row(self, now: float) -> dict[str, Any] | None:
        habits, asked = self.habits, self.asked
        since = now - asked[0] if asked else None
        if habits.listed_from_s is not None and (
            self.first is None or now - self.first < habits.listed_from_s
        ):
            return None
        if since is not None and habits.hidden and habits.hidden[0] <= since < habits.hidden[1]:
            return None
        self.settle(now)
        loading = self.asked is not None and since is not None and since >= habits.notices_s
        stage = {"stage": "loading" if loading else "ready"}
        if loading and self.asked is not None:
            stage["target_snapshot_identity"] = self.asked[1]
        if self.failed is not None:
            stage = {"stage": "error", "target_snapshot_identity": self.failed}
        elif habits.stale_error and not self.held:
            stage = {"stage": "error", "target_snapshot_identity": "of-another-run"}
        row = {
            "current_snapshot_identity": self.held[-1] if self.held else None,
            "readiness": (bool(self.held) or not habits.unready_before) and not loading,
            "loading_state": stage,
        }
        if habits.adapters:
            names = self.held if habits.adapters == "new_last" else self.held[::-1]
            row["loaded_adapters"] = [{"identity": name, "status": "loaded"} for name in names]
            # A server of adapters serves them all; its base stays what it was.
            row["current_snapshot_identity"] = None
            row["readiness"] = not loading
        return row


class Replicas:
    """All replicas of a deployment."""

    def __init__(self, habits: tuple[Replica, ...]) -> None:
        self._states = [_State(one) for one in habits]
        self.loads: list[dict[str, Any]] = []

    def ask(self, body: dict[str, Any], now: float) -> None:
        """A request to load a snapshot."""
        self.loads.append(body)
        metadata = body.get("incremental_snapshot_metadata") or {}
        for state in self._states:
            state.ask(body["identity"], metadata.get("previous_snapshot_identity"), now)

    def rows(self, now: float) -> list[dict[str, Any]]:
        """What the deployment reports."""
        return [row for state in self._states if (row := state.row(now)) is not None]

    def loading(self, now: float) -> bool:
        """Some replica does not hold yet what was asked for last."""
        for state in self._states:
            state.settle(now)
        return any(state.asked is not None for state in self._states)
