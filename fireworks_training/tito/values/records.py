"""Defines the records of a trajectory: calls, turns, segments, and the artifact that holds them.

It computes one thing from them: the token row of a segment with its logprobs and loss mask, ready
for a datum. It does not know how a turn comes to be (`turns.lineage`) nor the layout of files
(`artifacts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from fireworks_training._checks import integer, one_of
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import SampledServerAttempt, ServerMetrics
from fireworks_training.tito.values.artifacts import packed, unpacked
from fireworks_training.tito.values.metrics import TITOMetricSummary
from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant

TITOCallKind = Literal["policy", "auxiliary"]
TITOCallOutcome = Literal[
    "succeeded", "replayed", "model_malformed", "rejected", "failed", "cancelled"
]
TITOEmission = Literal["completed", "ambiguous"]
TITOStatus = Literal["completed", "abandoned", "failed"]
TITOPromptDisposition = Literal["append", "realign", "new_segment"]
TITOPromptMode = Literal["full_history", "incremental"]
"""The way of making prompts: render all messages and compare the tokens with those so far, or
render only the new messages and append them to those."""
TITOMalformedAnswers = Literal["content", "discard"]
"""What becomes of an answer that the renderer can't parse: a message of its text, whose tokens are
trained on like others; or an error (422) after which the trajectory is discarded."""


@dataclass(frozen=True)
class TrajectoryDriftPolicy:
    """Decides what happens when a rendered prompt does not continue the tokens of a segment.

    Attributes:
        max_masked_tokens: a drift that starts inside the last answer is realigned while fewer than
            this many tokens, from that answer on, would lose their place in the loss.
        on_other_mismatch: every other drift starts a "new_segment", or is a "reject" (409).
    """

    max_masked_tokens: int = 1024
    on_other_mismatch: Literal["new_segment", "reject"] = "new_segment"

    def __post_init__(self) -> None:
        integer("max_masked_tokens", self.max_masked_tokens, 0)
        one_of("on_other_mismatch", self.on_other_mismatch, ("new_segment", "reject"))


@dataclass(frozen=True)
class TITOTrajectoryEndpoint:
    """Holds the address and the key with which the agent of one trajectory reaches its model.

    Attributes:
        trajectory_id: the id, for `finish_trajectory`.
        openai_base_url: `base_url` for an OpenAI client.
        api_key: the client's key; it opens this trajectory alone.
    """

    trajectory_id: str
    openai_base_url: str
    api_key: str

    def __repr__(self) -> str:
        return f"TITOTrajectoryEndpoint({self.trajectory_id!r}, {self.openai_base_url!r}, ...)"


@dataclass(frozen=True)
class TITOResponseAttempt:
    """Records one attempt to send a turn's answer to the agent.

    Attributes:
        emission: "completed" if the whole answer was written, "ambiguous" if the agent left before.
        created_at: Unix time.
    """

    attempt_id: str
    turn_id: str
    emission: TITOEmission
    created_at: float


@dataclass(frozen=True)
class TITOCallRecord:
    """Records one call of the agent, also one that made no turn.

    Attributes:
        kind: "policy", or "auxiliary": answered, and not part of the trajectory.
        classification_source: what chose the kind, such as "default" or "adapter".
        outcome: "replayed" is a repeated call that got its first answer again.
        started_at, ended_at: Unix times.
        request_fingerprint, prepared_prompt_hash: SHA-256; None if the call ended before them.
        turn_id: the turn that it made or repeated.
        logical_request_id, upstream_response_id: ids of the sampling.
        attempts, server_attempts: HTTP attempts of the sampling.
        error_code: code of its `TITOError`.
    """

    call_id: str
    kind: TITOCallKind
    classification_source: str
    outcome: TITOCallOutcome
    started_at: float
    ended_at: float
    request_fingerprint: str | None = None
    prepared_prompt_hash: str | None = None
    turn_id: str | None = None
    logical_request_id: str | None = None
    upstream_response_id: str | None = None
    attempts: int = 0
    server_attempts: tuple[SampledServerAttempt, ...] = ()
    error_code: str | None = None


@dataclass(frozen=True)
class TITOCallResult:
    """Holds the answer to a call and its record.

    Attributes:
        response: OpenAI's chat completion.
        call: the call's record.
        turn_id: id of the turn; None for an auxiliary call.
        replayed: whether it is the answer of an earlier call.
    """

    response: Mapping[str, Any]
    call: TITOCallRecord
    turn_id: str | None
    replayed: bool = False


@dataclass(frozen=True)
class TITOTurn:
    """Records one answer of the policy, in the engine's own tokens.

    Attributes:
        exact_prompt_ids, exact_completion_ids: token ids, unchanged since they were sent and
            sampled.
        inference_logprobs: natural logprobs of the raw model, one a completion token.
        sampling_logprobs: natural logprobs of the distribution sampled from; None entries where not
            reported.
        prompt_disposition: how the prompt follows the turn before: "append" (it begins with all of
            its tokens), "realign" (the last answer was rendered otherwise, and is masked) or
            "new_segment".
        prefix_match_tokens: tokens that both share; None for a trajectory's first turn.
        realign_from_token: first token of the segment that is written anew.
        realigned_masked_tokens: tokens from there on that carry no loss.
        requested_output_tokens, effective_output_tokens: tokens asked for, and allowed by the
            limits.
        context_remaining_tokens: room that the prompt left.
        sampler_wall_seconds: duration of the sampling, its waits included.
        prompt_mode: how this prompt was made; with "incremental", `incremental_*` describe how it
            was joined, and `incremental_fallback_reason` why it was not.
        parser_fallback: whether the renderer could not parse the output and took it as plain text.
        inference_topk_token_ids, inference_topk_logprobs: one row per completion token, where
            `top_logprobs` was asked for.

    The other SDK fills `routing_matrices`, `prompt_routing_*`, `top_sampling_references` and
    `sampling_mask_references` for router replay and shared stores. Here they are None; an artifact
    of the other SDK keeps what they hold.
    """

    turn_id: str
    request: TITOChatRequest
    assistant: TITOParsedAssistant
    exact_prompt_ids: tuple[int, ...]
    exact_completion_ids: tuple[int, ...]
    inference_logprobs: tuple[float, ...] | None
    sampling_logprobs: tuple[float | None, ...] | None
    routing_matrices: Any
    response_id: str
    finish_reason: str
    prompt_disposition: TITOPromptDisposition
    prefix_match_tokens: int | None
    realign_from_token: int | None
    realigned_masked_tokens: int
    requested_output_tokens: int
    effective_output_tokens: int
    context_remaining_tokens: int
    server_metrics: ServerMetrics | None
    sampler_wall_seconds: float
    logical_request_id: str
    upstream_response_id: str | None
    upstream_attempts: int
    prompt_routing_start: Any = None
    prompt_routing_matrices: Any = None
    prompt_mode: TITOPromptMode = "full_history"
    incremental_contract_id: str | None = None
    incremental_junction_kind: str | None = None
    incremental_checkpoint_trim_tokens: int = 0
    incremental_fallback_reason: str | None = None
    server_attempts: tuple[SampledServerAttempt, ...] = ()
    parser_fallback: bool = False
    inference_topk_token_ids: tuple[tuple[int, ...], ...] | None = None
    inference_topk_logprobs: tuple[tuple[float, ...], ...] | None = None
    top_sampling_references: Any = None
    sampling_mask_references: Any = None

    @property
    def exact_checkpoint_ids(self) -> tuple[int, ...]:
        """All tokens to the end of the answer; a next prompt that begins with them is an append."""
        return self.exact_prompt_ids + self.exact_completion_ids


@dataclass(frozen=True)
class TITOSegmentResult:
    """Holds the turns that share one row of tokens.

    Attributes:
        start_reason: "initial", or why the segment before could not go on.
        render_contract_id: the renderer's name for its way of rendering these prompts.
        turns: at least one, in order.
        closed_reason: why it ended.
    """

    segment_id: str
    start_reason: str
    render_contract_id: str
    turns: tuple[TITOTurn, ...]
    closed_reason: str | None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The row of N token ids: the last turn's prompt and answer."""
        return self.turns[-1].exact_checkpoint_ids

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        """N entries: whether the policy sampled the token after exactly the tokens before it in the
        row. Answers that were realigned are masked."""
        return tuple(source is not None for source in self._sources())

    @property
    def logprobs(self) -> tuple[float, ...]:
        """N entries: natural logprobs of the raw model, 0 where the mask is false.

        Raises:
            InvalidArgument: the deployment reported no logprobs.
        """
        return tuple(0.0 if source is None else _logprob(*source) for source in self._sources())

    def _sources(self) -> list[tuple[TITOTurn, int] | None]:
        """Find for each token of the row the turn that sampled it, and its place there."""
        row: list[tuple[TITOTurn, int] | None] = []
        for turn in self.turns:
            kept = turn.realign_from_token
            kept = turn.prefix_match_tokens if kept is None else kept
            del row[kept or 0 :]
            row += [None] * (len(turn.exact_prompt_ids) - len(row))
            row += [(turn, place) for place in range(len(turn.exact_completion_ids))]
        return row


