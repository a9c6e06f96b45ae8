"""Decides what a failed rollout means for its group, and when failures end a run; without I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from fireworks_training._checks import integer, number, one_of
from fireworks_training.errors import FireworksTrainingError, InvalidArgument

LostMember = Literal["retry", "shrink", "drop"]
Verdict = Literal["again", "lose_member", "lose_group"]


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What happens when a rollout fails.

    Attributes:
        lost_member: "retry" repeats a rollout after a transient fault, up to `retries` times, and
            then the group fails; "shrink" repeats it likewise, and then trains the group without
            it; "drop" fails the group at once.
        retries: repetitions of a rollout at most, after its first attempt.
        min_group_size: the fewest rollouts that a group may shrink to.
        breaker_in_a_row: groups that fail one after another until the run ends.
        breaker_share: share of the last `breaker_window` groups that fail until the run ends.
        breaker_window: groups that the share is counted over; fewer never end a run by it.
    """

    lost_member: LostMember = "retry"
    retries: int = 2
    min_group_size: int = 1
    breaker_in_a_row: int = 8
    breaker_share: float = 0.5
    breaker_window: int = 20

    def __post_init__(self) -> None:
        one_of("lost_member", self.lost_member, ("retry", "shrink", "drop"))
        integer("retries", self.retries, 0)
        integer("min_group_size", self.min_group_size, 1)
        integer("breaker_in_a_row", self.breaker_in_a_row, 1)
        integer("breaker_window", self.breaker_window, 1)
        number("breaker_share", self.breaker_share, 0, 1)
        if self.breaker_share == 0:
            raise InvalidArgument("'breaker_share' is 0: every run would end; at most 1, above 0")

    def verdict(self, *, transient: bool, attempts: int, lost: int, group_size: int) -> Verdict:
        """Decide about a rollout that failed.

        Args:
            transient: whether the same rollout may succeed later.
            attempts: attempts of it, this one included.
            lost: members that the group has lost before.
            group_size: members that it started with.
        """
        if self.lost_member != "drop" and transient and attempts <= self.retries:
            return "again"
        left = group_size - lost - 1
        if self.lost_member == "shrink" and left >= self.min_group_size:
            return "lose_member"
        return "lose_group"


@dataclass(slots=True)
class Breaker:
    """Counts failed groups, and says when a run makes no sense any more."""

    policy: FailurePolicy
    _in_a_row: int = 0
    _last: deque[bool] = field(default_factory=deque[bool])

    def note(self, *, failed: bool) -> tuple[int, int] | None:
        """Note a group that ended.

        Returns:
            Failed and ended groups if the run is to end, else None.
        """
        self._in_a_row = self._in_a_row + 1 if failed else 0
        self._last.append(failed)
        if len(self._last) > self.policy.breaker_window:
            self._last.popleft()
        if self._in_a_row >= self.policy.breaker_in_a_row:
            return self._in_a_row, self._in_a_row
        count = sum(self._last)
        if len(self._last) < self.policy.breaker_window:
            return None
        if count >= self.policy.breaker_share * len(self._last):
            return count, len(self._last)
        return None


def is_transient(error: BaseException) -> bool:
    """Return whether the same rollout may succeed later: the error's own word, or a lost link."""
    if isinstance(error, FireworksTrainingError):
        return error.retryable or bool(getattr(error, "retry_budget_exhausted", False))
    return isinstance(error, (ConnectionError, TimeoutError))
