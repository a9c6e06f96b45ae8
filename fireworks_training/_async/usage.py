"""What a run uses: tokens as they are used, trainers and replicas for as long as they are held.

Told what happened, and when; knows no loop, no file and no price. Counts may come from several
threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from fireworks_training.errors import InvalidArgument

Held = Literal["trainer", "replica"]
RunState = Literal["closed", "running", "lost"]


PRICES = ("trained", "forward", "prefilled", "cached", "sampled", "trainer_hour", "replica_hour")
"""What a price table may hold: money for a million tokens, or for an hour of one of them."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run has used, as its client counted it.

    Attributes:
        trained_tokens: positions of datums in passes with gradients that came back.
        forward_tokens: in passes without; the forward of a custom loss included.
        prefilled_tokens: of prompts that the server had not cached.
        cached_tokens: of prompts that it had.
        sampled_tokens: of completions.
        trainer_seconds, replica_seconds: for which trainers and replicas of the deployment were
            this run's, from ready to close.
    """

    trained_tokens: int = 0
    forward_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    trainer_seconds: float = 0.0
    replica_seconds: float = 0.0

    def cost(self, prices: Mapping[str, float]) -> float:
        """Money for it, in the currency of the price table.

        Args:
            prices: for a million tokens "trained", "forward", "prefilled", "cached", "sampled"; for
                an hour "trainer_hour", "replica_hour". What is absent is free.

        Raises:
            InvalidArgument: the table has another name, or a price that is no number from 0.
        """
        # It comes from a user's file: its types are hopes.
        for name, price in cast(Mapping[str, object], prices).items():
            if name not in PRICES:
                known = ", ".join(PRICES)
                raise InvalidArgument(f"no price is called {name!r}; these are: {known}")
            number = isinstance(price, int | float) and not isinstance(price, bool)
            if not (number and cast(float, price) >= 0):
                raise InvalidArgument(f"the price {name!r} must be a number from 0, not {price!r}")
        units = {
            "trained": self.trained_tokens / 1e6,
            "forward": self.forward_tokens / 1e6,
            "prefilled": self.prefilled_tokens / 1e6,
            "cached": self.cached_tokens / 1e6,
            "sampled": self.sampled_tokens / 1e6,
            "trainer_hour": self.trainer_seconds / 3600,
            "replica_hour": self.replica_seconds / 3600,
        }
        return sum(units[name] * price for name, price in prices.items())


@dataclass(frozen=True, slots=True)
class RunUsage:
    """What a run has used.

    Attributes:
        run: its name, that of the program.
        run_id: its id, also the mark on what it made.
        ended: RFC 3339: when its service was closed, or when it last said what it had used.
        base_url: its platform.
        base_model: its model.
        usage: the counts.
        state: "closed", "running", or "lost": its process ended without closing the service, and
            the counts are those of at most a few seconds before.
    """

    run: str
    run_id: str
    ended: str
    base_url: str
    base_model: str
    usage: Usage
    state: RunState = "closed"


class UsageMeter:
    """The counters of one connection pool.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._trained = self._forward = 0
        self._prefilled = self._cached = self._sampled = 0
        self._seconds: dict[Held, float] = {"trainer": 0.0, "replica": 0.0}  # of what was released
        self._held: list[tuple[Held, int, float]] = []

    def passed(self, tokens: int, *, trained: bool) -> None:
        """A pass over so many tokens came back; `trained`: with gradients."""
        with self._lock:
            if trained:
                self._trained += tokens
            else:
                self._forward += tokens

    def sampled(self, prompt: int | None, cached: int | None, completion: int | None) -> None:
        """A completion came back; what a server does not say counts as none."""
        known = min(cached or 0, prompt or 0)
        with self._lock:
            self._prefilled += (prompt or 0) - known
            self._cached += known
            self._sampled += completion or 0

    def hold(self, kind: Held, count: int) -> None:
        """So many of a kind are held from now on."""
        with self._lock:
            self._held.append((kind, count, self._clock()))

    def release(self) -> None:
        """Nothing is held any more."""
        with self._lock:
            self._seconds = self._held_seconds()
            self._held.clear()

    def read(self) -> Usage:
        """What was used so far, with what is held up to now."""
        with self._lock:
            held = self._held_seconds()
            return Usage(
                trained_tokens=self._trained,
                forward_tokens=self._forward,
                prefilled_tokens=self._prefilled,
                cached_tokens=self._cached,
                sampled_tokens=self._sampled,
                trainer_seconds=held["trainer"],
                replica_seconds=held["replica"],
            )

    def _held_seconds(self) -> dict[Held, float]:
        now, seconds = self._clock(), dict(self._seconds)
        for kind, count, since in self._held:
            seconds[kind] += count * (now - since)
        return seconds
