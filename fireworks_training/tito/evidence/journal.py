"""Hands the events of trajectories to an observer, in order and off the event loop.

It knows the observer's protocol, and not what an observer does with events; `debug_log` is one that
writes them to disk.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training.tito.values.errors import TITOError, safe_text

logger = logging.getLogger("fireworks_training.tito")


class TITOEventObserver(Protocol):
    """Receives events. Its methods run in one worker thread, one after another, and may block."""

    def record(
        self,
        event: str,
        trajectory_id: str,
        payload: Mapping[str, Any],
        arrays: Mapping[str, Sequence[Any]] | None = None,
    ) -> int | None:
        """Take an event of an open trajectory; `arrays` are its long parts, such as token ids."""
        ...

    def close_trajectory(
        self, trajectory_id: str, status: str, payload: Mapping[str, Any] | None = None
    ) -> int | None:
        """Take the end of a trajectory."""
        ...

    def record_tombstone_event(
        self, event: str, trajectory_id: str, payload: Mapping[str, Any]
    ) -> int | None:
        """Take an event of a trajectory that had ended before, such as a late call."""
        ...


class Journal:
    """Hands events to an observer; without one it drops them.

    An observer that raises fails the call that the event is about: evidence that was asked for is
    not left out in silence.
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
        """Hand over an event of an open trajectory."""
        if (observer := self._observer) is not None:
            await self._send(lambda: observer.record(event, trajectory_id, payload, arrays))

    def record_blocking(self, event: str, trajectory_id: str, payload: Mapping[str, Any]) -> None:
        """Hand over an event of an open trajectory, and block until the observer has taken it."""
        if (observer := self._observer) is not None:
            try:
                self._in_worker().submit(observer.record, event, trajectory_id, payload).result()
            except Exception as error:
                raise _unwritten(error) from error

    async def record_end(self, trajectory_id: str, status: str, payload: Mapping[str, Any]) -> None:
        """Hand over the end of a trajectory."""
        if (observer := self._observer) is not None:
            await self._send(lambda: observer.close_trajectory(trajectory_id, status, payload))

    async def record_late(self, event: str, trajectory_id: str, payload: Mapping[str, Any]) -> None:
        """Hand over an event of a trajectory that had ended before."""
        if (observer := self._observer) is not None:
            await self._send(lambda: observer.record_tombstone_event(event, trajectory_id, payload))

    async def close(self) -> None:
        """Close the observer, if it has a `close()`, after it has taken all events."""
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

    async def _send(self, deliver: Callable[[], object]) -> None:
        delivery = asyncio.wrap_future(self._in_worker().submit(deliver))
        try:
            # A caller that is cancelled here has done what the event records: keep the event.
            await log_if_slow(asyncio.shield(delivery), lambda: "the observer takes an event")
        except asyncio.CancelledError:
            delivery.add_done_callback(_log_unwritten)
            raise
        except Exception as error:
            raise _unwritten(error) from error


def _log_unwritten(delivery: asyncio.Future[object]) -> None:
    if not delivery.cancelled() and (error := delivery.exception()) is not None:
        logger.warning(
            "an event of a call that was cancelled could not be told: %s", safe_text(error)
        )


def _unwritten(error: Exception) -> TITOError:
    return TITOError(
        "tito_debug_storage_error",
        507,
        f"the observer could not take an event ({type(error).__name__}): make room, or run "
        "without an observer",
        context={"observer_error_type": type(error).__name__},
    )
