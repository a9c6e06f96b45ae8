"""Decides how a prompt follows the tokens so far: it continues them, realigns, or starts a segment.

It compares messages and token ids, and neither renders nor samples. All decisions serve one rule: a
token carries loss only if the policy sampled it after exactly the tokens before it in its row.
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
    """Holds the decision about a prompt; the fields are those of `TITOTurn`.

    Attributes:
        reason: why a new segment starts; None if none does.
    """

    disposition: TITOPromptDisposition
    prefix_match_tokens: int | None = None
    realign_from_token: int | None = None
    realigned_masked_tokens: int = 0
    reason: str | None = None


def history_of(turn: TITOTurn) -> tuple[Mapping[str, Any], ...]:
    """Give the conversation up to the end of a turn's answer."""
    return (*turn.request.messages, turn.assistant.message)


def break_reason(
    last: TITOTurn, contract: str, new_contract: str, messages: Sequence[Mapping[str, Any]]
) -> str | None:
    """Find why messages do not continue a conversation; None if they do."""
    if contract != new_contract:
        return "contract_change"
    stored = history_of(last)
    return None if tuple(messages[: len(stored)]) == stored else "history_rewrite"


def rewrite_kind(last: TITOTurn, messages: Sequence[Mapping[str, Any]]) -> str:
    """Find where an edited history first differs, for the metrics."""
    stored = history_of(last)
    for place, (was, now) in enumerate(zip(stored, messages, strict=False)):
        if was != now:
            return "assistant_roundtrip" if place == len(stored) - 1 else "prior_context"
    return "truncated"


def new_segment(
    reason: str, policy: TrajectoryDriftPolicy, matched: int | None = None
) -> Placement:
    """Start a new segment, where the policy allows one.

    Raises:
        TITOError: the policy rejects it (409).
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


def place_rendered(
    last: TITOTurn, prompt: Sequence[int], policy: TrajectoryDriftPolicy
) -> Placement:
    """Decide about a prompt that was rendered from all messages, which continue the last turn.

    Raises:
        TITOError: the prompt drifts, and the policy rejects that (409).
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
    return new_segment("token_drift", policy, matched)


def place_joined(last: TITOTurn, prompt: TITOIncrementalPrompt) -> Placement:
    """Decide about a prompt that a renderer appended to the exact tokens.

    Raises:
        TITOError: it does not begin with them, apart from the tokens reported as trimmed (500).
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
    """Count the entries that two sequences share from their beginning."""
    shared = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        shared += 1
    return shared
