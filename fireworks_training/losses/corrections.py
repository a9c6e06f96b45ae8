"""Which correction a policy loss makes where its sampler and its trainer disagree.

Rows then carry two logprobs of each token: `logprobs`, as it was sampled, and `old_logprobs`, as
the trainer computed them with the same weights (a `forward` before the step).
w = exp(old - sampled).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fireworks_training._checks import number, one_of
from fireworks_training.errors import InvalidArgument

CorrectionName = Literal["tis", "icepop", "sequence_mask", "geometric", "decoupled"]


@dataclass(frozen=True, slots=True)
class Correction:
    """A kind of weight and its bounds.

    Attributes:
        kind: "tis": min(w, high) a token. "icepop": w where low <= w <= high, else 0.
            "sequence_mask": the row's product W where low <= W <= high, else 0. "geometric": 1
            where the row's geometric mean of w is within the bounds, else 0. "decoupled": w.
        low, high: bounds of the weight itself.
    """

    kind: CorrectionName
    low: float = 0.0
    high: float = 1e300

    def __post_init__(self) -> None:
        """Refuse an unknown kind, and bounds that keep nothing."""
        one_of("correction", self.kind, tuple(_DEFAULTS))
        number("low", self.low, 0.0)
        number("high", self.high, 0.0)
        if self.high <= self.low:
            raise InvalidArgument(f"bounds {self.low:g} to {self.high:g} keep no weight")


def tis(cap: float = 2.0) -> Correction:
    """Truncated importance sampling: a token's weight is at most `cap` (arXiv:1606.02647)."""
    return Correction("tis", high=cap)


def icepop(low: float = 0.5, high: float = 5.0) -> Correction:
    """Drop tokens whose weight is out of bounds, weigh the others (arXiv:2510.18855)."""
    return Correction("icepop", low, high)


def sequence_mask(low: float = 0.0, high: float = 3.0) -> Correction:
    """Drop rows whose product of weights is out of bounds, weigh the others by it.

    The product grows with the length: at a gap of 0.012 a token, 100 tokens reach 3.3.
    """
    return Correction("sequence_mask", low, high)


def geometric(low: float = 0.99, high: float = 1.01) -> Correction:
    """Drop rows whose geometric mean of the weights is out of bounds; leave the others alone."""
    return Correction("geometric", low, high)


def decoupled() -> Correction:
    """Weigh each token by w, unbounded: decoupled PPO (arXiv:2110.00641)."""
    return Correction("decoupled")


_DEFAULTS: dict[str, Callable[[], Correction]] = {
    "tis": tis,
    "icepop": icepop,
    "sequence_mask": sequence_mask,
    "geometric": geometric,
    "decoupled": decoupled,
}


def correction_of(value: Correction | CorrectionName | None) -> Correction | None:
    """Take a correction, or the name of one for its default bounds.

    Raises:
        InvalidArgument: none has that name.
    """
    if value is None or isinstance(value, Correction):
        return value
    one_of("correction", value, tuple(_DEFAULTS))
    return _DEFAULTS[value]()
