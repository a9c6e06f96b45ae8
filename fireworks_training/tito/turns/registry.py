"""Finds the trajectories of a sidecar and their keys: the open ones, and those that ended recently.

It makes and ends trajectories; it does not know HTTP.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fireworks_training._async.runtime.threads import in_thread
from fireworks_training.errors import InvalidArgument
from fireworks_training.tito.turns.backend import Backend
from fireworks_training.tito.turns.trajectory import Trajectory
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.records import (
    TITOStatus,
    TITOTrajectoryArtifact,
    TrajectoryDriftPolicy,
)

if TYPE_CHECKING:
    from fireworks_training.tito.evidence.failure_traces import FailureTraces

MAX_OPEN = 8192
"""Trajectories that may be open at a time."""

REMEMBERED = 4096
"""Ended trajectories whose late calls get a 410; older trajectories are unknown (401)."""

_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class TrajectoryRegistry:
    """Holds the trajectories of one sidecar, each under its id.

    Args:
        traces: keeps trajectories that failed; None keeps none.
    """

    def __init__(self, backend: Backend, traces: FailureTraces | None) -> None:
        self._backend = backend
        self._traces = traces
        self._open: dict[str, Trajectory] = {}
        self._ended: OrderedDict[str, Trajectory] = OrderedDict()
        self._keys: dict[str, str] = {}

    @property
    def open_ids(self) -> list[str]:
        """Ids of the open trajectories."""
        return list(self._open)

    def key_of(self, trajectory_id: str) -> str | None:
        """Give the key of a trajectory; None for an unknown one."""
        return self._keys.get(trajectory_id)

    def get(self, trajectory_id: str) -> Trajectory:
        """Find the trajectory of an id.

        Raises:
            TITOError: there is none (404).
        """
        found = self._open.get(trajectory_id) or self._ended.get(trajectory_id)
        if found is None:
            raise TITOError("tito_trajectory_not_found", 404, "no trajectory has that id")
        return found

    def make(
        self,
        trajectory_id: str | None,
        affinity: str | None,
        metadata: Mapping[str, Any] | None,
        policy: TrajectoryDriftPolicy | None,
    ) -> Trajectory:
        """Make a trajectory with a key; the arguments are those of `create_trajectory`."""
        trajectory_id = uuid.uuid4().hex if trajectory_id is None else trajectory_id
        if not _ID.fullmatch(trajectory_id):
            raise InvalidArgument(
                "trajectory_id takes letters, digits, '_', '.' and '-', 1 to 128 of them"
            )
        if trajectory_id in self._keys:
            raise InvalidArgument(f"there is a trajectory {trajectory_id!r} already")
        if len(self._open) >= MAX_OPEN:
            raise TITOError(
                "tito_too_many_trajectories", 429, f"{MAX_OPEN} trajectories are open: end some"
            )
        made = Trajectory(
            self._backend,
            trajectory_id,
            serving_affinity_key=affinity,
            metadata=metadata,
            drift_policy=policy,
        )
        self._open[trajectory_id] = made
        self._keys[trajectory_id] = f"tito_{secrets.token_urlsafe(32)}"
        return made

    def forget(self, trajectory_id: str) -> None:
        """Remove an open trajectory that could not be handed to its maker."""
        if self._open.pop(trajectory_id, None) is not None:
            del self._keys[trajectory_id]

    async def end(
        self, trajectory_id: str, status: TITOStatus, reason: str | None, *, cancel: bool
    ) -> TITOTrajectoryArtifact:
        """End a trajectory as `Trajectory.end` does, and keep a trace of one that failed."""
        trajectory = self.get(trajectory_id)
        artifact = await trajectory.end(status, reason, cancel=cancel)
        del self._open[trajectory_id]
        self._ended[trajectory_id] = trajectory
        while len(self._ended) > REMEMBERED:
            oldest, _ = self._ended.popitem(last=False)
            self._keys.pop(oldest, None)
        if self._traces is not None and artifact.status == "failed":
            code = artifact.terminal_reason or "trajectory_failed"
            error = TITOError(code, 500, f"the trajectory failed: {code}")
            await in_thread(self._traces.dump, artifact, error, code)
        return artifact
