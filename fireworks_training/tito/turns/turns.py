"""What one call comes to: its prompt, its sampling, and the turn that the two are.

The trajectory changes in one step, without an await, after everything that can fail. Which calls
there are, and when they end, is `trajectory`'s.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.tito.turns.backend import Backend
from fireworks_training.tito.turns.calls import AgentCall, Answered, response_of, turn_of
from fireworks_training.tito.turns.history import History
from fireworks_training.tito.turns.planning import Standing, TurnPlan, checked, planned
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.messages import json_hash
from fireworks_training.tito.values.records import TITOCallResult, TrajectoryDriftPolicy
from fireworks_training.tito.values.requests import TITOChatRequest


class Turns:
    """The turns of one trajectory, made one after the other.

    Args:
        affinity: keeps the calls on one replica.

    Attributes:
        history: what came of them.
    """

    def __init__(
        self, backend: Backend, trajectory_id: str, affinity: str, policy: TrajectoryDriftPolicy
    ) -> None:
        self.history = History(policy)
        self._backend = backend
        self._trajectory_id = trajectory_id
        self._affinity = affinity
        self._policy = policy
        self._answered: Answered | None = None

    async def policy(
        self,
        call: AgentCall,
        request: TITOChatRequest,
        key: str | None,
        prepared: asyncio.Event | None,
    ) -> TITOCallResult:
        """A call of the policy: the next turn, or the last answer again.

        Args:
            key: the client's idempotency key.
            prepared: set once nothing but the sampling can refuse the call.

        Raises:
            TITOError: see its code; the trajectory is as it was.
        """
        contract = await self._backend.contract(request)
        call.fingerprint = _fingerprint(request, contract)
        if self._answered is not None and self._answered.key == key:
            return self._again(call, self._answered, prepared)
        measured = self.history.measured
        standing = self.history.standing()
        plan = await planned(self._backend, standing, request, contract, measured)
        call.prompt_hash = json_hash(plan.prompt_ids)
        said = {
            "call_id": call.call_id,
            "disposition": plan.placement.disposition,
            "reason": plan.placement.reason,
            "prompt_tokens": len(plan.prompt_ids),
            "effective_output_tokens": plan.budget.effective,
            "request": request.canonical_value(),
        }
        await self.tell("prepare", said, {"prepared_prompt_ids": plan.prompt_ids})
        sampled, completion = await self._sampled(call, plan, prepared)
        assistant = await self._backend.parsed(request, completion)
        ids = tuple(completion.completion_tokens)
        said = {"call_id": call.call_id, "finish_reason": completion.finish_reason}
        await self.tell("completion", said, {"exact_completion_ids": ids})
        # From here on nothing waits and nothing fails: the turn is there as a whole.
        turn = turn_of(plan, sampled, completion, assistant, uuid.uuid4().hex)
        response = response_of(turn.response_id, assistant, completion, self._backend.sampler.model)
        self.history.append(plan, turn)
        record = call.record("succeeded", measured, turn_id=turn.turn_id)
        self.history.note(record)
        self._answered = Answered.of(key, call.fingerprint, turn.turn_id, response)
        return TITOCallResult(response, record, turn.turn_id)

    def _again(
        self, call: AgentCall, answered: Answered, prepared: asyncio.Event | None
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
        """A call beside the trajectory: answered, counted, and no part of its tokens."""
        contract = await self._backend.contract(request)
        call.fingerprint = _fingerprint(request, contract)
        alone, measured = Standing(None, "", self._policy), self.history.measured
        plan = await planned(self._backend, alone, request, contract, measured)
        call.prompt_hash = json_hash(plan.prompt_ids)
        _, completion = await self._sampled(call, plan, prepared)
        assistant = await self._backend.parsed(request, completion)
        record = call.record("succeeded", measured)
        self.history.note(record)
        response_id = f"chatcmpl-{call.call_id}"
        model = self._backend.sampler.model
        return TITOCallResult(response_of(response_id, assistant, completion, model), record, None)

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
        return call.sampled, checked(plan, call.sampled)

    async def tell(
        self, event: str, payload: Mapping[str, Any], arrays: Mapping[str, Any] | None = None
    ) -> None:
        """Tell the observer of an event of this trajectory."""
        await self._backend.journal.record(event, self._trajectory_id, payload, arrays)


def _fingerprint(request: TITOChatRequest, contract: str) -> str:
    value = request.canonical_value()
    sampling = request.sampling_value()
    return json_hash({"contract": contract, "request": value, "sampling": sampling})
