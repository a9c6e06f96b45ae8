"""The ledger, which a till makes and writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class AsyncLedger:
    """What was sold, in order."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines: list[str] = []
        self._readers = 0

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._path

    @property
    def readers(self) -> int:
        """How many iterations are not closed."""
        return self._readers

    async def write(self, line: str) -> None:
        """Add a line."""
        await asyncio.sleep(0)
        self._lines.append(line)

    async def read(self, start: int = 0) -> AsyncIterator[str]:
        """The lines from `start` on, one by one; an `AsyncLedger` may be read many times."""
        self._readers += 1
        try:
            for line in self._lines[start:]:
                await asyncio.sleep(0)
                yield line
        finally:
            self._readers -= 1

    def __repr__(self) -> str:
        return f"<AsyncLedger {self._path}>"
