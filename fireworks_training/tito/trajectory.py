"""One trajectory: its calls under way, each of which may become a turn, and its end.

A call changes the trajectory in one step, without an await, after everything that can fail: one
that fails or is cancelled leaves it as it was. HTTP is `server`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.tito.backend import Backend
from fireworks_training.tito.calls import Answered, Call, outcome_of, response_of, turn_of
from fireworks_training.tito.errors import TITOError
from fireworks_training.tito.failures import typed
from fireworks_training.tito.history import History
from fireworks_training.tito.messages import json_hash, plain_json
from fireworks_training.tito.metrics import Measured
from fireworks_training.tito.planning import Plan, Standing, checked, planned
from fireworks_training.tito.records import (
    TITOCallResult,
    TITOEmission,
    TITOStatus,
    TITOTrajectoryArtifact,
    TrajectoryDriftPolicy,
)
from fireworks_training.tito.requests import TITOChatRequest

MAX_CALLS = 64
"""Calls of one trajectory at a time; those of the policy wait for each other."""

ANSWER_GRACE = 10.0
"""Seconds that the end of a trajectory waits for an agent to read its last answer."""

logger = logging.getLogger("fireworks_training.tito")


class Trajectory:
    """See the module. Made by `TITOSidecar.create_trajectory`."""

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
        self._history = History(self._policy)
        self._backend = backend
        self._affinity = serving_affinity_key or uuid.uuid4().hex
        self._metadata = MappingProxyType(plain_json(metadata or {}))
        self._answered: Answered | None = None
        self._discarded: TITOError | None = None
        self._turn_lock = asyncio.Lock()
        self._generating: set[asyncio.Task[Any]] = set()
        self._answering: set[asyncio.Task[Any]] = set()
        self._ending: str | None = None

    @property
    def model(self) -> str:
        """Model string of the sampler."""
        return self._backend.sampler.model

    @property
    def measured(self) -> Measured:
        """Its counts."""
        return self._history.measured

    def opening(self) -> Mapping[str, Any]:
        """What the observer is told at its beginning."""
        return {
            "metadata": dict(self._metadata),
            "serving_affinity_key_hash": self._affinity_hash(),
            "max_masked_tokens": self._policy.max_masked_tokens,
            "on_other_mismatch": self._policy.on_other_mismatch,
        }

    def require_active(self) -> None:
        """Refuse what comes after the end.

        Raises:
            TITOError: it has ended or is ending (410), or is to be discarded.
        """
        if self._ending is not None:
            raise TITOError(
                "tito_trajectory_closed",
                410,
                f"the trajectory is {self._ending}: no call changes it any more",
                context={"terminal_status": self._ending},
            )
        if self._discarded is not None:
            raise self._discarded

    # -- calls -------------------------------------------------------------------------------------

    def start(
        self,
        request: TITOChatRequest,
        *,
        idempotency_key: str | None = None,
        prepared: asyncio.Event | None = None,
    ) -> asyncio.Task[TITOCallResult]:
        """Answer a call, in a task that the end of the trajectory cancels.

        Args:
            idempotency_key: with that of the last answer, and the same request, that answer is
                given again.
            prepared: set once nothing but the sampling can refuse the call.

        Raises:
            TITOError: too many calls are under way (429), or the trajectory has ended. From the
                task: see its code; the trajectory is as it was.
        """
        self.require_active()
        if len(self._generating) >= MAX_CALLS:
            raise TITOError(
                "tito_too_many_calls",
                429,
                f"{MAX_CALLS} calls of this trajectory are under way: await some first",
                should_retry=True,
            )
        task = asyncio.create_task(self._complete(request, idempotency_key, prepared))
        self._generating.add(task)
        task.add_done_callback(self._generating.discard)
        return task

    async def _complete(
        self, request: TITOChatRequest, key: str | None, prepared: asyncio.Event | None
    ) -> TITOCallResult:
        kind, source = self._backend.classified(request)
        call = Call(kind=kind, source=source)
        self.measured.count("calls/total")
        self.measured.count(f"calls/{kind}")
        try:
            if kind == "auxiliary":
                return await self._auxiliary(call, request, prepared)
            async with self._turn_lock:
                self.require_active()
                return await self._turn(call, request, key, prepared)
        except asyncio.CancelledError:
            self._history.calls.append(call.record("cancelled", self.measured))
            raise
        except Exception as error:
            call.failed_by(error)
            failure = typed(error, call.phase)
            if failure.discard_trajectory and kind == "policy":
                self._discarded = failure
            await self._note_failure(call, failure)
            raise failure from error

    async def _note_failure(self, call: Call, failure: TITOError) -> None:
        record = call.record(outcome_of(failure), self.measured, error_code=failure.code)
        self._history.calls.append(record)
        if failure.code != "tito_debug_storage_error":
            said = {"call_id": call.call_id, "outcome": record.outcome, "error_code": failure.code}
            await self._tell("call_failed", {**said, "phase": call.phase})

    async def _turn(
        self,
        call: Call,
        request: TITOChatRequest,
        key: str | None,
        prepared: asyncio.Event | None,
    ) -> TITOCallResult:
        contract = await self._backend.contract(request)
        call.fingerprint = _fingerprint(request, contract)
        if self._answered is not None and self._answered.key == key:
            return self._again(call, self._answered, prepared)
        standing = self._history.standing()
        plan = await planned(self._backend, standing, request, contract, self.measured)
        call.prompt_hash = json_hash(plan.prompt_ids)
        said = {
            "call_id": call.call_id,
            "disposition": plan.placement.disposition,
            "reason": plan.placement.reason,
            "prompt_tokens": len(plan.prompt_ids),
            "effective_output_tokens": plan.budget.effective,
            "request": request.canonical_value(),
        }
        await self._tell("prepare", said, {"prepared_prompt_ids": plan.prompt_ids})
        sampled, completion = await self._sampled(call, plan, prepared)
        assistant = await self._backend.parsed(request, completion)
        ids = tuple(completion.completion_tokens)
        said = {"call_id": call.call_id, "finish_reason": completion.finish_reason}
        await self._tell("completion", said, {"exact_completion_ids": ids})
        # From here on nothing waits and nothing fails: the turn is there as a whole.
        turn = turn_of(plan, sampled, completion, assistant, uuid.uuid4().hex)
        response = response_of(turn.response_id, assistant, completion, self.model)
        self._history.append(plan, turn)
        record = call.record("succeeded", self.measured, turn_id=turn.turn_id)
        self._history.calls.append(record)
        self._answered = Answered.of(key, call.fingerprint, turn.turn_id, response)
        return TITOCallResult(response, record, turn.turn_id)

    def _again(
        self, call: Call, answered: Answered, prepared: asyncio.Event | None
    ) -> TITOCallResult:
        if answered.fingerprint != call.fingerprint:
            raise TITOError(
                "idempotency_key_reused",
                409,
                "this Idempotency-Key was that of another request: use a new one for each",
            )
        if prepared is not None:
            prepared.set()
        record = call.record("replayed", self.measured, turn_id=answered.turn_id)
        self._history.calls.append(record)
        return TITOCallResult(answered.response, record, answered.turn_id, replayed=True)

    async def _auxiliary(
        self, call: Call, request: TITOChatRequest, prepared: asyncio.Event | None
    ) -> TITOCallResult:
        """A call beside the trajectory: answered, counted, and no part of its tokens."""
        contract = await self._backend.contract(request)
        call.fingerprint = _fingerprint(request, contract)
        alone = Standing(None, "", self._policy)
        plan = await planned(self._backend, alone, request, contract, self.measured)
        call.prompt_hash = json_hash(plan.prompt_ids)
        _, completion = await self._sampled(call, plan, prepared)
        assistant = await self._backend.parsed(request, completion)
        record = call.record("succeeded", self.measured)
        self._history.calls.append(record)
        response_id = f"chatcmpl-{call.call_id}"
        response = response_of(response_id, assistant, completion, self.model)
        return TITOCallResult(response, record, None)

    async def _sampled(
        self, call: Call, plan: Plan, prepared: asyncio.Event | None
    ) -> tuple[SampledRequestResult, SampledCompletion]:
        call.phase = "options"
        options = self._backend.options(plan.request)
        stop = await self._backend.stop(plan.request)
        call.request_id = uuid.uuid4().hex
        sampling = self._backend.sampler.sample_with_prompt_tokens_result(
            list(plan.prompt_ids),
            max_tokens=plan.budget.effective,
            stop=stop,
            prompt_cache_key=self._affinity,
            logical_request_id=call.request_id,
            **options,
        )
        if prepared is not None:
            prepared.set()
        call.phase = "sampling"
        call.sampled = await sampling
        call.phase = "reading"
        return call.sampled, checked(plan, call.sampled)

    # -- answers -----------------------------------------------------------------------------------

    def answer_under_way(self) -> None:
        """The current task answers a call: the end of the trajectory waits for it."""
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def emitted(self, turn_id: str | None, emission: TITOEmission) -> None:
        """Note whether an answer reached the agent; auxiliary calls have no turn."""
        if turn_id is not None:
            self._history.emitted(turn_id, emission)
            await self._tell("response_emission", {"turn_id": turn_id, "emission": emission})

    async def refused(self, error: TITOError, started_at: float) -> None:
        """Note a request that was none, or came too late."""
        if self._ending is not None:
            said = {"error_code": error.code, "terminal_status": self._ending}
            journal = self._backend.journal
            await journal.after_end("request_rejected", self.trajectory_id, said)
            return
        call = Call(kind="policy", source="refused", started_at=started_at)
        self.measured.count("calls/total")
        record = call.record("rejected", self.measured, error_code=error.code)
        self._history.calls.append(record)
        await self._tell("request_rejected", {"error_code": error.code})

    async def _tell(
        self, event: str, payload: Mapping[str, Any], arrays: Mapping[str, Any] | None = None
    ) -> None:
        await self._backend.journal.record(event, self.trajectory_id, payload, arrays)

    # -- the end -----------------------------------------------------------------------------------

    async def end(
        self, status: TITOStatus, reason: str | None = None, *, cancel: bool
    ) -> TITOTrajectoryArtifact:
        """End the trajectory.

        Args:
            cancel: whether calls under way are cancelled, or refuse the end.

        Raises:
            TITOError: it has ended before (410), or a call is under way (409). When the observer
                fails (507), or this is cancelled, the trajectory goes on.
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
            artifact = self._history.artifact(
                self.trajectory_id, self._affinity_hash(), self._metadata, status, reason
            )
            said = {"reason": reason, "segments": len(artifact.segments)}
            await self._backend.journal.ended(self.trajectory_id, status, said)
        except BaseException:
            self._ending = None
            raise
        # What remains answers late calls, and need not keep the tokens.
        self._history, self._answered = History(self._policy), None
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

    def _affinity_hash(self) -> str:
        return hashlib.sha256(self._affinity.encode()).hexdigest()


def _fingerprint(request: TITOChatRequest, contract: str) -> str:
    value = request.canonical_value()
    sampling = request.sampling_value()
    return json_hash({"contract": contract, "request": value, "sampling": sampling})
