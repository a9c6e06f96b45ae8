"""Carries out one call: plans its prompt, samples it, and adds the turn to the history.

The history changes in one step, without an await, after everything that can fail. It does not know
which other calls there are, nor when the trajectory ends: `trajectory` does.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.tito.turns.backend import Backend
from fireworks_training.tito.turns.calls import (
    AgentCall,
    IdempotentAnswer,
    logprobs_of,
    response_of,
    turn_of,
)
from fireworks_training.tito.turns.history import History
from fireworks_training.tito.turns.planning import SegmentTip, TurnPlan, check_completion, plan_turn
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.messages import json_hash
from fireworks_training.tito.values.records import TITOCallResult, TrajectoryDriftPolicy
from fireworks_training.tito.values.requests import TITOChatRequest


class Turns:
    """Makes the turns of one trajectory, one after the other.

    Args:
        affinity: a key that keeps the calls on one replica.

    Attributes:
        history: the turns and calls so far.
    """

    def __init__(
        self, backend: Backend, trajectory_id: str, affinity: str, policy: TrajectoryDriftPolicy
    ) -> None:
        self.history = History(policy)
        self._backend = backend
        self._trajectory_id = trajectory_id
        self._affinity = affinity
        self._policy = policy
        self._answered: IdempotentAnswer | None = None

    async def policy(
        self,
        call: AgentCall,
        request: TITOChatRequest,
        key: str | None,
        prepared: asyncio.Event | None,
    ) -> TITOCallResult:
        """Answer a call of the policy with the next turn, or with the last answer again.

        Args:
            key: the client's idempotency key.
            prepared: set when nothing but the sampling can refuse the call any more.

        Raises:
            TITOError: the call failed; the trajectory is as it was.
        """
        contract = await self._backend.contract(request)
        call.fingerprint = _fingerprint(request, contract)
        if self._answered is not None and self._answered.key == key:
            return self._again(call, self._answered, prepared)
        measured = self.history.measured
        tip = self.history.tip()
        plan = await plan_turn(self._backend, tip, request, contract, measured)
        call.prompt_hash = json_hash(plan.prompt_ids)
        payload = {
            "call_id": call.call_id,
            "disposition": plan.placement.disposition,
            "reason": plan.placement.reason,
            "prompt_tokens": len(plan.prompt_ids),
            "effective_output_tokens": plan.budget.effective,
            "request": request.canonical_value(),
        }
        await self.record_event("prepare", payload, {"prepared_prompt_ids": plan.prompt_ids})
        sampled, completion = await self._sampled(call, plan, prepared)
        assistant = await self._backend.parsed(request, completion)
        logprobs = await self._logprobs(request, completion)
        ids = tuple(completion.completion_tokens)
        payload = dict[str, Any](call_id=call.call_id, finish_reason=completion.finish_reason)
        if assistant.parser_fallback:
            measured.count(f"calls/parser_fallback_{assistant.fallback_reason}")
            payload["parser_reason_code"] = assistant.fallback_reason
        await self.record_event("completion", payload, {"exact_completion_ids": ids})
        # From here on nothing awaits and nothing fails: the turn is added as a whole.
        turn = turn_of(plan, sampled, completion, assistant, uuid.uuid4().hex)
        model = self._backend.sampler.model
        response = response_of(turn.response_id, assistant, completion, model, logprobs)
        self.history.append(plan, turn)
        record = call.record("succeeded", measured, turn_id=turn.turn_id)
        self.history.note(record)
        self._answered = IdempotentAnswer.of(key, call.fingerprint, turn.turn_id, response)
        return TITOCallResult(response, record, turn.turn_id)

    def _again(
        self, call: AgentCall, answered: IdempotentAnswer, prepared: asyncio.Event | None
    ) -> TITOCallResult:
        if answered.fingerprint != call.fingerprint:
            raise TITOError(
                "idempotency_key_reused",
                409,
                "this Idempotency-Key was that of another request: use a new one for each",
            )
        if prepared is not None:
            prepared.set()
        record = call.record("replayed", self.history.measured, turn_id=answered.turn_id)
        self.history.note(record)
        return TITOCallResult(answered.response, record, answered.turn_id, replayed=True)

    async def auxiliary(
        self, call: AgentCall, request: TITOChatRequest, prepared: asyncio.Event | None
    ) -> TITOCallResult:
        """Answer a call beside the trajectory: it is counted, and no part of the tokens."""
        contract = await self._backend.contract(request)
        call.fingerprint = _fingerprint(request, contract)
        alone, measured = SegmentTip(None, "", self._policy), self.history.measured
        plan = await plan_turn(self._backend, alone, request, contract, measured)
        call.prompt_hash = json_hash(plan.prompt_ids)
        _, completion = await self._sampled(call, plan, prepared)
        assistant = await self._backend.parsed(request, completion)
        logprobs = await self._logprobs(request, completion)
        record = call.record("succeeded", measured)
        self.history.note(record)
        response_id = f"chatcmpl-{call.call_id}"
        model = self._backend.sampler.model
        response = response_of(response_id, assistant, completion, model, logprobs)
        return TITOCallResult(response, record, None)

    async def _logprobs(
        self, request: TITOChatRequest, completion: SampledCompletion
    ) -> dict[str, Any] | None:
        if not request.wants_logprobs:
            return None
        return logprobs_of(completion, await self._backend.token_texts(completion))

    async def _sampled(
        self, call: AgentCall, plan: TurnPlan, prepared: asyncio.Event | None
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
        return call.sampled, check_completion(plan, call.sampled)

    async def record_event(
        self, event: str, payload: Mapping[str, Any], arrays: Mapping[str, Any] | None = None
    ) -> None:
        """Hand an event of this trajectory to the observer."""
        await self._backend.journal.record(event, self._trajectory_id, payload, arrays)


def _fingerprint(request: TITOChatRequest, contract: str) -> str:
    value = request.canonical_value()
    sampling = request.sampling_value()
    return json_hash({"contract": contract, "request": value, "sampling": sampling})
