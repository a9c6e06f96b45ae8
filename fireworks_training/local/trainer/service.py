"""The trainer's sessions and models, and the task that runs their lines.

Knows: which models there are, whose turn it is, who waits for a result. Does not know HTTP or wire
formats (results come in encoded), nor what an operation does.

Ids are made from what the client sent, so that a repeated request finds its first answer:
`<session>:train:<model_seq_id>` for a model, `<model>:op-<seq_id>`, `<model>:create` and
`<model>:unload` for results.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fireworks_training.local.results import RequestOutcome
from fireworks_training.local.trainer.queue.leases import Leases
from fireworks_training.local.trainer.queue.line import (
    Failure,
    ModelLine,
    NextOperation,
    QueueLimits,
    Taken,
)
from fireworks_training.local.trainer.queue.operations import (
    Answer,
    BackwardRequest,
    Codec,
    Deferred,
    DiscardGradients,
    EncodedResult,
    Operation,
    OperationFailed,
    Pass,
    SaveSnapshot,
    Submission,
)
from fireworks_training.local.trainer.run.slots import CreateModel, Gone, Job, Slot, UnknownRequest
from fireworks_training.local.trainer.run.torch_thread import TorchThread
from fireworks_training.local.trainer.wire.datums import make_backward

_log = logging.getLogger("fireworks_training.local.trainer")

MAX_MODELS = 8
MAX_ENDED_MODELS = 16
MAX_SESSIONS = 1024
SESSION_TIMEOUT_S = 300.0
FEWEST_LOOKS_S = 0.02
MAX_EXPORTS = 2
"""Snapshots that are captured and not yet written; each is a copy of the model in memory."""


EncodeFailure = Callable[[Failure, str], EncodedResult]
"""A failure and its request's id to the body of an answer."""


class Full(Exception):
    """As many as there may be."""


@dataclass(slots=True)
class _Session:
    last_seen: float
    finished: bool = False
    ended_because: str = ""


