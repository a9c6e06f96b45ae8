"""One model's line of operations: order, idempotency, atomic steps, kept results. No I/O, no clock.

Knows sequence numbers, what an operation of each role (`_core.operations.Role`) does to the step it
stands in, and for how long results stay. Does not know operations, HTTP, threads or torch. The
client keeps the same rules by an implementation of its own (`_core.operations`); each tests the
other.

Rules:
1. Operations run strictly in the order of `seq_id`, from 1, one at a time; gaps are waited for.
2. The same `seq_id` with the same digest is the same operation; with another digest it is refused.
3. A refused submit (bad content) takes its place as an operation that has failed already.
4. A step is the operations up to and including one of role OPTIM, or up to a LOAD or DISCARD. Once
   a failure stands, those of role GRADIENT and OPTIM fail with it as their cause, without running;
   OPTIM then clears it.
       role           fails by itself                     succeeds
       FORWARD, SAVE  nothing else happens                nothing else happens
       GRADIENT       the rest of the step fails          gradients were added
       OPTIM          its gradients are dropped           a new step begins
       LOAD           all up to the next OPTIM fails      a new step begins, without gradients
       DISCARD        nothing else happens                a new step begins
   LOAD and DISCARD run even while a failure stands.
5. After a failure the gradients are dropped before anything else runs.
6. One that stands alone (FORWARD, SAVE) may be detached once it has what it needs: the line moves
   on, and its result comes later.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from fireworks_training._core.operations import Role

OperationT = TypeVar("OperationT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of an operation.

    Attributes:
        message: what happened, why, what to do next.
        category: "user" or "server".
        error_class: name of the kind of failure.
        cause: the failure behind a PrecedingOperationFailed, with its place in the line.
    """

    message: str
    category: str = "user"
    error_class: str = "InvalidRequest"
    cause: Failure | None = None
    cause_seq_id: int | None = None


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one line.

    Attributes:
        ahead: how many places may be taken beyond the last one that has run.
        ahead_bytes: bytes of all operations that wait (the next one to run always fits).
        results, result_bytes: how many finished results are kept, and their bytes.
        digests: for how many places behind the last that ran a repeated submit is recognised.
    """

    ahead: int = 4096
    ahead_bytes: int = 512 << 20
    results: int = 4096
    result_bytes: int = 256 << 20
    digests: int = 65536


class Taken(Exception):
    """Raised for a place that holds another operation."""


class TooFarAhead(Exception):
    """Raised for a place beyond those that the line keeps waiting."""


class Closed(Exception):
    """Raised by a line that takes no new operations."""


class UnknownPlace(Exception):
    """Raised for a place for which nothing was submitted."""


class Expired(Exception):
    """Raised for a result that was dropped to bound memory."""


@dataclass(slots=True)
class _Waiting(Generic[OperationT]):
    role: Role
    operation: OperationT | Failure
    size: int


@dataclass(slots=True)
class _Done(Generic[ResultT]):
    outcome: ResultT | Failure
    size: int


@dataclass(frozen=True, slots=True)
class NextOperation(Generic[OperationT]):
    """The operation to run now.

    Attributes:
        drop_gradients: whether accumulated gradients have to be dropped first.
    """

    seq_id: int
    operation: OperationT
    drop_gradients: bool


@dataclass(frozen=True, slots=True)
class Advance(Generic[OperationT]):
    """The places that finished without running, and the operation to run, if there is one."""

    finished: list[int]
    run: NextOperation[OperationT] | None


class ModelLine(Generic[OperationT, ResultT]):
    """Keeps the module's rules for one model; every method returns at once, to one caller.

    Args:
        limits: bounds on what it keeps.
        atomic_steps: whether a failure takes the rest of its step with it. False: only what failed
            fails, and what was accumulated beside it stays, as on other servers.
    """

    def __init__(self, limits: QueueLimits | None = None, *, atomic_steps: bool = True) -> None:
        self._limits = limits or QueueLimits()
        self._atomic_steps = atomic_steps
        self._next = 1
        self._running: tuple[int, Role] | None = None
        self._waiting: dict[int, _Waiting[OperationT]] = {}
        self._waiting_bytes = 0
        self._digests: OrderedDict[int, bytes] = OrderedDict()
        self._fresh: OrderedDict[int, _Done[ResultT]] = OrderedDict()
        self._delivered: OrderedDict[int, _Done[ResultT]] = OrderedDict()
        self._result_bytes = 0
        self._detached: set[int] = set()
        self._failed: tuple[int, Failure] | None = None
        self._drop_first = False
        self._closed = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs, and nothing that could run waits."""
        return self._running is None and self._next not in self._waiting

    @property
    def waits_for(self) -> int | None:
        """The missing place that holds up operations already here, or None."""
        return self._next if self._waiting and self.idle else None

    def close(self) -> None:
        """Take no new operations; those that wait still run. Idempotent."""
        self._closed = True

    def abandon(self, failure: Failure) -> list[int]:
        """Fail what still waits, since its turn will not come. Returns the places."""
        left = sorted(self._waiting)
        for seq_id in left:
            entry = self._waiting.pop(seq_id)
            own = entry.operation if isinstance(entry.operation, Failure) else failure
            self._keep(seq_id, own, 0)
        self._waiting_bytes = 0
        return left

    def holds(self, seq_id: int, digest: bytes) -> bool:
        """Whether a place holds the operation of this content, whatever became of it."""
        return self._digests.get(seq_id) == digest

    def submit(
        self,
        seq_id: int,
        digest: bytes,
        role: Role,
        operation: OperationT | Failure,
        size: int = 0,
    ) -> bool:
        """Take a place. True if the operation is new, False if it has that place already.

        Args:
            seq_id: the place, at least 1.
            digest: hash of the operation's content.
            operation: what to run, or why it was refused.
            size: bytes that it occupies while it waits.

        Raises:
            Taken, TooFarAhead, Closed: the line is unchanged.
        """
        known = self._digests.get(seq_id)
        if known is not None:
            if known != digest:
                raise Taken(f"seq_id {seq_id} was used for another operation")
            return False
        if seq_id < self._next:
            raise Taken(f"seq_id {seq_id} was used long ago; the next one to run is {self._next}")
        if self._closed:
            raise Closed("the model was unloaded and takes no more operations")
        if seq_id != self._next:
            self._check_room(seq_id, size)
        self._digests[seq_id] = digest
        self._waiting[seq_id] = _Waiting(role, operation, size)
        self._waiting_bytes += size
        return True

    def _check_room(self, seq_id: int, size: int) -> None:
        limits = self._limits
        if seq_id >= self._next + limits.ahead:
            raise TooFarAhead(
                f"seq_id {seq_id} is more than {limits.ahead} ahead of {self._next}, the next to"
                " run; send it again when earlier results are in"
            )
        if self._waiting_bytes + size > limits.ahead_bytes:
            raise TooFarAhead(
                f"{self._waiting_bytes} bytes of operations wait already; send this one again when"
                " earlier results are in"
            )

    def advance(self) -> Advance[OperationT]:
        """Move on to the next operation that has to run, settling those that don't run."""
        finished: list[int] = []
        while self._running is None and (entry := self._waiting.pop(self._next, None)) is not None:
            seq_id = self._next
            self._waiting_bytes -= entry.size
            if not self._atomic_steps:
                self._failed, self._drop_first = None, False
            operation = entry.operation
            if isinstance(operation, Failure):
                self._settle(seq_id, entry.role, operation)
                finished.append(seq_id)
            elif self._failed is not None and entry.role in (Role.GRADIENT, Role.OPTIM):
                self._settle_preceded(seq_id, entry.role, self._failed)
                finished.append(seq_id)
            else:
                self._running = (seq_id, entry.role)
                drop, self._drop_first = self._drop_first, False
                return Advance(finished, NextOperation(seq_id, operation, drop))
        return Advance(finished, None)

    def succeed(self, result: ResultT, size: int = 0) -> int:
        """Note that the running operation is done. Returns its place."""
        seq_id, role = self._take_running()
        if role in (Role.DISCARD, Role.LOAD):
            self._failed = None
        self._finish(seq_id, result, size)
        return seq_id

    def fail(self, failure: Failure) -> int:
        """Note that the running operation failed. Returns its place."""
        seq_id, role = self._take_running()
        self._settle(seq_id, role, failure)
        return seq_id

    def detach(self) -> int:
        """Let the running operation go on beside the line, which moves on. Returns its place.

        Only for one that stands alone: how it ends concerns no other.
        """
        seq_id, role = self._take_running()
        if not role.stands_alone:
            raise RuntimeError(f"an operation that {role.value} can't leave the line")
        self._detached.add(seq_id)
        self._next = seq_id + 1
        return seq_id

    def settle(self, seq_id: int, outcome: ResultT | Failure, size: int = 0) -> None:
        """Note that a detached operation has ended."""
        self._detached.remove(seq_id)
        self._keep(seq_id, outcome, size)

    def result(self, seq_id: int) -> ResultT | Failure | None:
        """The result or failure of a place; None while it waits or runs.

        Raises:
            UnknownPlace, Expired.
        """
        done = self._fresh.get(seq_id) or self._delivered.get(seq_id)
        if done is not None:
            return done.outcome
        if seq_id in self._waiting or seq_id in self._detached:
            return None
        if self._running is not None and self._running[0] == seq_id:
            return None
        if 1 <= seq_id < self._next:
            raise Expired(f"the result of seq_id {seq_id} was dropped to bound memory")
        raise UnknownPlace(f"nothing was submitted with seq_id {seq_id}")

    def delivered(self, seq_id: int) -> None:
        """Note that a result was handed out: it is among the first to be dropped for room."""
        done = self._fresh.pop(seq_id, None)
        if done is not None:
            self._delivered[seq_id] = done

    def _take_running(self) -> tuple[int, Role]:
        if self._running is None:
            raise RuntimeError("nothing is running")
        running, self._running = self._running, None
        return running

    def _settle(self, seq_id: int, role: Role, failure: Failure) -> None:
        """Settle an operation that failed by its own cause."""
        if role.changes_model:
            # The first failure of a step is its cause; a load begins a step, and an OPTIM ends one.
            if role is Role.OPTIM:
                self._failed = None
            elif self._failed is None or role is Role.LOAD:
                self._failed = (seq_id, failure)
            self._drop_first = True
        self._finish(seq_id, failure, 0)

    def _settle_preceded(self, seq_id: int, role: Role, failed: tuple[int, Failure]) -> None:
        cause_seq_id, cause = failed
        self._finish(
            seq_id,
            Failure(
                f"not applied, since operation {cause_seq_id} of the same step had failed:"
                f" {cause.message}",
                cause.category,
                "PrecedingOperationFailed",
                cause,
                cause_seq_id,
            ),
            0,
        )
        if role is Role.OPTIM:
            self._failed = None

    def _finish(self, seq_id: int, outcome: ResultT | Failure, size: int) -> None:
        self._next = seq_id + 1
        self._keep(seq_id, outcome, size)

    def _keep(self, seq_id: int, outcome: ResultT | Failure, size: int) -> None:
        self._fresh[seq_id] = _Done(outcome, size)
        self._result_bytes += size
        limits = self._limits
        while (
            len(self._fresh) + len(self._delivered) > limits.results
            or self._result_bytes > limits.result_bytes
        ):
            oldest = self._delivered or self._fresh
            if len(self._fresh) == 1 and oldest is self._fresh:
                break
            self._result_bytes -= oldest.popitem(last=False)[1].size
        while self._digests and next(iter(self._digests)) < self._next - limits.digests:
            self._digests.popitem(last=False)
