"""Where a prompt stands to the tokens so far: it continues them, realigns, or starts anew.

Decisions only: it compares messages and token ids, and neither renders nor samples. The rule that
all of it serves: a token carries loss only if the policy sampled it after exactly the tokens that
stand before it in its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fireworks_training.tito.rendering.renderers import TITOIncrementalPrompt
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.records import (
    TITOPromptDisposition,
    TITOTurn,
    TrajectoryDriftPolicy,
)


@dataclass(frozen=True, slots=True)
class Placement:
    """What a prompt is to its segment.

    Attributes:
        reason: why a new segment starts; None if none does.
    """

    disposition: TITOPromptDisposition
    prefix_match_tokens: int | None = None
    realign_from_token: int | None = None
    realigned_masked_tokens: int = 0
    reason: str | None = None


def history_of(turn: TITOTurn) -> tuple[Mapping[str, Any], ...]:
    """The conversation up to the end of a turn's answer."""
    return (*turn.request.messages, turn.assistant.message)


def break_reason(
    last: TITOTurn, contract: str, new_contract: str, messages: Sequence[Mapping[str, Any]]
) -> str | None:
    """Why messages do not continue a conversation, or None if they do."""
    if contract != new_contract:
        return "contract_change"
    stored = history_of(last)
    return None if tuple(messages[: len(stored)]) == stored else "history_rewrite"


def rewrite_kind(last: TITOTurn, messages: Sequence[Mapping[str, Any]]) -> str:
    """Where an edited history first differs, for the metrics."""
    stored = history_of(last)
    for place, (was, now) in enumerate(zip(stored, messages, strict=False)):
        if was != now:
            return "assistant_roundtrip" if place == len(stored) - 1 else "prior_context"
    return "truncated"


def fresh(reason: str, policy: TrajectoryDriftPolicy, matched: int | None = None) -> Placement:
    """A new segment, where the policy allows one.

    Raises:
        TITOError: it does not (409).
    """
    if policy.on_other_mismatch == "reject":
        raise TITOError(
            "tito_lineage_divergence",
            409,
            f"the request does not continue the trajectory ({reason}), and its drift policy "
            "rejects that: send the history as it was, or allow 'new_segment'",
            context={"reason": reason},
        )
    return Placement("new_segment", matched, reason=reason)


def placed(last: TITOTurn, prompt: Sequence[int], policy: TrajectoryDriftPolicy) -> Placement:
    """Where a prompt rendered from all messages stands, whose messages continue the last turn.

    Raises:
        TITOError: it drifts, and the policy rejects that (409).
    """
    checkpoint = last.exact_checkpoint_ids
    matched = common_prefix(checkpoint, prompt)
    if matched == len(checkpoint):
        return Placement("append", matched)
    # Inside the last answer: text that tokenizes otherwise, reasoning that the template drops.
    answer_at = len(last.exact_prompt_ids)
    masked = len(prompt) - answer_at
    if answer_at <= matched and masked < policy.max_masked_tokens:
        return Placement("realign", matched, answer_at, masked)
    return fresh("token_drift", policy, matched)


def joined(last: TITOTurn, prompt: TITOIncrementalPrompt) -> Placement:
    """Where a prompt that a renderer put behind the exact tokens stands.

    Raises:
        TITOError: it does not begin with them, but for what it says it trimmed (500).
    """
    checkpoint = last.exact_checkpoint_ids
    kept = len(checkpoint) - prompt.checkpoint_trim_tokens
    if kept < len(last.exact_prompt_ids) or prompt.prompt_ids[:kept] != checkpoint[:kept]:
        raise TITOError(
            "tito_renderer_contract_error",
            500,
            "the renderer's incremental prompt does not begin with the exact tokens so far, or "
            "trims more than the last answer: use prompt_mode='full_history' with it",
        )
    return Placement("append", kept)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many entries two sequences share from their beginning."""
    shared = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        shared += 1
    return shared
