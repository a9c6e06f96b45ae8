"""A future that is always done."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class APIFuture(Generic[T]):
    """The result of an operation."""

    def __init__(self, value: T) -> None:
        self._value = value

    def result(self) -> T:
        """The result."""
        return self._value

    def __await__(self) -> Generator[Any, None, T]:
        yield from ()
        return self._value
