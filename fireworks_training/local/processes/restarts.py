"""Decides when a process that died is started again, and when the platform gives up on it.

A state machine without clock or process: it gets how long the process lived, and returns a delay.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_DELAY_S = 0.05
LAST_DELAY_S = 5.0


@dataclass(slots=True)
class RestartPolicy:
    """Waits longer after each quick death; gives up after `max_quick_deaths` of them in a row.

    Attributes:
        quick_s: a life shorter than this counts as quick.
        max_quick_deaths: how many in a row are tolerated.
        quick_deaths: how many there were in a row.
    """

    quick_s: float = 10.0
    max_quick_deaths: int = 5
    quick_deaths: int = 0

    def died(self, lived_s: float) -> float | None:
        """Note a death; return the seconds to wait before the next start, or None to give up."""
        self.quick_deaths = self.quick_deaths + 1 if lived_s < self.quick_s else 0
        if self.quick_deaths > self.max_quick_deaths:
            return None
        if self.quick_deaths == 0:
            return 0.0
        return min(FIRST_DELAY_S * 4.0 ** (self.quick_deaths - 1), LAST_DELAY_S)
