"""The base of the twins with nothing behind it: each call runs on an event loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, ParamSpec, Self, TypeVar

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")


class Blocking(Generic[A]):
    """What generated classes ask of their base."""

    _async: A

    @classmethod
    def _wrap(cls, instance: A) -> Self:
        twin = cls.__new__(cls)
        twin._async = instance
        return twin

    def _bind(self) -> Self:
        bind: Callable[[], None] = getattr(self._async, "_bind_to_portal")  # noqa: B009
        bind()
        return self

    @staticmethod
    def _run(
        function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return asyncio.run(function(*args, **kwargs))

    @staticmethod
    async def _hop(
        function: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await asyncio.to_thread(asyncio.run, function(*args, **kwargs))

    @staticmethod
    def _iterate(
        function: Callable[P, AsyncIterator[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Iterator[T]:
        with asyncio.Runner() as runner:
            items = function(*args, **kwargs)

            async def next_one() -> tuple[T, ...]:
                async for item in items:
                    return (item,)
                return ()

            async def close() -> None:
                await items.aclose()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

            try:
                while found := runner.run(next_one()):
                    yield found[0]
            finally:
                runner.run(close())
