"""Tracks one call of an agent while it goes on, and makes its record, turn and answer at the end.

It knows the records and OpenAI's chat completion; it neither renders nor samples.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fireworks_training.errors import SamplingRequestError
from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.tito.turns.planning import TurnPlan
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.metrics import RunningMetrics
from fireworks_training.tito.values.records import (
    TITOCallKind,
    TITOCallOutcome,
    TITOCallRecord,
    TITOTurn,
)
from fireworks_training.tito.values.requests import TITOParsedAssistant


@dataclass(slots=True, kw_only=True)
class AgentCall:
    """Tracks a call under way.

    Attributes:
        phase: the step that it is at, for errors.
        attempts: HTTP attempts of a sampling that failed.
    """

    kind: str
    source: str
    call_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_at: float = field(default_factory=time.time)
    phase: str = "render"
    fingerprint: str | None = None
    prompt_hash: str | None = None
    request_id: str | None = None
    sampled: SampledRequestResult | None = None
    attempts: int = 0

    def failed_by(self, error: Exception) -> None:
        """Note the attempts and the id of a failed sampling."""
        if isinstance(error, SamplingRequestError):
            self.attempts = error.attempts
            self.request_id = error.logical_request_id or self.request_id

    def record(
        self,
        outcome: TITOCallOutcome,
        measured: RunningMetrics,
        *,
        turn_id: str | None = None,
        error_code: str | None = None,
    ) -> TITOCallRecord:
        """Make the call's record, and count its outcome."""
        ended, sampled = time.time(), self.sampled
        measured.count(f"calls/{outcome}")
        measured.observe("calls/request_wall_seconds", ended - self.started_at)
        if sampled is not None:
            measured.observe("calls/sampler_wall_seconds", sampled.wall_seconds)
            measured.count("calls/upstream_retry_attempts", sampled.attempts - 1)
        return TITOCallRecord(
            call_id=self.call_id,
            kind=cast(TITOCallKind, self.kind),
            classification_source=self.source,
            outcome=outcome,
            started_at=self.started_at,
            ended_at=ended,
            request_fingerprint=self.fingerprint,
            prepared_prompt_hash=self.prompt_hash,
            turn_id=turn_id,
            logical_request_id=self.request_id,
            upstream_response_id=sampled.upstream_response_id if sampled else None,
            attempts=sampled.attempts if sampled else self.attempts,
            server_attempts=tuple(sampled.server_attempts) if sampled else (),
            error_code=error_code,
        )


@dataclass(frozen=True, slots=True)
class IdempotentAnswer:
    """Holds the last answer that had an idempotency key, for a client that asks again."""

    key: str
    fingerprint: str | None
    turn_id: str
    response: Mapping[str, Any]

    @classmethod
    def of(
        cls, key: str | None, fingerprint: str | None, turn_id: str, response: Mapping[str, Any]
    ) -> IdempotentAnswer | None:
        """Keep an answer under its key; None without a key."""
        return None if key is None else cls(key, fingerprint, turn_id, response)


def outcome_of(error: TITOError) -> TITOCallOutcome:
    """Give the outcome of a call that ended with this error."""
    if error.origin == "sdk_parser":
        return "model_malformed"
    return "rejected" if error.origin == "sdk" and error.status < 500 else "failed"


def turn_of(
    plan: TurnPlan,
    sampled: SampledRequestResult,
    completion: SampledCompletion,
    assistant: TITOParsedAssistant,
    turn_id: str,
) -> TITOTurn:
    """Make the turn from its plan and its sampled completion."""
    placement, join = plan.placement, plan.join
    top = completion.top_logprobs
    return TITOTurn(
        turn_id=turn_id,
        request=plan.request,
        assistant=assistant,
        exact_prompt_ids=plan.prompt_ids,
        exact_completion_ids=tuple(completion.completion_tokens),
        inference_logprobs=_floats(completion.inference_logprobs),
        sampling_logprobs=_reported(completion.sampling_logprobs),
        routing_matrices=None,
        response_id=f"chatcmpl-{turn_id}",
        finish_reason=completion.finish_reason,
        prompt_disposition=placement.disposition,
        prefix_match_tokens=placement.prefix_match_tokens,
        realign_from_token=placement.realign_from_token,
        realigned_masked_tokens=placement.realigned_masked_tokens,
        requested_output_tokens=plan.budget.requested,
        effective_output_tokens=plan.budget.effective,
        context_remaining_tokens=plan.budget.remaining,
        server_metrics=sampled.server_metrics,
        sampler_wall_seconds=sampled.wall_seconds,
        logical_request_id=sampled.logical_request_id,
        upstream_response_id=sampled.upstream_response_id,
        upstream_attempts=sampled.attempts,
        prompt_mode="full_history" if join is None else "incremental",
        incremental_contract_id=None if join is None else join.contract_id,
        incremental_junction_kind=None if join is None else join.junction_kind,
        incremental_checkpoint_trim_tokens=0 if join is None else join.checkpoint_trim_tokens,
        incremental_fallback_reason=plan.fallback_reason,
        server_attempts=tuple(sampled.server_attempts),
        parser_fallback=assistant.parser_fallback,
        inference_topk_token_ids=None if top is None else tuple(tuple(row) for row in top),
        inference_topk_logprobs=None if top is None else tuple(tuple(r.values()) for r in top),
    )


def _floats(row: Any) -> tuple[float, ...] | None:
    return None if row is None else tuple(map(float, row))


def _reported(row: Any) -> tuple[float | None, ...] | None:
    """Replace NaN, which stands for a value that was not reported, by None."""
    return None if row is None else tuple(None if v != v else float(v) for v in row)


def response_of(
    response_id: str,
    assistant: TITOParsedAssistant,
    completion: SampledCompletion,
    model: str,
    logprobs: Mapping[str, Any] | None = None,
) -> Mapping[str, Any]:
    """Write the answer as OpenAI's chat completion; one that could not be parsed has `tito`."""
    fallback = {"parser_fallback": True, "parser_reason_code": assistant.fallback_reason}
    message = dict(assistant.response_message)
    called = bool(message.get("tool_calls")) and completion.finish_reason == "stop"
    return {
        "id": response_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": "tool_calls" if called else completion.finish_reason,
            }
        ],
        **({"tito": fallback} if assistant.parser_fallback else {}),
        "usage": {
            "prompt_tokens": completion.prompt_len,
            "completion_tokens": completion.completion_len,
            "total_tokens": completion.prompt_len + completion.completion_len,
        },
    }


def logprobs_of(completion: SampledCompletion, texts: Sequence[str]) -> dict[str, Any]:
    """Write the logprobs of a completion as OpenAI's chat completion has them.

    Args:
        texts: the tokens as text, one each.
    """
    none = [dict[int, float]()] * len(texts)
    top = completion.top_logprobs or none
    content: list[dict[str, Any]] = []
    for text, logprob, row in zip(texts, completion.inference_logprobs or (), top, strict=True):
        # Ids and not texts: decoding each alternative would cost more than the answer.
        others = [{"token": f"token_id:{n}", "logprob": v, "bytes": None} for n, v in row.items()]
        content.append(
            {
                "token": text,
                "logprob": logprob,
                "bytes": list(text.encode()),
                "top_logprobs": others,
            }
        )
    return {"content": content, "refusal": None}
