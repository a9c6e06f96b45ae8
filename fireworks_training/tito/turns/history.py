"""Collects what a trajectory holds: segments of turns, calls, and attempts to send their answers.

It grows by whole turns, and makes the artifact. Nothing here awaits; it knows no sampler and no
renderer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fireworks_training.tito.turns.planning import SegmentTip, TurnPlan
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.metrics import RunningMetrics
from fireworks_training.tito.values.records import (
    TITOCallRecord,
    TITOEmission,
    TITOResponseAttempt,
    TITOSegmentResult,
    TITOStatus,
    TITOTrajectoryArtifact,
    TITOTurn,
    TrajectoryDriftPolicy,
)

MOST_CALLS = 1 << 16
"""Calls of one trajectory at most, so that an agent in an endless loop does not fill the memory."""


@dataclass(slots=True)
class Segment:
    """Holds the turns of a segment that may still grow."""

    start_reason: str
    contract: str
    segment_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    turns: list[TITOTurn] = field(default_factory=list[TITOTurn])
    closed_reason: str | None = None


class History:
    """Collects the segments, calls and sent answers of one trajectory.

    Attributes:
        measured: the trajectory's metrics.
    """

    def __init__(self, policy: TrajectoryDriftPolicy) -> None:
        self.measured = RunningMetrics()
        self._calls: list[TITOCallRecord] = []
        self._policy = policy
        self._segments: list[Segment] = []
        self._emissions: list[TITOResponseAttempt] = []
        self._started_at = time.time()

    def tip(self) -> SegmentTip:
        """Give the last turn, from which the next one starts."""
        if not self._segments:
            return SegmentTip(None, "", self._policy)
        segment = self._segments[-1]
        return SegmentTip(segment.turns[-1], segment.contract, self._policy)

    def require_room(self) -> None:
        """Refuse a call beyond the limit.

        Raises:
            TITOError: there were `MOST_CALLS` calls (429).
        """
        if len(self._calls) >= MOST_CALLS:
            raise TITOError(
                "tito_too_many_calls",
                429,
                f"the trajectory has had its {MOST_CALLS} calls: end it, and begin another",
            )

    def note(self, record: TITOCallRecord) -> None:
        """Keep the record of a call; one beyond the limit is only counted."""
        if len(self._calls) < MOST_CALLS:
            self._calls.append(record)

    def append(self, plan: TurnPlan, turn: TITOTurn) -> None:
        """Add a turn, to a new segment where its plan starts one."""
        if (reason := plan.placement.reason) is not None:
            if self._segments:
                self._segments[-1].closed_reason = reason
            self._segments.append(Segment(reason, plan.contract))
        self._segments[-1].turns.append(turn)
        self.measured.count(f"lineage/{turn.prompt_disposition}")
        self.measured.count("lineage/realigned_masked_tokens", turn.realigned_masked_tokens)

    def emitted(self, turn_id: str, emission: TITOEmission) -> None:
        """Note whether an answer reached the agent."""
        attempt = TITOResponseAttempt(uuid.uuid4().hex, turn_id, emission, time.time())
        self._emissions.append(attempt)
        self.measured.count(f"transport/response_emission_{emission}")

    def artifact(
        self,
        trajectory_id: str,
        affinity_hash: str,
        metadata: Mapping[str, Any],
        status: TITOStatus,
        reason: str | None,
    ) -> TITOTrajectoryArtifact:
        """Make the artifact from all that was collected so far."""
        finished = time.time()
        return TITOTrajectoryArtifact(
            trajectory_id=trajectory_id,
            serving_affinity_key_hash=affinity_hash,
            metadata=metadata,
            status=status,
            terminal_reason=reason,
            segments=tuple(
                TITOSegmentResult(
                    segment.segment_id,
                    segment.start_reason,
                    segment.contract,
                    tuple(segment.turns),
                    segment.closed_reason or f"trajectory_{status}",
                )
                for segment in self._segments
            ),
            calls=tuple(self._calls),
            response_attempts=tuple(self._emissions),
            metrics=self._totals(finished).summary(),
            started_at=self._started_at,
            finished_at=finished,
        )

    def _totals(self, finished: float) -> RunningMetrics:
        turns = [turn for segment in self._segments for turn in segment.turns]
        totals = self.measured.copy()
        totals.observe("trajectory/policy_turns", len(turns))
        totals.observe("trajectory/segments", len(self._segments))
        totals.observe("trajectory/wall_seconds", finished - self._started_at)
        totals.observe("trajectory/model_input_tokens", sum(len(t.exact_prompt_ids) for t in turns))
        sampled = sum(len(turn.exact_completion_ids) for turn in turns)
        totals.observe("trajectory/sampled_output_tokens", sampled)
        return totals
