"""The blocking twins of `shop._async.back.ledger`.

Written by `python -m shop._generate_sync`.
"""

from __future__ import annotations

from collections.abc import Iterator

from shop._async.back.ledger import AsyncLedger
from shop._portal import Blocking


class Ledger(Blocking[AsyncLedger]):
    """What was sold, in order."""

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._async.path

    @property
    def readers(self) -> int:
        """How many iterations are not closed."""
        return self._async.readers

    def write(self, line: str) -> None:
        """Add a line."""
        self._run(self._async.write, line)

    def read(self, start: int = 0) -> Iterator[str]:
        """The lines from `start` on, one by one; an `Ledger` may be read many times."""
        return self._iterate(self._async.read, start)
