"""One thread that does all the torch work, fed by an event loop.

Knows how a function gets to the thread, and its result back. Does not know what is computed.

The thread is a daemon: a worker that ends does not wait for a long operation, which is
safe since nothing on disk is ever half written under its final name.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from fireworks_training.local.model.model import configure_torch

T = TypeVar("T")


class TorchThread:
    """Runs functions one after another in a thread of its own, for one event loop."""

    def __init__(self, name: str = "torch") -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Runs a function and returns its result; it also ends if the caller is cancelled."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                result = function()
            except StopIteration as error:  # which a future refuses: the caller would wait for ever
                fault = RuntimeError(f"StopIteration: {error}")
                fault.__cause__ = error
                deliver(future.set_exception, fault)
            except BaseException as error:
                deliver(future.set_exception, error)
            else:
                deliver(future.set_result, result)

        def deliver(
            setter: Callable[[T], None] | Callable[[BaseException], None], value: object
        ) -> None:
            def on_loop() -> None:
                if not future.done():
                    setter(value)  # type: ignore[arg-type]

            if not loop.is_closed():
                loop.call_soon_threadsafe(on_loop)

        self._calls.put(call)
        return await future

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after the call that runs; False if that took longer than `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        configure_torch()
        while (call := self._calls.get()) is not None:
            call()
