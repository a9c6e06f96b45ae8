"""Loads snapshots into a deployment, and knows when every replica serves them.

What to request next is decided in `_core.snapshots`; the requests are in `hot_load_requests`; here
they are sent, and waited for.
One load runs at a time. Loads of a snapshot by its name are carried out in turn; loads of "the
newest weights" that are asked for meanwhile coalesce: only the last of them is carried out, and
those that it replaced end with it. A load that has begun goes on when the one who asked for it goes
away.

A look that fails says nothing about the load: the deployment may be restarting, so whatever the
answer is, it is looked at again until the time is up.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training._async.weights.hot_load_requests import (
    STATUS_TIMEOUT,
    HotLoadRequests,
    Target,
    difference_to,
)
from fireworks_training._core.backoff import Backoff
from fireworks_training._core.snapshots import (
    Chain,
    Done,
    NeedWhole,
    Pace,
    Post,
    Sync,
    Unloadable,
    Wait,
    read_replicas,
)
from fireworks_training._core.waits.reports import ReportSchedule
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    ClientClosed,
    Conflict,
    HotLoadFailed,
    HotLoadTimeout,
)
from fireworks_training.events import FailureEvent, SwapEvent, SyncEvent, SyncStage
from fireworks_training.models import ReplicaStatus, Snapshot

logger = logging.getLogger("fireworks_training.weight_sync")

LONG_POLL = 25.0
"""Seconds that a look may wait, where the server offers it."""
DRAIN = 60.0
"""Seconds that `close` gives the load under way."""

SaveWhole = Callable[[], Awaitable[Snapshot]]
"""Saves a whole snapshot of the newest weights, noted in the chain."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a load ended.

    Attributes:
        identity: what every replica serves.
        steps: the loads that were asked for, in order; none if it was there already.
        superseded: the one asked for was passed over for this newer one.
        saved: the whole snapshot that had to be saved on the way, or None.
    """

    identity: str
    steps: tuple[str, ...] = ()
    superseded: bool = False
    saved: Snapshot | None = None


@dataclass(slots=True, eq=False)
class _Wanted:
    """A load that somebody waits for, and those that it replaced.

    Attributes:
        newest: whether any newer snapshot serves as well; else it is this one or an error.
    """

    identity: str
    newest: bool
    save_whole: SaveWhole | None
    outcome: asyncio.Future[Loaded]
    replaced: list[asyncio.Future[Loaded]] = field(default_factory=list[asyncio.Future[Loaded]])


class _ChainBroken(Exception):
    """Only a whole snapshot leads on."""


class WeightSync:
    """The weights of one deployment.

    Args:
        transport: the service's pool.
        target: the deployment.
        chain: what is known of the snapshots that this service saves.
        timeout: seconds for every replica to report a snapshot.
        hot_loads: wakes the requests that wait for the end of a load.
        on_live: told the identity whenever a snapshot has become live everywhere.
        learn: notes in the chain what can be known of a snapshot that this service did not save.
    """

    def __init__(
        self,
        transport: Transport,
        target: Target,
        *,
        chain: Chain | None = None,
        timeout: float,
        hot_loads: HotLoadSignal | None = None,
        on_live: Callable[[str], None] = lambda _: None,
        learn: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self.chain = chain if chain is not None else Chain()
        self.current: str | None = None
        """The identity that was last seen live on every replica."""
        self._requests = HotLoadRequests(transport, target)
        self._events = transport.events
        self._timeout = timeout
        self._hot_loads = hot_loads if hot_loads is not None else HotLoadSignal()
        self._on_live = on_live
        self._learn = learn
        self._wanted: deque[_Wanted] = deque()
        self._bringing: _Wanted | None = None
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._long_poll = False

    async def replicas(self) -> list[ReplicaStatus]:
        """What each replica holds.

        Raises:
            ApiError: the status can't be read, also after retries.
        """
        return read_replicas(await self._requests.status(backoff=_within(self._timeout)))

    async def load(
        self, identity: str, *, save_whole: SaveWhole | None = None, newest: bool = False
    ) -> Loaded:
        """Load a snapshot and wait until every replica serves it.

        Args:
            save_whole: makes a whole snapshot to load in its place, where its chain is broken.
            newest: the caller wants the newest weights: a load asked for later may take the place
                of this one while it waits, and ends it (`superseded`).

        Raises:
            HotLoadFailed: a replica refused it; the old weights keep serving.
            HotLoadTimeout: not every replica reported it in time.
        """
        if self._closed:
            raise ClientClosed.of("service")
        outcome = asyncio.get_running_loop().create_future()
        wanted = _Wanted(identity, newest, save_whole, outcome)
        if newest and self._wanted and self._wanted[-1].newest:
            passed_over = self._wanted.pop()
            wanted.replaced = [*passed_over.replaced, passed_over.outcome]
        self._wanted.append(wanted)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="weight sync")
        return await asyncio.shield(outcome)

    def replaces(self, identity: str) -> str | None:
        """Name the other snapshot whose load by name is under way or waits; None if none is."""
        waiting = [wanted.identity for wanted in self._wanted if not wanted.newest]
        if self._bringing is not None and not self._bringing.newest:
            waiting.insert(0, self._bringing.identity)
        return next((other for other in waiting if other != identity), None)

    async def close(self) -> None:
        """Let the load under way end, for a while; idempotent."""
        self._closed = True
        worker = self._worker
        if worker is not None and not worker.done():
            await asyncio.wait([worker], timeout=DRAIN)
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
        while self._wanted:
            closed = ClientClosed("the service was closed before the snapshot was loaded")
            _fail(self._wanted.popleft(), closed)

    # -- one after the other -----------------------------------------------------------------------

    async def _work(self) -> None:
        while self._wanted:
            self._bringing = wanted = self._wanted.popleft()
            try:
                with self._hot_loads.load():
                    loaded = await self._bring(wanted)
            except BaseException as error:
                if isinstance(error, Exception):
                    self._tell_failure(wanted.identity, error)
                    _fail(wanted, error)
                    continue
                _fail(wanted, ClientClosed("the service was closed under the load of a snapshot"))
                raise
            finally:
                self._bringing = None
            for outcome in wanted.replaced:
                if not outcome.done():
                    outcome.set_result(replace(loaded, superseded=True))
            if not wanted.outcome.done():
                wanted.outcome.set_result(loaded)

    async def _bring(self, wanted: _Wanted) -> Loaded:
        if self._learn is not None and not self.chain.knows(wanted.identity):
            await self._learn(wanted.identity)
        try:
            loaded = Loaded(wanted.identity, await self._carry_out(wanted.identity))
        except _ChainBroken as broken:
            if wanted.save_whole is None:
                raise HotLoadFailed(
                    f"the snapshot {wanted.identity} can't be loaded: {broken}. What was served "
                    "before keeps serving. Save a snapshot with checkpoint_type='base', and load "
                    "that one.",
                    identity=wanted.identity,
                ) from broken
            logger.warning(
                "%s can't be loaded: %s. A whole snapshot is saved and loaded in its place; what "
                "was served before keeps serving meanwhile.",
                wanted.identity,
                broken,
            )
            whole = await wanted.save_whole()
            try:
                steps = await self._carry_out(whole.identity)
            except _ChainBroken as again:
                raise HotLoadFailed(
                    f"the snapshot {whole.identity}, saved in the place of {wanted.identity}, "
                    f"can't be loaded either: {again}. What was served before keeps serving.",
                    identity=whole.identity,
                ) from again
            loaded = Loaded(whole.identity, steps, saved=whole)
        if (events := self._events) is not None and self.current != loaded.identity:
            events.emit(SwapEvent(at=events.now(), identity=loaded.identity, previous=self.current))
        self.current = loaded.identity
        self._on_live(loaded.identity)
        return loaded

    async def _carry_out(self, identity: str) -> tuple[str, ...]:
        """Ask and look until the snapshot is live; what was asked for."""
        sync, pace = Sync(self.chain, identity), Pace()
        loop = asyncio.get_running_loop()
        notices = ReportSchedule(loop.time())
        waited_for: str | None = None
        reported = ""
        while True:
            left = self._timeout - notices.age(loop.time())
            looked_at = loop.time()
            seen = await self._look(waited_for, left)
            replicas = None if isinstance(seen, ApiError) else seen
            sync.prompt = self._long_poll
            decision = sync.look(replicas, loop.time())
            match decision:
                case Done():
                    self._tell("live", identity, notices.age(loop.time()))
                    return tuple(sync.loaded)
                case NeedWhole():
                    raise _ChainBroken(decision.reason)
                case Unloadable():
                    raise HotLoadFailed(
                        f"the snapshot {identity} was not loaded: {decision.reason}. What was "
                        "served before keeps serving.",
                        identity=identity,
                        replicas=dict(decision.replicas),
                    )
                case Post():
                    self._tell("loading", decision.identity, notices.age(loop.time()))
                    if await self._ask(sync, decision, left):
                        waited_for = decision.identity
                        pace.restart()
                    if not self._long_poll:
                        await asyncio.sleep(pace.take_next())
                case Wait():
                    if isinstance(seen, ApiError):
                        decision = Wait({"-": f"the look at it failed: {seen}"})
                    waited = notices.age(loop.time())
                    if self._events is not None:
                        before, reported = reported, _listed(decision.waiting_for)
                        if reported != before:
                            self._tell("waiting", identity, waited, reported)
                    if waited >= self._timeout:
                        raise _timeout(identity, waited, decision.waiting_for)
                    if notices.take_if_due(loop.time()):
                        logger.warning(
                            "hot load of %s: waiting for %.0f s (%s)",
                            identity,
                            waited,
                            _listed(decision.waiting_for),
                        )
                    if loop.time() - looked_at < Pace.LONGEST:
                        await asyncio.sleep(min(pace.take_next(), max(self._timeout - waited, 0.0)))

    def _tell(self, stage: SyncStage, identity: str, seconds: float, detail: str = "") -> None:
        if (events := self._events) is not None:
            events.emit(
                SyncEvent(
                    at=events.now(),
                    identity=identity,
                    stage=stage,
                    seconds=seconds,
                    detail=detail,
                )
            )

    def _tell_failure(self, identity: str, error: Exception) -> None:
        if (events := self._events) is not None:
            events.emit(
                FailureEvent(
                    at=events.now(), kind="sync", what="hot load", id=identity, error=error
                )
            )

    # -- requests ----------------------------------------------------------------------------------

    async def _ask(self, sync: Sync, post: Post, left: float) -> bool:
        """Ask for a load; False if it was refused for a passing reason."""
        try:
            difference = None if post.previous is None else difference_to(post.previous)
            answer = await self._requests.ask(post.identity, difference, backoff=_within(left))
        except ApiStatusError as error:
            now = asyncio.get_running_loop().time()
            decision = sync.refused(error.message, conflict=isinstance(error, Conflict), now=now)
            if isinstance(decision, NeedWhole):
                raise _ChainBroken(decision.reason) from error
            if isinstance(decision, Unloadable):
                raise HotLoadFailed(
                    f"the deployment refused the snapshot {post.identity}: {decision.reason}. What "
                    "it served before keeps serving.",
                    identity=post.identity,
                    cause=error,
                ) from error
            return False
        if answer.get("notice"):
            logger.info("hot load of %s: %s", post.identity, answer["notice"])
        self._long_poll = answer.get("long_poll") is True
        return True

    async def _look(self, waited_for: str | None, left: float) -> list[ReplicaStatus] | ApiError:
        """Read the replicas' reports once; the failure where that can't be done now."""
        query, timeout = "", STATUS_TIMEOUT
        if self._long_poll and waited_for is not None:
            hold = max(0.0, min(LONG_POLL, left))
            query, timeout = (
                f"?wait_for={quote(waited_for, safe='')}&timeout_s={hold:.3f}",
                hold + STATUS_TIMEOUT,
            )
        try:
            once = Backoff(attempts=1)
            return read_replicas(await self._requests.status(query, timeout=timeout, backoff=once))
        except ApiError as error:
            logger.debug("the look at a hot load failed, and is made again: %s", error)
            return error


def _within(left: float) -> Backoff:
    """Retry for as long as the load has left."""
    return Backoff(max_elapsed=max(left, 0.0), attempts=1000, cap=8.0, spread=0.5)


def _fail(wanted: _Wanted, error: Exception) -> None:
    for outcome in (wanted.outcome, *wanted.replaced):
        if not outcome.done():
            outcome.set_exception(error)
            outcome.exception()  # whoever still waits gets it, and nobody has to


def _timeout(identity: str, waited: float, late: Mapping[str, str]) -> HotLoadTimeout:
    return HotLoadTimeout(
        f"the snapshot {identity} is not on every replica after {waited:.0f} s: "
        f"{_listed(late)}. Look at the deployment, or raise hotload_timeout_s.",
        identity=identity,
        replicas=dict(late),
    )


def _listed(replicas: Mapping[str, str]) -> str:
    return "; ".join(f"replica {name}: {report}" for name, report in replicas.items())
