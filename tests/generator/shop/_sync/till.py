"""The blocking twins of `shop._async.till`.

Written by `python -m shop._generate_sync`.
"""

from __future__ import annotations

import decimal
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from shop._async.till import FULL, AsyncDrawer, AsyncTill, Currency, Options, T
from shop._portal import Blocking
from shop._sync.back.ledger import Ledger
from shop.futures import APIFuture

if TYPE_CHECKING:
    import fractions
    from collections.abc import Sequence


class Till(Blocking[AsyncTill]):
    """A till with a drawer.

    Args:
        name: what the customers see.
        currency: what it takes.
    """

    def __init__(self, name: str, *, currency: Currency = "EUR") -> None:
        """A closed till of that name."""
        self._async = AsyncTill(name, currency=currency)
        self._bind()

    @classmethod
    def from_config(
        cls,
        *,
        name: str,
        currency: Currency = "EUR",
        rates: Mapping[str, decimal.Decimal] | None = None,
        quantity_of_coins_in_the_drawer: int = FULL,
        **options: Unpack[Options],
    ) -> Self:
        """A till as the configuration says."""
        instance = AsyncTill.from_config(
            name=name,
            currency=currency,
            rates=rates,
            quantity_of_coins_in_the_drawer=quantity_of_coins_in_the_drawer,
            **options,
        )
        return cls._wrap(instance)._bind()

    def __enter__(self) -> Self:
        self._run(self._async.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._run(self._async.__aexit__, exc_type, exc, traceback)

    @property
    def name(self) -> str:
        """What the customers see."""
        return self._async.name

    @property
    def drawer(self) -> Drawer | None:
        """The `Drawer`, if the till is open."""
        instance = self._async.drawer
        return Drawer._wrap(instance) if instance else None

    @property
    def bound(self) -> int:
        """How often it was bound to a loop."""
        return self._async.bound

    def price(
        self,
        article: str,
        discount: fractions.Fraction | None = None,
        *,
        apply: Callable[[decimal.Decimal, Sequence[str]], decimal.Decimal] | None = None,
    ) -> decimal.Decimal:
        """What an article costs: one per letter."""
        return self._async.price(article, discount, apply=apply)

    def open(self) -> None:
        """Open the drawer."""
        self._run(self._async.open)

    def close(self) -> None:
        """Close the drawer."""
        self._run(self._async.close)

    def count(self, of: str, *, at_least: int = 0) -> int:
        """How many there are."""
        return self._run(self._async.count, of, at_least=at_least)

    def first(self, items: list[T], default: T) -> T:
        """The first of some items."""
        return self._run(self._async.first, items, default)

    def sell(self, article: str, *, metadata: dict[str, Any] | None = None) -> APIFuture[str]:
        """Sell it; `await` the result."""
        return self._async.sell(article, metadata=metadata)

    async def sell_async(
        self, article: str, *, metadata: dict[str, Any] | None = None
    ) -> APIFuture[str]:
        """`sell`, as a coroutine that returns the future."""
        return await self._async.sell_async(article, metadata=metadata)

    def create_ledger(
        self,
        path: str,
        predecessor_of_the_ledger: Ledger | None = None,
        *,
        lines_a_page: int = 1,
    ) -> Ledger:
        """A new ledger.

        Returns:
            an `Ledger`, empty.
        """
        instance = self._run(
            self._async.create_ledger,
            path,
            predecessor_of_the_ledger._async if predecessor_of_the_ledger else None,
            lines_a_page=lines_a_page,
        )
        return Ledger._wrap(instance)

    async def create_ledger_async(self, path: str) -> Ledger:
        """`create_ledger`, from any loop."""
        instance = await self._hop(self._async.create_ledger_async, path)
        return Ledger._wrap(instance)

    def find_ledger(self, path: str) -> Ledger | None:
        """The ledger that was made last, if it lies there."""
        instance = self._run(self._async.find_ledger, path)
        return Ledger._wrap(instance) if instance else None

    def close_ledger(self, ledger: Ledger, *, successor: Ledger) -> bool:
        """Whether both are of this till."""
        return self._run(self._async.close_ledger, ledger._async, successor=successor._async)

    def receipts(self, *, up_to: int) -> Iterator[int]:
        """Numbers for receipts."""
        return self._iterate(self._async.receipts, up_to=up_to)


class Drawer(Blocking[AsyncDrawer]):
    """Where the money lies."""

    def till(self) -> Till:
        """The `Till` it belongs to."""
        instance = self._async.till()
        return Till._wrap(instance)
