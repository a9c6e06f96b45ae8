"""The saved states that a training client knows of: the names it used, and the newest one.

A client that ends names the newest state in its error, and the client made after it loads that. One
object is shared by the operations that save and load, the queue and its requests, and the factory;
it is changed on the owner loop.
"""

from __future__ import annotations


class SavedStates:
    """The states that one client has saved, or resumed from.

    Attributes:
        newest: the reference of the newest state that the client saved, or else resumed from.
    """

    def __init__(self) -> None:
        self.newest: str | None = None
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def saved(self, name: str, path: str) -> None:
        """Note that a state was saved under a name; `path` is what loads it."""
        self._names.add(name)
        self.newest = path

    def resumed(self, path: str) -> None:
        """Note that the client goes on from a state; what it saved itself is newer."""
        if self.newest is None:
            self.newest = path
