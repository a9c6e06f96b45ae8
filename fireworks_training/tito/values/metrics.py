"""Counters and distributions of a trajectory, mergeable over many of them.

It knows how values are summed up. What is counted stands where it happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class TITODistribution:
    """Count, sum and range of a value.

    Attributes:
        count: how many values.
        sum: of all of them.
        min, max: the extremes; None where there is no value.
    """

    count: int = 0
    sum: float = 0.0
    min: float | None = None
    max: float | None = None

    def add(self, value: float) -> TITODistribution:
        """With one more value."""
        return self.merge(TITODistribution(1, value, value, value))

    def merge(self, other: TITODistribution) -> TITODistribution:
        """The distribution of the values of both."""
        lows = [x for x in (self.min, other.min) if x is not None]
        highs = [x for x in (self.max, other.max) if x is not None]
        return TITODistribution(
            self.count + other.count,
            self.sum + other.sum,
            min(lows) if lows else None,
            max(highs) if highs else None,
        )


@dataclass(frozen=True)
class TITOMetricSummary:
    """What was counted and measured in a trajectory.

    Attributes:
        counters: by name, such as "calls/succeeded" or "lineage/realign".
        distributions: by name, such as "calls/sampler_wall_seconds".
    """

    counters: Mapping[str, int]
    distributions: Mapping[str, TITODistribution]

    def __post_init__(self) -> None:
        for name in ("counters", "distributions"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def flattened(self, root: str = "tito") -> dict[str, float]:
        """Plain numbers for a metrics logger, each name under `root/`."""
        flat = {f"{root}/{name}": float(value) for name, value in self.counters.items()}
        for name, values in self.distributions.items():
            flat[f"{root}/{name}_count"] = float(values.count)
            flat[f"{root}/{name}_sum"] = values.sum
            if values.min is not None and values.max is not None:
                flat[f"{root}/{name}_mean"] = values.sum / values.count
                flat[f"{root}/{name}_min"] = float(values.min)
                flat[f"{root}/{name}_max"] = float(values.max)
        return flat


class Measured:
    """Counters and distributions that grow."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._distributions: dict[str, TITODistribution] = {}

    def count(self, name: str, by: int = 1) -> None:
        """One more, or `by` more, of something."""
        self._counters[name] = self._counters.get(name, 0) + by

    def observe(self, name: str, value: float) -> None:
        """A value of something measured."""
        known = self._distributions.get(name, TITODistribution())
        self._distributions[name] = known.add(float(value))

    def summary(self) -> TITOMetricSummary:
        """All of it as it is now."""
        return TITOMetricSummary(self._counters, self._distributions)

    def copy(self) -> Measured:
        """One that grows on its own."""
        made = Measured()
        made._counters = dict(self._counters)
        made._distributions = dict(self._distributions)
        return made
