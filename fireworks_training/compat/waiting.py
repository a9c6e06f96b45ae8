"""How the managers wait: look, decide, look again, within budgets and never in silence.

Async, so that Ctrl-C in a blocking call ends the wait at once. The first looks come quickly and the
later ones at the interval that the caller gave: a resource that is ready in a second is not waited
for five.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fireworks_training._core.lifecycle import SLOWEST, pause
from fireworks_training._core.notices import Notices

T = TypeVar("T")

logger = logging.getLogger("fireworks_training.compat")


@dataclass(slots=True)
class Wait:
    """One wait.

    Attributes:
        what: names it in the log.
        poll_interval_s: the longest time between two looks.
        state: what was seen last; goes into the log.
        started: in the loop's time.
    """

    what: str
    poll_interval_s: float
    state: str = ""
    started: float = field(default_factory=lambda: asyncio.get_running_loop().time())

    @property
    def waited_s(self) -> float:
        """Seconds since it began."""
        return asyncio.get_running_loop().time() - self.started

    async def until(self, look: Callable[[], Awaitable[T | None]]) -> T:
        """Look until there is something; `look` raises when it is no use to go on."""
        notices = Notices(self.started)
        slowest = min(SLOWEST, self.poll_interval_s)
        while True:
            found = await look()
            if found is not None:
                return found
            if notices.due(asyncio.get_running_loop().time()):
                logger.warning("%s: waiting for %.0f s, %s", self.what, self.waited_s, self.state)
            await asyncio.sleep(pause(self.waited_s, slowest))
