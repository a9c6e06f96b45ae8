"""Counts the tokens of a run, so that every sampled token is in exactly one account."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TokenEnd = Literal["filtered", "failed"]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens that the policy sampled, by what became of them.

    Attributes:
        sampled: all of them.
        trained: in episodes of batches that were handed out.
        unreturned: sampled by rollouts that were trained, but in none of their episodes.
        filtered: of groups that were filtered.
        failed: of rollouts and groups that failed or timed out, repeated attempts included.
        unused: of groups that were done, or under way, when the pool was closed.
        waiting: of groups that are done and in no batch yet.
        in_flight: of groups that are under way.
    """

    sampled: int = 0
    trained: int = 0
    unreturned: int = 0
    filtered: int = 0
    failed: int = 0
    unused: int = 0
    waiting: int = 0
    in_flight: int = 0

    @property
    def closes(self) -> bool:
        """Whether every sampled token is in one account."""
        ended = self.trained + self.unreturned + self.filtered + self.failed + self.unused
        return self.sampled == ended + self.waiting + self.in_flight


@dataclass(slots=True)
class TokenLedger:
    """Keeps the accounts; `sampled` is counted apart from the rest, so that a loss shows."""

    sampled: int = 0
    trained: int = 0
    unreturned: int = 0
    filtered: int = 0
    failed: int = 0
    unused: int = 0
    _under_way: dict[int, int] = field(default_factory=dict[int, int])
    _waiting: dict[int, int] = field(default_factory=dict[int, int])

    def sample(self, group: int, tokens: int) -> None:
        """Note tokens that a rollout of a group sampled."""
        self.sampled += tokens
        self._under_way[group] = self._under_way.get(group, 0) + tokens

    def lose(self, group: int, tokens: int) -> None:
        """Note that an attempt of a rollout ended without an episode."""
        self._under_way[group] = self._under_way.get(group, 0) - tokens
        self.failed += tokens

    def done(self, group: int, in_episodes: int) -> None:
        """Note that a group may be trained, with this many of its tokens in episodes."""
        self.unreturned += self._under_way.pop(group, 0) - in_episodes
        self._waiting[group] = in_episodes

    def untrained(self, group: int, end: TokenEnd) -> None:
        """Note that a group ended otherwise."""
        tokens = self._under_way.pop(group, 0)
        if end == "filtered":
            self.filtered += tokens
        else:
            self.failed += tokens

    def handed_out(self, group: int) -> None:
        """Note that a group is in a batch that the caller got."""
        self.trained += self._waiting.pop(group, 0)

    def close(self) -> None:
        """Note that the run is over: what is left is trained by nobody."""
        self.unused += sum(self._waiting.values()) + sum(self._under_way.values())
        self._waiting.clear()
        self._under_way.clear()

    def counts(self) -> TokenCounts:
        """The accounts as they are now."""
        return TokenCounts(
            sampled=self.sampled,
            trained=self.trained,
            unreturned=self.unreturned,
            filtered=self.filtered,
            failed=self.failed,
            unused=self.unused,
            waiting=sum(self._waiting.values()),
            in_flight=sum(self._under_way.values()),
        )
