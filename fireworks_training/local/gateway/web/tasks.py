"""Tasks that run beside the requests: started under a key, ended with the gateway.

Knows asyncio alone. A change that takes long must not end with the request that asked for it, and
an event loop keeps no task that nobody else refers to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class RunningTasks(Generic[Key]):
    """Holds tasks by their keys, each until it has ended or another takes its key."""

    def __init__(self) -> None:
        self._tasks: dict[Key, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[Key]:
        return iter(tuple(self._tasks))

    def __contains__(self, key: Key) -> bool:
        return key in self._tasks

    def start(
        self, key: Key, work: Coroutine[None, None, None], name: str | None = None
    ) -> asyncio.Task[None]:
        """Run `work` in a task of its own, and return the task."""
        task = asyncio.create_task(work, name=name)
        self._tasks[key] = task

        def ended(_: object) -> None:
            if self._tasks.get(key) is task:
                del self._tasks[key]

        task.add_done_callback(ended)
        return task

    def get(self, key: Key) -> asyncio.Task[None] | None:
        """Return the task that runs under a key, or None."""
        return self._tasks.get(key)

    async def cancel(self, key: Key) -> bool:
        """Cancel the task of a key and wait for its end; return whether there was one."""
        task = self._tasks.pop(key, None)
        if task is None:
            return False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return True

    async def close(self) -> None:
        """Cancel all tasks and wait for their ends."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
