"""Holds what rollouts return: rows of tokens with logprobs, loss masks, snapshots and a reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fireworks_training.errors import InvalidArgument
from fireworks_training.models import SampledCompletion
from fireworks_training.tito.values.records import TITOSegmentResult, TITOTrajectoryArtifact

if TYPE_CHECKING:
    import tinker


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One row of N tokens to train on.

    Attributes:
        tokens: N token ids, prompts and completions.
        logprobs: N natural logprobs of the raw model; 0 where the mask is false.
        loss_mask: N entries: whether the policy sampled the token.
        snapshots: N identities of the snapshots that sampled them; None where the mask is false or
            the server reported none.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]
    loss_mask: Sequence[bool]
    snapshots: Sequence[str | None]

    def __post_init__(self) -> None:
        lengths = {len(self.logprobs), len(self.loss_mask), len(self.snapshots)}
        if lengths != {len(self.tokens)}:
            raise InvalidArgument(
                f"a row of {len(self.tokens)} tokens has {len(self.logprobs)} logprobs, "
                f"{len(self.loss_mask)} mask entries and {len(self.snapshots)} snapshots: one a "
                "token is needed"
            )

    @property
    def sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum(self.loss_mask)

    def datum(self, advantage: float, *, mask: bool = False) -> tinker.Datum:
        """Build the datum for importance_sampling, ppo and their like.

        Args:
            advantage: of every sampled token.
            mask: whether to add a `mask` for losses that need one; as for `rollout_datum`.

        Raises:
            InvalidDatum: a logprob is over 0 or not finite, or fewer than two tokens.
        """
        from fireworks_training.data import rollout_datum

        return rollout_datum(
            self.tokens,
            logprobs=self.logprobs,
            loss_mask=self.loss_mask,
            advantages=advantage,
            mask=mask,
        )


@dataclass(frozen=True, slots=True)
class Episode:
    """What one rollout returned.

    Attributes:
        rows: rows of tokens; they share the reward.
        reward: None until the pool's reward functions have run, if the rollout set none.
        text: of the last completion; for reward functions.
        metrics: the rollout's own figures.
        artifacts: what it was made from: completions, or trajectories of the agents' endpoint.
    """

    rows: Sequence[TokenRow]
    reward: float | None = None
    text: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    artifacts: Sequence[Any] = field(default=(), repr=False)

    @property
    def sampled(self) -> int:
        """Tokens that the policy sampled, in all rows."""
        return sum(row.sampled for row in self.rows)

    def rewarded(self, reward: object) -> Episode:
        """Return the episode with a reward.

        Raises:
            InvalidArgument: it is no finite number.
        """
        if isinstance(reward, (int, float)) and math.isfinite(reward):
            return replace(self, reward=float(reward))
        said = reward if isinstance(reward, float) else type(reward).__name__
        raise InvalidArgument(f"the reward is {said}: return a finite number")

    @classmethod
    def of(
        cls,
        source: object,
        reward: float | None = None,
        *,
        snapshots: Mapping[str, SampledCompletion] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Episode:
        """Make an episode from completions, or trajectories of the agents' endpoint.

        Args:
            source: a `SampledCompletion` (with logprobs), a `TITOTrajectoryArtifact`, a list of
                them, each completion a row of its own, or an `Episode`.
            reward: as the class has it.
            snapshots: completions by the response id of a trajectory's turn, for its snapshots.
            metrics: as the class has it.

        Raises:
            InvalidArgument: it is something else, or there are no tokens or no logprobs.
        """
        if isinstance(source, Episode):
            episode = source
        else:
            parts: Sequence[object] = source if isinstance(source, (list, tuple)) else [source]
            rows = [row for part in parts for row in _rows(part, snapshots or {})]
            if not any(row.sampled for row in rows):
                raise InvalidArgument("the rollout returned no sampled token: return what it drew")
            episode = cls(rows, None, _text(parts[-1]), artifacts=tuple(parts))
        if metrics is not None:
            episode = replace(episode, metrics=dict(metrics))
        return episode if reward is None else episode.rewarded(reward)


def episode_of(returned: object, snapshots: Mapping[str, SampledCompletion]) -> Episode:
    """Make an episode from whatever a rollout returned: also `(source, reward)`."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], (int, float)):
        return Episode.of(returned[0], snapshots=snapshots).rewarded(returned[1])
    return Episode.of(returned, snapshots=snapshots)


def _rows(part: object, snapshots: Mapping[str, SampledCompletion]) -> list[TokenRow]:
    if isinstance(part, SampledCompletion):
        return [_completion_row(part)]
    if isinstance(part, TITOTrajectoryArtifact):
        return [_segment_row(segment, snapshots) for segment in part.segments]
    raise InvalidArgument(
        f"the rollout returned {type(part).__name__}: return an Episode, a SampledCompletion, a "
        "TITOTrajectoryArtifact, a list of them, or (one of those, reward)"
    )


def _completion_row(completion: SampledCompletion) -> TokenRow:
    if completion.inference_logprobs is None:
        raise InvalidArgument("the completion has no logprobs: sample with logprobs=True")
    count, prompt = completion.completion_len, completion.prompt_len
    logprobs = list(completion.inference_logprobs)[completion.echoed_prompt_logprob_count :]
    return TokenRow(
        completion.full_tokens,
        [0.0] * prompt + logprobs,
        [False] * prompt + [True] * count,
        [None] * prompt + snapshots_of(completion),
    )


def _segment_row(
    segment: TITOSegmentResult, snapshots: Mapping[str, SampledCompletion]
) -> TokenRow:
    mask, tokens = segment.loss_mask, segment.tokens
    row: list[str | None] = [None] * len(tokens)
    for turn in segment.turns:
        if (completion := snapshots.get(turn_key(turn.exact_prompt_ids, turn))) is None:
            continue
        start = len(turn.exact_prompt_ids)
        for place, identity in enumerate(snapshots_of(completion), start):
            if place < len(row) and mask[place]:
                row[place] = identity
    return TokenRow(tokens, segment.logprobs, mask, row)


def turn_key(prompt: Sequence[int], drawn: Any) -> str:
    """Compute the key of a call in one trajectory: its prompt and what was drawn, as a digest."""
    import hashlib

    completion = getattr(drawn, "exact_completion_ids", None)
    ids = drawn.completion_tokens if completion is None else completion
    return hashlib.sha256(repr((list(prompt), list(ids))).encode()).hexdigest()


def snapshots_of(completion: SampledCompletion) -> list[str | None]:
    """The snapshot of each completion token; None where the server reported none."""
    count, last = completion.completion_len, completion.snapshot_identity
    switch = completion.snapshot_switch_index
    if switch is None:
        return [last] * count
    return [completion.snapshot_identity_first] * switch + [last] * (count - switch)


def _text(part: object) -> str:
    if isinstance(part, SampledCompletion):
        return part.text
    if isinstance(part, TITOTrajectoryArtifact) and part.segments:
        content = part.segments[-1].turns[-1].assistant.message.get("content")
        return content if isinstance(content, str) else ""
    return ""