class TrainerService:
    """See the module.

    Args:
        codec: of what is not an operation.
        encode_failure: of all failures.
        clock: monotonic seconds.
        limits: of each model's line.
        session_timeout_s: a session that gave no sign of life for so long is ended.
    """

    def __init__(
        self,
        codec: Codec,
        encode_failure: EncodeFailure,
        clock: Callable[[], float],
        limits: QueueLimits | None = None,
        session_timeout_s: float = SESSION_TIMEOUT_S,
    ) -> None:
        self._session_timeout_s = session_timeout_s
        self._codec = codec
        self._encode_failure = encode_failure
        self._clock = clock
        self._limits = limits
        self._sessions: dict[str, _Session] = {}
        self._slots: dict[str, Slot] = {}
        self._work = asyncio.Event()
        self.torch = TorchThread()
        self.exports = TorchThread("export")
        self._export_room = asyncio.Semaphore(MAX_EXPORTS)
        self._exporting: set[asyncio.Task[None]] = set()

    # -- sessions --------------------------------------------------------------------------------

    def create_session(self) -> str:
        """A new session's id; raises as `adopt_session`."""
        session_id = f"ts-{uuid.uuid4().hex}"
        self.adopt_session(session_id)
        return session_id

    def adopt_session(self, session_id: str) -> None:
        """Takes up a session that the gateway made. Idempotent while it is alive.

        Raises:
            Full: there are as many live ones as there may be.
        """
        if session_id in self._sessions:
            return
        if len(self._sessions) >= MAX_SESSIONS:
            stale = [key for key, session in self._sessions.items() if self._abandoned(session)]
            for key in stale:
                del self._sessions[key]
            if not stale:
                raise Full(f"this trainer has {MAX_SESSIONS} live sessions; finish one first")
        self._sessions[session_id] = _Session(self._clock())

    def heartbeat(self, session_id: str) -> None:
        """Raises Gone for a session that is not alive."""
        session = self._sessions.get(session_id)
        if session is None or session.finished:
            reason = session.ended_because if session is not None else ""
            raise Gone(reason or "this trainer has no such session", "SessionGone")
        session.last_seen = self._clock()

    def finish_session(self, session_id: str) -> None:
        """Unloads the session's models when their accepted operations have run. Idempotent."""
        session = self._sessions.get(session_id)
        if session is None:
            return
        session.finished = True
        for slot in self._slots.values():
            if slot.session_id == session_id:
                self._ask_unload(slot)

    def _abandoned(self, session: _Session | None) -> bool:
        if session is None or session.finished:
            return True
        return self._clock() - session.last_seen > self._session_timeout_s

    def _sign_of_life(self, slot: Slot) -> None:
        session = self._sessions.get(slot.session_id)
        if session is not None:
            session.last_seen = self._clock()

    def end_silent_sessions(self) -> float:
        """Ends the sessions that were silent for too long; returns the seconds to the next look."""
        silent_s, now = self._session_timeout_s, self._clock()
        for session_id, session in self._sessions.items():
            if session.finished or now - session.last_seen <= silent_s:
                continue
            session.ended_because = f"the session was ended: no heartbeat for {silent_s:g} s"
            _log.warning("session %s was silent for %g s: it is ended", session_id, silent_s)
            self.finish_session(session_id)
        # A session that falls silent is ended within a quarter of the time over.
        return max(silent_s / 4, FEWEST_LOOKS_S)

    async def watch_sessions(self) -> None:
        """Ends silent sessions until cancelled."""
        while True:  # noqa: ASYNC110 - silence is not an event
            await asyncio.sleep(self.end_silent_sessions())

    # -- models ----------------------------------------------------------------------------------

    def create_model(self, session_id: str, model_seq_id: int, request: CreateModel) -> str:
        """Takes the request for a model; returns the model's id, the same one when repeated.

        Raises:
            Gone: no such session.
            line.Taken: the same ids were used for another model.
            Full: as many models are loaded as there may be.
        """
        self.heartbeat(session_id)
        model_id = f"{session_id}:train:{model_seq_id}"
        known = self._slots.get(model_id)
        if known is not None:
            if known.request.digest != request.digest:
                raise Taken(f"model_seq_id {model_seq_id} was used for another model")
            return model_id
        self._make_room()
        self._slots[model_id] = Slot(
            model_id, session_id, request, ModelLine(self._limits), Leases()
        )
        self._work.set()
        return model_id

    def _make_room(self) -> None:
        loaded = [slot for slot in self._slots.values() if not slot.unloading]
        for slot in loaded:
            if len(loaded) >= MAX_MODELS and self._abandoned(self._sessions.get(slot.session_id)):
                _log.warning("unloading %s: its session has been silent", slot.model_id)
                self._ask_unload(slot)
        if sum(not slot.unloading for slot in self._slots.values()) >= MAX_MODELS:
            raise Full(
                f"this trainer holds {MAX_MODELS} models already: unload one, or close the client"
                " that made it"
            )
        ended = [key for key, slot in self._slots.items() if slot.unloaded is not None]
        for key in ended[: max(len(ended) - MAX_ENDED_MODELS, 0)]:
            del self._slots[key]

    def slot(self, model_id: str) -> Slot:
        """Raises Gone for a model that this process never made."""
        slot = self._slots.get(model_id)
        if slot is None:
            raise Gone(
                f"this trainer has no model {model_id[:100]!r}: the process that held it is gone."
                " Make a new one and load a saved state into it",
                "ModelLost",
            )
        return slot

    def unload(self, model_id: str) -> str:
        """Asks for the model's end, after its accepted operations. Returns the request's id."""
        self._ask_unload(self.slot(model_id))
        return f"{model_id}:unload"

    def _ask_unload(self, slot: Slot) -> None:
        slot.unloading = True
        slot.line.close()
        self._work.set()

    # -- operations ------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> str:
        """Takes an operation's place in its model's line; returns the id of its result.

        Raises:
            Gone, line.Taken, line.TooFarAhead, line.Closed: no place was taken.
            OperationFailed: the operation is refused, and stands in its place as failed (but for a
                backward by a forward, which takes no place).
            leases.UnknownForward: likewise, no place was taken.
        """
        slot = self.slot(submission.model_id)
        self._sign_of_life(slot)
        if isinstance(slot.created, Failure):
            raise Gone(f"the model was not made: {slot.created.message}", "ModelLost")
        operation = submission.operation
        if isinstance(operation, BackwardRequest):
            operation = self._resolved(slot, submission, operation)
        refused = isinstance(operation, OperationFailed)
        slot.line.submit(
            submission.seq_id,
            submission.digest,
            submission.role,
            _failure(operation)
            if isinstance(operation, OperationFailed)
            else Job(operation, submission.codec),
            0 if refused else submission.size,
        )
        self._work.set()
        if isinstance(operation, OperationFailed):
            raise operation
        return f"{submission.model_id}:op-{submission.seq_id}"

    def _resolved(self, slot: Slot, submission: Submission, request: BackwardRequest) -> Operation:
        """A backward with the inputs it refers to, which are its own from here on."""
        if slot.line.holds(submission.seq_id, submission.digest):
            return DiscardGradients()  # never run: the line has this operation already
        return make_backward(request, slot.leases.find(request.forward_seq_id, self._clock()))

    async def result(self, request_id: str, hold_s: float) -> EncodedResult | None:
        """The result, waited for up to `hold_s` seconds; None if it is not there by then.

        A caller that goes away changes nothing: the result stays for the next one.

        Raises:
            Gone: model or result are not here any more.
            NotFound: nothing was submitted under this id.
        """
        model_id, _, tail = request_id.rpartition(":")
        if not model_id:
            raise UnknownRequest(f"there is no request {request_id[:100]!r}")
        slot = self.slot(model_id)
        self._sign_of_life(slot)
        try:
            async with asyncio.timeout(hold_s):
                outcome = await slot.result(tail)
        except TimeoutError:
            return None
        return self._encoded(outcome, request_id)

    def _encoded(self, outcome: EncodedResult | Failure, request_id: str) -> EncodedResult:
        if isinstance(outcome, Failure):
            return self._encode_failure(outcome, request_id)
        return outcome

    async def ended(
        self, model_id: str, cursor: int, hold_s: float
    ) -> tuple[list[RequestOutcome], int]:
        """What has ended of a model after a cursor, waited for up to `hold_s` seconds.

        Raises:
            Gone: the model is not here.
            NotFound: no answer of this model's polls gave this cursor.
        """
        slot = self.slot(model_id)
        self._sign_of_life(slot)
        if cursor > slot.ended.cursor:
            raise UnknownRequest(
                f"prev_cursor {cursor} is beyond the last one, {slot.ended.cursor}"
            )
        await slot.ended.wait(cursor, hold_s)
        request_ids, cursor = slot.ended.after(cursor)
        return [self._ended(slot, request_id) for request_id in request_ids], cursor

    def _ended(self, slot: Slot, request_id: str) -> RequestOutcome:
        try:
            outcome = slot.outcome(request_id.rpartition(":")[2])
        except Gone:
            outcome = None
        if outcome is None:
            return RequestOutcome(
                request_id, failed=False
            )  # asked for by name, it says what became of it
        encoded = self._encoded(outcome, request_id)
        failed = isinstance(outcome, Failure)
        return RequestOutcome(request_id, failed, encoded.body, encoded.content_type)

    def retrieved(self, model_id: str, request_ids: Iterable[str]) -> None:
        """Results of a model that its client has; others are ignored. Raises Gone."""
        slot = self.slot(model_id)
        for request_id in request_ids:
            owner, _, tail = request_id.rpartition(":")
            if owner == model_id:
                slot.delivered(tail)

    # -- running ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs the lines until cancelled: one operation of each model in turn, one at a time."""
        while True:
            await self._work.wait()
            self._work.clear()
            busy = True
            while busy:
                busy = False
                for slot in list(self._slots.values()):
                    busy |= await self._turn(slot)

    async def _turn(self, slot: Slot) -> bool:
        if slot.created is None:
            await self._create(slot)
            return True
        if slot.unloaded is not None:
            return False
        if isinstance(slot.created, Failure):
            lost = f"the model was not made: {slot.created.message}"
            self._abandon(slot, Failure(lost, slot.created.category, "ModelLost"))
        advance = slot.line.advance()
        for seq_id in advance.finished:
            slot.notify(f"op-{seq_id}")
        if advance.run is not None:
            await self._run(slot, advance.run)
            return True
        if slot.unloading:
            gap = (
                f"the model was unloaded, and operation {slot.line.waits_for} before it never came"
            )
            self._abandon(slot, Failure(gap, error_class="ModelUnloaded"))
            slot.model, slot.leases = None, Leases()
            answer = Answer({"model_id": slot.model_id, "type": "unload_model"})
            slot.unloaded = self._codec.encode(answer)
            slot.notify("unload")
        return False

    def _abandon(self, slot: Slot, failure: Failure) -> None:
        for seq_id in slot.line.abandon(failure):
            slot.notify(f"op-{seq_id}")

    async def _create(self, slot: Slot) -> None:
        try:
            slot.model = await self.torch.run(slot.request.make)
            answer = Answer({"model_id": slot.model_id, **slot.request.answer})
            slot.created = self._codec.encode(answer)
        except Exception as error:
            slot.created = _failure(error)
            self._ask_unload(slot)
        slot.notify("create")

    async def _run(self, slot: Slot, run: NextOperation[Job]) -> None:
        model, job = slot.model, run.operation
        assert model is not None, "a line runs only after its model was made"

        def execute() -> EncodedResult | Deferred:
            result = model.execute(job.operation, drop_gradients=run.drop_gradients)
            return result if isinstance(result, Deferred) else job.codec.encode(result)

        saving = isinstance(job.operation, SaveSnapshot)
        if saving:
            await self._export_room.acquire()
        try:
            result = await self.torch.run(execute)
        except BaseException as error:
            if saving:
                self._export_room.release()
            if not isinstance(error, Exception):
                raise
            slot.line.fail(_failure(error))
        else:
            if isinstance(result, Deferred):
                self._detach(slot, result)
                return
            slot.line.succeed(result, len(result.body))
            if isinstance(job.operation, Pass) and not job.operation.backward:
                slot.leases.keep(run.seq_id, job.operation, self._clock())
        slot.notify(f"op-{run.seq_id}")

    def _detach(self, slot: Slot, deferred: Deferred) -> None:
        seq_id = slot.line.detach()
        task = asyncio.create_task(self._export(slot, seq_id, deferred))
        self._exporting.add(task)
        task.add_done_callback(self._exporting.discard)

    async def _export(self, slot: Slot, seq_id: int, deferred: Deferred) -> None:
        try:
            encoded = await self.exports.run(lambda: self._codec.encode(deferred.finish()))
        except Exception as error:
            slot.line.settle(seq_id, _failure(error))
        else:
            slot.line.settle(seq_id, encoded, len(encoded.body))
        finally:
            self._export_room.release()
        slot.notify(f"op-{seq_id}")

    async def stop(self, timeout_s: float) -> None:
        """End both threads after what they are at, or leave them to it after `timeout_s` seconds;
        nothing on disk is ever half written under its final name."""
        for task in self._exporting:
            task.cancel()
        await asyncio.gather(*self._exporting, return_exceptions=True)
        await asyncio.gather(
            asyncio.to_thread(self.torch.stop, timeout_s),
            asyncio.to_thread(self.exports.stop, timeout_s),
        )


def _failure(error: Exception) -> Failure:
    if isinstance(error, OperationFailed):
        return Failure(str(error), error.category, error.error_class)
    _log.error("an operation failed unexpectedly", exc_info=error)
    return Failure(
        f"the trainer failed: {type(error).__name__}: {error}", "server", type(error).__name__
    )
