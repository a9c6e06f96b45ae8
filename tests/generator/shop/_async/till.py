"""The till: one of everything that the generator accepts."""

from __future__ import annotations

import asyncio
import decimal
from collections.abc import AsyncIterator, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, TypeVar, Unpack

from shop._async.back.ledger import AsyncLedger
from shop.futures import APIFuture

if TYPE_CHECKING:
    import fractions
    from collections.abc import Sequence

T = TypeVar("T")
FULL: Final = 100
Currency = Literal["EUR", "USD"]


class Options(TypedDict, total=False):
    """Further keywords of a till."""

    shelves: int
    lamp: bool


class AsyncDrawer:
    """Where the money lies."""

    def __init__(self, till: AsyncTill) -> None:
        self._till = till

    def till(self) -> AsyncTill:
        """The `AsyncTill` it belongs to."""
        return self._till


class AsyncTill:
    """A till with a drawer.

    Args:
        name: what the customers see.
        currency: what it takes.
    """

    __slots__ = ("_bound", "_drawer", "_ledger", "_name", "_opened", "_taken")

    def __init__(self, name: str, *, currency: Currency = "EUR") -> None:
        """A closed till of that name."""
        self._name = name
        self._taken = currency
        self._opened = 0
        self._bound = 0
        self._drawer: AsyncDrawer | None = None
        self._ledger: AsyncLedger | None = None

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
        till = cls(name, currency=currency)
        till._opened = (
            quantity_of_coins_in_the_drawer + len(rates or {}) + options.get("shelves", 0)
        )
        return till

    def _bind_to_portal(self) -> None:
        self._bound += 1

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # -- plain ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """What the customers see."""
        return self._name

    @property
    def drawer(self) -> AsyncDrawer | None:
        """The `AsyncDrawer`, if the till is open."""
        return self._drawer

    @property
    def bound(self) -> int:
        """How often it was bound to a loop."""
        return self._bound

    def price(
        self,
        article: str,
        discount: fractions.Fraction | None = None,
        *,
        apply: Callable[[decimal.Decimal, Sequence[str]], decimal.Decimal] | None = None,
    ) -> decimal.Decimal:
        """What an article costs: one per letter."""
        return decimal.Decimal(len(article))

    # -- coroutines ----------------------------------------------------------

    async def open(self) -> None:
        """Open the drawer."""
        await asyncio.sleep(0)
        self._opened += 1
        self._drawer = AsyncDrawer(self)

    async def close(self) -> None:
        """Close the drawer."""
        await asyncio.sleep(0)
        self._opened -= 1
        self._drawer = None

    async def count(self, of: str, *, at_least: int = 0) -> int:
        """How many there are."""
        await asyncio.sleep(0)
        return max(len(of), at_least)

    async def first(self, items: list[T], default: T) -> T:
        """The first of some items."""
        return items[0] if items else default

    # -- operations, in both spellings ---------------------------------------

    def sell(self, article: str, *, metadata: dict[str, Any] | None = None) -> APIFuture[str]:
        """Sell it; `await` the result."""
        return APIFuture(f"{article} sold")

    async def sell_async(
        self, article: str, *, metadata: dict[str, Any] | None = None
    ) -> APIFuture[str]:
        """`sell`, as a coroutine that returns the future."""
        return self.sell(article, metadata=metadata)

    # -- creators ------------------------------------------------------------

    async def create_ledger(
        self,
        path: str,
        predecessor_of_the_ledger: AsyncLedger | None = None,
        *,
        lines_a_page: int = 1,
    ) -> AsyncLedger:
        """A new ledger.

        Returns:
            an `AsyncLedger`, empty.
        """
        await asyncio.sleep(0)
        if predecessor_of_the_ledger is not None:
            path = f"{predecessor_of_the_ledger.path}/{path}"
        self._ledger = AsyncLedger(path)
        return self._ledger

    async def create_ledger_async(self, path: str) -> AsyncLedger:
        """`create_ledger`, from any loop."""
        return await self.create_ledger(path)

    async def find_ledger(self, path: str) -> AsyncLedger | None:
        """The ledger that was made last, if it lies there."""
        return self._ledger if self._ledger and self._ledger.path == path else None

    async def close_ledger(self, ledger: AsyncLedger, *, successor: AsyncLedger) -> bool:
        """Whether both are of this till."""
        return ledger is self._ledger is successor

    def receipts(self, *, up_to: int) -> AsyncIterator[int]:
        """Numbers for receipts."""

        async def numbers() -> AsyncIterator[int]:
            for number in range(up_to):
                yield number

        return numbers()

    async def _private(self, *anything: object) -> tuple[object, ...]:
        return anything
