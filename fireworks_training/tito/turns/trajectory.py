"""Runs one trajectory: its calls under way, the answers on their way to the agent, and its end.

It knows which calls there are. A single call is carried out in `turns.turns`; HTTP is known to
`server` alone.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from fireworks_training.tito.evidence.failures import as_tito_error
from fireworks_training.tito.turns.backend import Backend
from fireworks_training.tito.turns.calls import AgentCall, outcome_of
from fireworks_training.tito.turns.turns import Turns
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.messages import plain_json
from fireworks_training.tito.values.metrics import RunningMetrics
from fireworks_training.tito.values.records import (
    TITOCallResult,
    TITOEmission,
    TITOStatus,
    TITOTrajectoryArtifact,
    TrajectoryDriftPolicy,
)
from fireworks_training.tito.values.requests import TITOChatRequest

MAX_CALLS = 64
"""Calls of one trajectory at a time, including those whose request is still being read; calls of
the policy wait for each other."""

ANSWER_GRACE = 10.0
"""Seconds that the end of a trajectory waits for an agent to read its last answer."""

logger = logging.getLogger("fireworks_training.tito")


class Trajectory:
    """Runs the calls of one agent; made by `TITOSidecar.create_trajectory`."""

    def __init__(
        self,
        backend: Backend,
        trajectory_id: str,
        *,
        serving_affinity_key: str | None,
        metadata: Mapping[str, Any] | None,
        drift_policy: TrajectoryDriftPolicy | None,
    ) -> None:
        self.trajectory_id = trajectory_id
        self._policy = drift_policy or TrajectoryDriftPolicy()
        self._backend = backend
        self._affinity = serving_affinity_key or uuid.uuid4().hex
        self._metadata: Mapping[str, Any] = MappingProxyType(plain_json(metadata or {}))
        self._turns = self._no_turns()
        self._discarded: TITOError | None = None
        self._turn_lock = asyncio.Lock()
        self._reading = 0
        self._generating: set[asyncio.Task[Any]] = set()
        self._answering: set[asyncio.Task[Any]] = set()
        self._ending: str | None = None

    @property
    def model(self) -> str:
        """Model string of the sampler."""
        return self._backend.sampler.model

    @property
    def measured(self) -> RunningMetrics:
        """The trajectory's metrics."""
        return self._turns.history.measured

    def opening(self) -> Mapping[str, Any]:
        """Give the facts of the beginning, for the observer."""
        return {
            "metadata": dict(self._metadata),
            "serving_affinity_key_hash": self._affinity_hash(),
            "max_masked_tokens": self._policy.max_masked_tokens,
            "on_other_mismatch": self._policy.on_other_mismatch,
        }

    def require_active(self) -> None:
        """Refuse a call after the end.

        Raises:
            TITOError: the trajectory has ended or is ending (410), or is to be discarded.
        """
        if self._ending is not None:
            raise TITOError(
                "tito_trajectory_closed",
                410,
                f"the trajectory is {self._ending}: no call changes it any more",
                context={"terminal_status": self._ending},
            )
        if self._discarded is not None:
            # A copy: an exception raised again and again keeps the frames of each time.
            raise copy.copy(self._discarded)

    # -- calls -------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Generator[None]:
        """Count a request as a call while it is being read.

        Raises:
            TITOError: the same errors as `start` raises.
        """
        self._require_room()
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def start(
        self,
        request: TITOChatRequest,
        *,
        idempotency_key: str | None = None,
        prepared: asyncio.Event | None = None,
    ) -> asyncio.Task[TITOCallResult]:
        """Answer a call, in a task that the end of the trajectory cancels.

        Args:
            idempotency_key: the key of the last answer, with the same request, gives that answer
                again.
            prepared: set when nothing but the sampling can refuse the call any more.

        Raises:
            TITOError: too many calls are under way, or were made (429), or the trajectory has
                ended. The task's own errors leave the trajectory as it was.
        """
        self._require_room()
        task = asyncio.create_task(self._complete(request, idempotency_key, prepared))
        self._generating.add(task)
        task.add_done_callback(self._generating.discard)
        return task

    def _require_room(self) -> None:
        self.require_active()
        if len(self._generating) + self._reading >= MAX_CALLS:
            raise TITOError(
                "tito_too_many_calls",
                429,
                f"{MAX_CALLS} calls of this trajectory are under way: await some first",
                should_retry=True,
            )
        self._turns.history.require_room()

    async def _complete(
        self, request: TITOChatRequest, key: str | None, prepared: asyncio.Event | None
    ) -> TITOCallResult:
        kind, source = self._backend.classified(request)
        call = AgentCall(kind=kind, source=source)
        self.measured.count("calls/total")
        self.measured.count(f"calls/{kind}")
        try:
            if kind == "auxiliary":
                return await self._turns.auxiliary(call, request, prepared)
            async with self._turn_lock:
                self.require_active()
                return await self._turns.policy(call, request, key, prepared)
        except asyncio.CancelledError:
            self._turns.history.note(call.record("cancelled", self.measured))
            raise
        except Exception as error:
            call.failed_by(error)
            failure = as_tito_error(error, call.phase)
            if failure.discard_trajectory and kind == "policy":
                self._discarded = copy.copy(failure)
            elif failure.discard_trajectory:
                failure = failure.for_auxiliary_call()
            await self._note_failure(call, failure)
            if failure is error:
                raise
            raise failure from error

    async def _note_failure(self, call: AgentCall, failure: TITOError) -> None:
        record = call.record(outcome_of(failure), self.measured, error_code=failure.code)
        self._turns.history.note(record)
        if failure.code != "tito_debug_storage_error":
            payload = {
                "call_id": call.call_id,
                "outcome": record.outcome,
                "error_code": failure.code,
            }
            await self._turns.record_event("call_failed", {**payload, "phase": call.phase})

    # -- answers -----------------------------------------------------------------------------------

    def answer_under_way(self) -> None:
        """Note that the current task answers a call, so that the trajectory's end waits for it."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def emitted(self, turn_id: str | None, emission: TITOEmission) -> None:
        """Note whether an answer reached the agent; auxiliary calls have no turn."""
        if turn_id is not None:
            self._turns.history.emitted(turn_id, emission)
            payload = {"turn_id": turn_id, "emission": emission}
            try:
                await self._turns.record_event("response_emission", payload)
            except TITOError as error:
                # The agent has its answer, or has left: no call can fail with this error.
                logger.warning("what became of an answer could not be told: %s", error)

    async def refused(self, error: TITOError, started_at: float) -> None:
        """Note a request that was malformed, or came too late."""
        if self._ending is not None:
            payload = {"error_code": error.code, "terminal_status": self._ending}
            journal = self._backend.journal
            await journal.record_late("request_rejected", self.trajectory_id, payload)
            return
        call = AgentCall(kind="policy", source="refused", started_at=started_at)
        self.measured.count("calls/total")
        record = call.record("rejected", self.measured, error_code=error.code)
        self._turns.history.note(record)
        await self._turns.record_event("request_rejected", {"error_code": error.code})

    # -- the end -----------------------------------------------------------------------------------

    async def end(
        self, status: TITOStatus, reason: str | None = None, *, cancel: bool
    ) -> TITOTrajectoryArtifact:
        """End the trajectory.

        Args:
            cancel: whether calls under way are cancelled, or refuse the end.

        Raises:
            TITOError: the trajectory has ended before (410), or a call is under way (409). When the
                observer fails (507), or this is cancelled, the trajectory goes on.
        """
        if self._ending is not None:
            self.require_active()
        if self._generating and not cancel:
            raise TITOError(
                "tito_call_in_flight",
                409,
                f"{len(self._generating)} calls are under way: await them, or abandon the "
                "trajectory",
            )
        if self._discarded is not None:
            status, reason = "failed", self._discarded.code
        self._ending = status
        try:
            await self._stop_calls()
            artifact = self._turns.history.artifact(
                self.trajectory_id, self._affinity_hash(), self._metadata, status, reason
            )
            payload = {"reason": reason, "segments": len(artifact.segments)}
            await self._backend.journal.record_end(self.trajectory_id, status, payload)
        except BaseException:
            self._ending = None
            raise
        # The object remains to answer late calls, and need not keep the tokens.
        self._turns, self._metadata = self._no_turns(), {}
        return artifact

    async def _stop_calls(self) -> None:
        calls = list(self._generating)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        if not self._answering:
            return
        _, slow = await asyncio.wait(self._answering, timeout=ANSWER_GRACE)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    def _no_turns(self) -> Turns:
        return Turns(self._backend, self.trajectory_id, self._affinity, self._policy)

    def _affinity_hash(self) -> str:
        return hashlib.sha256(self._affinity.encode()).hexdigest()
