"""The usage of a run: counts of tokens and seconds, and their cost by a table of prices.

Knows names, units and sums; counting is `_async.runtime.usage_meter`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from fireworks_training.errors import InvalidArgument

RunState = Literal["closed", "running", "lost"]
"""Names how far a run has come; see `RunUsage`."""

PRICES = ("trained", "forward", "prefilled", "cached", "sampled", "trainer_hour", "replica_hour")
"""Lists the names of a price table: money for a million tokens, or for an hour of a machine."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts the tokens and seconds that a run has used, as its client saw them.

    Attributes:
        trained_tokens: positions of datums in finished passes with gradients.
        forward_tokens: positions in passes without; the forward of a custom loss included.
        prefilled_tokens: prompt tokens that the server had not cached.
        cached_tokens: prompt tokens that it had.
        sampled_tokens: tokens of completions.
        trainer_seconds, replica_seconds: seconds for which trainers, and replicas of the
            deployment, were this run's, from ready to close.
    """

    trained_tokens: int = 0
    forward_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0
    trainer_seconds: float = 0.0
    replica_seconds: float = 0.0

    def cost(self, prices: Mapping[str, float]) -> float:
        """Compute the money for it, in the currency of the price table.

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
    """Records the usage of one run.

    Attributes:
        run: name of the run: that of the program.
        run_id: id of the run, which also marks the resources that it made.
        ended: RFC 3339 time at which its service was closed, or its usage was last written.
        base_url: URL of its platform.
        base_model: full resource name of its model.
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