def _logprob(turn: TITOTurn, place: int) -> float:
    if turn.inference_logprobs is None:
        raise InvalidArgument(f"turn {turn.turn_id} has no logprobs: the deployment reported none")
    return turn.inference_logprobs[place]


@dataclass(frozen=True)
class TITOTrajectoryArtifact:
    """Holds a trajectory that has ended: the token rows to train on, and how they came to be.

    Attributes:
        serving_affinity_key_hash: SHA-256 of the key that kept its calls on one replica.
        metadata: the JSON that was passed to `create_trajectory`.
        status, terminal_reason: how it ended, and why if it was not completed.
        segments: rows of tokens, in order; they share one reward.
        calls, response_attempts: all calls and all attempts to send an answer, in order.
        started_at, finished_at: Unix times.
    """

    trajectory_id: str
    serving_affinity_key_hash: str
    metadata: Mapping[str, Any]
    status: TITOStatus
    terminal_reason: str | None
    segments: tuple[TITOSegmentResult, ...]
    calls: tuple[TITOCallRecord, ...]
    response_attempts: tuple[TITOResponseAttempt, ...]
    metrics: TITOMetricSummary
    started_at: float
    finished_at: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def pack(self) -> bytes:
        """Write the artifact as bytes, for a file; `unpack` gives an equal artifact."""
        return packed(self)

    @classmethod
    def unpack(cls, payload: bytes) -> TITOTrajectoryArtifact:
        """Read the artifact from packed bytes.

        Raises:
            TITOError: the bytes are no artifact, or of another version ("tito_artifact_invalid").
        """
        return unpacked(payload, cls)
