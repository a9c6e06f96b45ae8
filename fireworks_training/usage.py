"""What a run has used: its counts, and what they cost by a table of prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from fireworks_training.errors import InvalidArgument

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
