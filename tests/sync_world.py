"""A deployment in one process for histories of weight syncs, in virtual time.

Store, trainer exports, deltas and engine weights are the real ones; the gateway follows the
contract. Faults are drawn at every request: replicas lag, restart, fail, report errors of other
loads, and another client loads its own snapshot.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from fireworks_training import FireworksTrainingError, Snapshot
from fireworks_training._async.weights.weight_sync import Loaded, Target, WeightSync
from fireworks_training._core.snapshots import Chain
from fireworks_training._wire.training.bodies import decode_snapshot
from fireworks_training.errors import ApiStatusError, Conflict
from fireworks_training.local.engine.weights import Prepared, SnapshotRefused, WeightSet
from fireworks_training.local.store.snapshots import SnapshotStore, hashes_of, total_sha256
from fireworks_training.local.trainer.queue.operations import OperationFailed
from fireworks_training.local.trainer.run.exports import SnapshotExports

T = TypeVar("T")
MODEL = "m"
TIMEOUT = 60.0


class _Instant(selectors.SelectSelector):
    """A selector to which nothing arrives: a wait only moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits, and nothing will happen"
        self.now += max(timeout, 0.0)
        return []


class InstantLoop(asyncio.SelectorEventLoop):
    """An event loop on a clock of its own, which jumps to the next timer."""

    def __init__(self) -> None:
        self._instant = _Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time."""
    with asyncio.Runner(loop_factory=InstantLoop) as runner:
        return runner.run(main)


def initial() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "a": torch.randn(16, 7, generator=generator).bfloat16().float(),
        "b": torch.randn(9, generator=generator).bfloat16().float(),
    }


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return total_sha256(hashes_of({name: t.bfloat16() for name, t in tensors.items()}))


class Replica:
    """One replica: an engine's weights, and the row that the gateway reports for them."""

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store
        self.start(None)

    def start(self, identity: str | None) -> None:
        """Start a new process, which joins with `identity` if that can be built up."""
        self.tensors = initial()
        self.weights = WeightSet(self.tensors, self._store, MODEL)
        self.pending: str | None = None
        self.prepared: Prepared | None = None
        self.error: tuple[str, str] | None = None
        self.ready = True
        if identity is not None:
            try:
                self.weights.swap(self.weights.prepare(identity, restore=True))
            except SnapshotRefused:
                self.ready = False
        self.seen = self.row()

    @property
    def identity(self) -> str | None:
        return self.weights.held.identity

    def post(self, identity: str) -> None:
        self.error, self.prepared = None, None
        self.pending = None if identity == self.identity else identity
        self.seen = self.row()

    def prepare(self) -> None:
        if self.pending is not None and self.prepared is None:
            try:
                self.prepared = self.weights.prepare(self.pending)
            except SnapshotRefused as error:
                self.fail(str(error))

    def swap(self) -> None:
        if self.prepared is not None:
            try:
                self.weights.swap(self.prepared)
            except SnapshotRefused as error:
                self.fail(str(error))
            self.pending = self.prepared = None

    def fail(self, reason: str) -> None:
        if self.pending is not None:
            self.error, self.pending, self.prepared = (self.pending, reason), None, None

    def row(self) -> dict[str, Any]:
        stage, target = "ready", self.identity
        loading: dict[str, Any] = {}
        if self.pending is not None:
            stage, target = "loading", self.pending
        elif self.error is not None:
            stage, target = "error", self.error[0]
            loading["error"] = self.error[1]
        return {
            "current_snapshot_identity": self.identity,
            "readiness": self.ready,
            "loading_state": {"stage": stage, "target_snapshot_identity": target, **loading},
        }


