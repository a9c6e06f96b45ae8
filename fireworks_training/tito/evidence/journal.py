"""Tells an observer what happens in trajectories, in order and off the event loop.

It knows what an observer is. What it does with the events (a log on disk: `debug_log`) is its own.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training.tito.values.errors import TITOError, told

logger = logging.getLogger("fireworks_training.tito")


class TITOEventObserver(Protocol):
    """Is told of events. Its methods run in one worker thread, in turn, and may block."""

    def record(
        self,
        event: str,
        trajectory_id: str,
        payload: Mapping[str, Any],
        arrays: Mapping[str, Sequence[Any]] | None = None,
    ) -> int | None:
        """An event of an open trajectory; `arrays` are its long parts, such as token ids."""
        ...

    def close_trajectory(
        self, trajectory_id: str, status: str, payload: Mapping[str, Any] | None = None
    ) -> int | None:
        """A trajectory has ended."""
        ...

    def record_tombstone_event(
        self, event: str, trajectory_id: str, payload: Mapping[str, Any]
    ) -> int | None:
        """An event of a trajectory that had ended, such as a call that came too late."""
        ...


class Journal:
    """The way to an observer, or to nobody.

    An observer that raises fails the call that it was told of: evidence that was asked for is not
    left out in silence.
    """

    def __init__(self, observer: TITOEventObserver | None) -> None:
        self._observer = observer
        self._worker: ThreadPoolExecutor | None = None

    async def record(
        self,
        event: str,
        trajectory_id: str,
        payload: Mapping[str, Any],
        arrays: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Tell of an event of an open trajectory."""
        if (observer := self._observer) is not None:
            await self._tell(lambda: observer.record(event, trajectory_id, payload, arrays))

    def record_now(self, event: str, trajectory_id: str, payload: Mapping[str, Any]) -> None:
        """The same for plain functions: blocks until it is told."""
        if (observer := self._observer) is not None:
            try:
                self._in_worker().submit(observer.record, event, trajectory_id, payload).result()
            except Exception as error:
                raise _unwritten(error) from error

    async def ended(self, trajectory_id: str, status: str, payload: Mapping[str, Any]) -> None:
        """Tell that a trajectory has ended."""
        if (observer := self._observer) is not None:
            await self._tell(lambda: observer.close_trajectory(trajectory_id, status, payload))

    async def after_end(self, event: str, trajectory_id: str, payload: Mapping[str, Any]) -> None:
        """Tell of an event of a trajectory that had ended."""
        if (observer := self._observer) is not None:
            await self._tell(lambda: observer.record_tombstone_event(event, trajectory_id, payload))

    async def close(self) -> None:
        """Close the observer, if it has a `close()`, once it was told of everything."""
        close = getattr(self._observer, "close", None)
        try:
            if close is not None:
                work = asyncio.wrap_future(self._in_worker().submit(close))
                closing: Any = await log_if_slow(
                    asyncio.shield(work), lambda: "the observer closes"
                )
                if inspect.isawaitable(closing):
                    await closing
        finally:
            if self._worker is not None:
                self._worker.shutdown(wait=False)

    def _in_worker(self) -> ThreadPoolExecutor:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="tito-observer")
        return self._worker

    async def _tell(self, tell: Callable[[], object]) -> None:
        telling = asyncio.wrap_future(self._in_worker().submit(tell))
        try:
            # Whoever is cancelled here has done what is told of: it must not be lost.
            await log_if_slow(asyncio.shield(telling), lambda: "the observer takes an event")
        except asyncio.CancelledError:
            telling.add_done_callback(_say_unwritten)
            raise
        except Exception as error:
            raise _unwritten(error) from error


def _say_unwritten(telling: asyncio.Future[object]) -> None:
    if not telling.cancelled() and (error := telling.exception()) is not None:
        logger.warning("an event of a call that was cancelled could not be told: %s", told(error))


def _unwritten(error: Exception) -> TITOError:
    return TITOError(
        "tito_debug_storage_error",
        507,
        f"the observer could not take an event ({type(error).__name__}): make room, or run "
        "without an observer",
        context={"observer_error_type": type(error).__name__},
    )
