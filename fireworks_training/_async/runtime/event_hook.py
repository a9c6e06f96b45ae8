"""Calls the user's `on_event` hook safely.

Where no hook is set there is no `EventHook`; callers check for that first, so that events nobody
wants are not made. It knows the hook and the window size that it reported last; the events
themselves are defined in `fireworks_training.events`.
"""

from __future__ import annotations

import inspect
import logging
import time
from typing import Protocol

from fireworks_training.errors import InvalidArgument
from fireworks_training.events import Event, LoopBlockedEvent, OnEvent, WindowEvent

WINDOWS = 64
"""Controllers whose window size is remembered; the oldest is forgotten first."""

logger = logging.getLogger("fireworks_training.events")


class HasWindow(Protocol):
    """Names what a hook reports of a concurrency controller."""

    @property
    def window_size(self) -> int:
        """Requests that may be in flight."""
        ...


class EventHook:
    """Calls a hook; an exception in it is logged once, and breaks nothing.

    Args:
        hook: the user's function.

    Raises:
        InvalidArgument: `hook` can't be called, or is a coroutine function, which nobody would
            await.
    """

    def __init__(self, hook: OnEvent) -> None:
        if not callable(hook):
            raise InvalidArgument(f"on_event={hook!r}: a function of one event is needed")
        if inspect.iscoroutinefunction(hook) or inspect.iscoroutinefunction(
            getattr(hook, "__call__", None)  # noqa: B004
        ):
            raise InvalidArgument(
                "on_event is a coroutine function, and is never awaited: pass a plain function; it "
                "may put the event into an asyncio.Queue"
            )
        self._hook = hook
        self._failed = False
        self._windows: dict[int, tuple[HasWindow, int]] = {}

    @classmethod
    def of(cls, hook: OnEvent | None) -> EventHook | None:
        """Wrap a hook; None where there is none."""
        return None if hook is None else cls(hook)

    @staticmethod
    def now() -> float:
        """Read the clock of all events."""
        return time.monotonic()

    def emit(self, event: Event) -> None:
        """Call the hook with an event; only on the owner loop."""
        try:
            self._hook(event)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception(
                    "on_event raised at a %s; it is called further, and further errors are not "
                    "logged",
                    type(event).__name__,
                )

    def report_window(self, controller: HasWindow) -> None:
        """Emit a `WindowEvent` if a controller's window has changed since the last call."""
        size = controller.window_size
        _, before = self._windows.get(id(controller), (controller, size))
        self._windows[id(controller)] = (controller, size)
        if len(self._windows) > WINDOWS:
            del self._windows[next(iter(self._windows))]
        if size != before:
            self.emit(WindowEvent(at=self.now(), before=before, after=size))

    def blocked(self, seconds: float, where: str) -> None:
        """Emit a `LoopBlockedEvent`."""
        self.emit(LoopBlockedEvent(at=self.now(), seconds=seconds, where=where))
