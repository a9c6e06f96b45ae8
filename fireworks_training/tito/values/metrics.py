"""Sums up counters and distributions of a trajectory; distributions of several can be merged.

It knows how values are added; the modules in which things happen decide what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class TITODistribution:
    """Holds count, sum and range of a measured value.

    Attributes:
        count: number of values.
        sum: their sum.
        min, max: the smallest and the largest; None where there is no value.
    """

    count: int = 0
    sum: float = 0.0
    min: float | None = None
    max: float | None = None

    def add(self, value: float) -> TITODistribution:
        """Give the distribution with one more value."""
        return self.merge(TITODistribution(1, value, value, value))

    def merge(self, other: TITODistribution) -> TITODistribution:
        """Give the distribution of the values of both."""
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
    """Holds the counters and measured values of a trajectory; it can't change.

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
        """Give plain numbers for a metrics logger, each name under `root/`."""
        flat = {f"{root}/{name}": float(value) for name, value in self.counters.items()}
        for name, values in self.distributions.items():
            flat[f"{root}/{name}_count"] = float(values.count)
            flat[f"{root}/{name}_sum"] = values.sum
            if values.min is not None and values.max is not None:
                flat[f"{root}/{name}_mean"] = values.sum / values.count
                flat[f"{root}/{name}_min"] = float(values.min)
                flat[f"{root}/{name}_max"] = float(values.max)
        return flat


class RunningMetrics:
    """Collects counters and distributions while a trajectory goes on."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._distributions: dict[str, TITODistribution] = {}

    def count(self, name: str, by: int = 1) -> None:
        """Add one, or `by`, to a counter."""
        self._counters[name] = self._counters.get(name, 0) + by

    def observe(self, name: str, value: float) -> None:
        """Add a value to a distribution."""
        known = self._distributions.get(name, TITODistribution())
        self._distributions[name] = known.add(float(value))

    def summary(self) -> TITOMetricSummary:
        """Give all values as they are now."""
        return TITOMetricSummary(self._counters, self._distributions)

    def copy(self) -> RunningMetrics:
        """Make a copy that goes on independently."""
        made = RunningMetrics()
        made._counters = dict(self._counters)
        made._distributions = dict(self._distributions)
        return made