@dataclass
class World:
    """One deployment, one trainer, and the clients that come and go.

    Attributes:
        choose: draws one of the names of events that may happen now.
        naive: whether the server checks nothing, reports nothing and applies whatever it is sent.
        prompt: whether the server says that it notes a request before it answers.
        truth: hashes of the weights by the identity that stands for them.
    """

    folder: Path
    replicas_wanted: int = 2
    naive: bool = False
    prompt: bool = True
    choose: Callable[[list[str]], str] = lambda events: "nothing"
    truth: dict[str | None, str] = field(default_factory=dict[str | None, str])
    foreign: str | None = None
    loaded: str | None = None
    disk_full: bool = False
    events: None = None
    posts: list[tuple[str, str | None]] = field(default_factory=list[tuple[str, str | None]])

    def __post_init__(self) -> None:
        self.store = SnapshotStore(
            self.folder, writer="job", free_bytes=lambda _: 0 if self.disk_full else 1 << 40
        )
        self.truth[None] = digest(initial())
        self.replicas = [Replica(self.store) for _ in range(self.replicas_wanted)]
        self.masters = initial()
        self._names = 0
        self._last: tuple[str, dict[str, torch.Tensor]] | None = None
        self.deltas: dict[str, str] = {}
        self.new_client()

    # -- the client's side -------------------------------------------------------------------------

    def new_client(self) -> None:
        """Attach another process to the deployment, with a model of its own."""
        self.exports = SnapshotExports(self.store, base_model=MODEL, dtype="bfloat16", lora=None)
        self._last = None
        self.chain = Chain()
        self.sync = WeightSync(
            self,  # type: ignore[arg-type]
            Target("", "d", MODEL),
            chain=self.chain,
            timeout=TIMEOUT,
        )

    def train(self, seed: int, size: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.masters.values():
            tensor += size * torch.randn(tensor.shape, generator=generator)

    def save(self, wanted: Any = None) -> Snapshot:
        """Save a snapshot: the trainer's part, and the client's part with its answer.

        Raises:
            OperationFailed: nothing was written.
        """
        asked = self.chain.take_next_type(wanted)
        self._names += 1
        name = f"s{self._names}"
        tensors = self.exports.capture(name, self.masters)
        truth = total_sha256(hashes_of(tensors))
        if self.naive:
            snapshot = self._naive_save(name, tensors, asked)
        else:
            answer = self.exports.write(name, tensors, asked)
            snapshot = decode_snapshot(answer.fields)
            assert snapshot.sha256 == truth
        self.truth[snapshot.identity] = truth
        return self.chain.saved(snapshot, asked)

    def _naive_save(self, name: str, tensors: dict[str, torch.Tensor], asked: str) -> Snapshot:
        previous = self._last
        self._last = (name, tensors)
        self.store.write(name, tensors, base_model=MODEL, dtype="bfloat16")
        if asked == "delta" and previous is not None:
            self.deltas[name] = previous[0]
        return Snapshot(name)

    async def load(self, identity: str, *, may_save: bool = True) -> Loaded | Exception:
        """Load a snapshot; returns the typed error if it was not loaded."""

        async def save_whole() -> Snapshot:
            return self.save("base")

        try:
            async with asyncio.timeout(20 * TIMEOUT):
                return await self.sync.load(identity, save_whole=save_whole if may_save else None)
        except (FireworksTrainingError, OperationFailed) as error:
            return error

    # -- the gateway's side, as a transport --------------------------------------------------------

    async def call(self, method: str, url: str, *, json: Any = None, **_: Any) -> dict[str, Any]:
        await asyncio.sleep(0.001)
        self.happen()
        if method == "POST":
            return self._post(json)
        for replica in self.replicas:
            if not self.naive and self.choose(["report", "lag"]) == "lag":
                continue
            replica.seen = replica.row()
        return {"replicas": [replica.seen for replica in self.replicas if replica.seen]}

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        identity = body["identity"]
        metadata = body.get("incremental_snapshot_metadata") or {}
        previous = metadata.get("previous_snapshot_identity")
        self.posts.append((identity, previous))
        if identity not in self.truth:
            raise ApiStatusError("there is no such snapshot", status=404)
        if self.naive:
            for replica in self.replicas:
                self._naive_load(replica, identity, previous)
            return {}
        if previous is not None:
            for replica in self.replicas:
                if replica.identity not in (previous, identity):
                    raise Conflict(f"a replica holds {replica.identity}", status=409)
        for replica in self.replicas:
            replica.post(identity)
        if self.choose(["answer", "answer", "lose the answer"]) == "lose the answer":
            self.happen()
            return self._post(body)  # as the transport does when the connection broke
        return {"long_poll": self.prompt}

    def _naive_load(self, replica: Replica, identity: str, previous: str | None) -> None:
        """Load without checks: a delta is added to whatever is held, or taken for the whole."""
        new = self.store.load(identity)[1]
        based_on = self.deltas.get(identity)
        if based_on is None or previous is None:
            if based_on is not None:
                new = {name: torch.zeros_like(t) for name, t in new.items()}
        else:
            before = self.store.load(based_on)[1]
            new = {
                name: (
                    replica.tensors[name].bfloat16().view(torch.int16)
                    ^ before[name].view(torch.int16)
                    ^ t.view(torch.int16)
                ).view(torch.bfloat16)
                for name, t in new.items()
            }
        for name, tensor in replica.tensors.items():
            tensor.copy_(new[name])
        held = replica.weights.held
        replica.weights.held = type(held)(identity, "base", "", held.version + 1)

    # -- what happens meanwhile --------------------------------------------------------------------

    EVENTS = ("work", "work", "work", "nothing", "restart", "forget", "fail", "stale", "foreign")

    def happen(self) -> None:
        """Let one event happen, then check the invariant."""
        event = self.choose(list(self.EVENTS if not self.naive else ("nothing",)))
        number = (
            int(self.choose([str(index) for index in range(len(self.replicas))]) or 0)
            if (event in ("restart", "forget", "fail", "stale"))
            else 0
        )
        replica = self.replicas[number]
        match event:
            case "work":
                self.work()
            case "restart":
                replica.start(self.loaded)
            case "forget":
                replica.start(None)
            case "fail":
                replica.fail("out of memory")
            case "stale":
                if replica.pending is None:
                    replica.error = (self.foreign or "long ago", "an old error")
            case "foreign":
                if self.foreign is not None:
                    for one in self.replicas:
                        one.post(self.foreign)
            case _:
                pass
        self.check()

    def work(self) -> None:
        """Let each replica take the next step of its load."""
        for replica in self.replicas:
            if replica.prepared is not None:
                replica.swap()
            else:
                replica.prepare()
        held = {replica.identity for replica in self.replicas}
        if len(held) == 1 and not any(replica.pending for replica in self.replicas):
            self.loaded = held.pop() or self.loaded

    def check(self) -> None:
        """Check that each replica serves the weights that its identity stands for."""
        for replica in self.replicas:
            served = digest(replica.tensors)
            assert served == self.truth[replica.identity], (
                f"under {replica.identity} other weights are served"
            )

    def damage(self, identity: str) -> None:
        """Flip a bit of the stored tensors.

        As on a disk: what an engine has read and verified already stays in memory as it was.
        """
        for file in self.store.path(identity).glob("*.safetensors"):
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            damaged = file.with_suffix(".damaged")
            damaged.write_bytes(raw)
            damaged.replace(file)
