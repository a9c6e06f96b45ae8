"""Tells a trainer that its session is still wanted.

Heartbeats run on the portal's loop, with a session of their own: users block their own loops in
reward functions, and a trainer that hears nothing for minutes unloads the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.data_plane import DataPlane, was_refused
from fireworks_training._outcome import Outcome
from fireworks_training.errors import FireworksTrainingError
from fireworks_training.futures import APIFuture

PERIOD = 10.0
"""Seconds between heartbeats."""

WARN_AFTER = 120.0
"""Seconds of failing heartbeats before a warning, and again after twice the time. Refused ones are
told of at once."""

logger = logging.getLogger("fireworks_training.trainer")


class Heartbeat:
    """The heartbeat of one session, from `start()` to `stop()`.

    Args:
        make_transport: makes a transport for the loop that it is given.
        trainer_url: of the trainer, without `/api/v1`.
        session_id: the session.
    """

    def __init__(
        self,
        make_transport: Callable[[OwnerLoop], Transport],
        trainer_url: str,
        session_id: str,
        *,
        period: float = PERIOD,
    ) -> None:
        self._owner = OwnerLoop(portal=True)
        self._transport = make_transport(self._owner)
        self._plane = DataPlane(self._transport, trainer_url)
        self._session_id = session_id
        self._period = period
        self._running: Outcome[None] | None = None

    def start(self) -> None:
        """Begin; from any thread."""
        self._running = self._owner.spawn(self._beat, label="heartbeat")

    async def stop(self) -> None:
        """End, and close the session's connection; from any loop. Idempotent."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.request_cancel()
        await finish_in_spite_of_cancellation(self._ended(running))

    async def _ended(self, running: Outcome[None]) -> None:
        with contextlib.suppress(FireworksTrainingError):
            await APIFuture(running)
        # Giving the portal back may end its thread, which is waited for off this loop.
        await asyncio.to_thread(self._owner.release)

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        last_good = loop.time()
        told, warn_after = False, WARN_AFTER
        async with self._transport:
            while True:
                await asyncio.sleep(self._period)
                try:
                    await self._plane.beat(self._session_id)
                except FireworksTrainingError as error:
                    silent = loop.time() - last_good
                    if silent > warn_after or (was_refused(error) and not told):
                        told, warn_after = True, max(2 * silent, WARN_AFTER)
                        logger.warning(
                            "the trainer has taken no heartbeat for %.0f s: %s", silent, error
                        )
                else:
                    last_good, told, warn_after = loop.time(), False, WARN_AFTER
