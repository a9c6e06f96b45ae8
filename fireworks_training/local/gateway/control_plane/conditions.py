"""Capacity, delays and failures that the start of a worker has to get past.

Knows places and faults by resource name; knows no worker and no state. `Workers` asks here before
it spawns, and reports the reason while it waits; a change of the limits or of a fault wakes all
starts that wait, so that none sleeps on an old figure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from fireworks_training.local.limits import Limits
from fireworks_training.local.settings import WorkerKind

MAX_FAULTS = 256

_PLACES: dict[WorkerKind, str] = {"trainer": "trainer", "engine": "replica"}
"""What messages call the places of a kind of worker."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Describes what is to go wrong with one resource, which need not exist yet.

    Attributes:
        delay_s: seconds before its workers start, instead of the platform's; None = as the limits.
        pending: keeps it waiting for capacity, with this reason; empty = not.
        fail: fails it with this message, at its next start; empty = not. Happens once.
    """

    delay_s: float | None = None
    pending: str = ""
    fail: str = ""


class Conditions:
    """Keeps the limits in force, the holders of places, the queues for them, and the faults.

    Args:
        limits: the limits to begin with.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._faults: dict[str, Fault] = {}
        self._holders: dict[WorkerKind, list[str]] = {"trainer": [], "engine": []}
        # Holder and resource, first come first.
        self._waiting: dict[WorkerKind, list[tuple[str, str]]] = {"trainer": [], "engine": []}
        self._changed = asyncio.Event()

    # -- limits and faults -----------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """The limits in force; setting them wakes all starts that wait."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        self._wake()

    def faults(self) -> dict[str, Fault]:
        """Return all faults, by resource name."""
        return dict(self._faults)

    def set_fault(self, resource: str, fault: Fault | None) -> None:
        """Replace the fault of a resource; None removes it."""
        if fault is None or fault == Fault():
            self._faults.pop(resource, None)
        else:
            self._faults[resource] = fault
        self._wake()

    def take_failure(self, resource: str) -> str:
        """Remove and return the failure that is due to a resource; empty if there is none."""
        fault = self._faults.get(resource)
        if fault is None or not fault.fail:
            return ""
        self.set_fault(resource, Fault(fault.delay_s, fault.pending))
        return fault.fail

    # -- waiting ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def place(
        self, kind: WorkerKind, holder: str, resource: str, report: Callable[[str], None]
    ) -> AsyncGenerator[None]:
        """Hold a place while the block runs, in the order of asking.

        `report` is called with the reason why there is none yet, each time it is another one.
        """
        queue, me = self._waiting[kind], (holder, resource)
        queue.append(me)
        try:
            reported = ""
            while reason := self._why_not(kind, me):
                if reason != reported:
                    reported = reason
                    report(reason)
                await self.change()
        except BaseException:
            queue.remove(me)
            self._wake()
            raise
        # From waiting to holding without a moment in between.
        queue.remove(me)
        with self.kept_place(kind, holder):
            yield

    @contextmanager
    def kept_place(self, kind: WorkerKind, holder: str) -> Generator[None]:
        """Hold a place for a worker that runs already, also when there is none left."""
        holders = self._holders[kind]
        holders.append(holder)
        self._wake()
        try:
            yield
        finally:
            holders.remove(holder)
            self._wake()

    async def delay(self, kind: WorkerKind, resource: str) -> None:
        """Wait as long as a start takes; a change of that time counts from the beginning."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while (left := begun + self._delay_s(kind, resource) - loop.time()) > 0:
            await self.change(within_s=left)

    async def change(self, within_s: float | None = None) -> None:
        """Return at the next change of a limit, a fault or a place, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._changed.wait()

    def _delay_s(self, kind: WorkerKind, resource: str) -> float:
        fault = self._faults.get(resource)
        if fault is not None and fault.delay_s is not None:
            return fault.delay_s
        limits = self._limits
        return limits.trainer_delay_s if kind == "trainer" else limits.deployment_delay_s

    def _why_not(self, kind: WorkerKind, me: tuple[str, str]) -> str:
        if pending := self._held_back(me[1]):
            return pending
        most = self._limits.max_trainers if kind == "trainer" else self._limits.max_replicas
        if most is None:
            return ""
        holders, queue = self._holders[kind], self._waiting[kind]
        # Those that a fault holds back don't hold back others.
        ahead = sum(not self._held_back(resource) for _, resource in queue[: queue.index(me)])
        if len(holders) + ahead < most:
            return ""
        by = f" (by {', '.join(holders)})" if holders else ""
        return (
            f"waiting for capacity: {len(holders)} of {most} {_PLACES[kind]} places are taken{by},"
            f" {ahead} ahead in the queue"
        )

    def _held_back(self, resource: str) -> str:
        fault = self._faults.get(resource)
        return fault.pending if fault is not None else ""

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
