"""The trainer's sessions and models, and the task that runs the operations in their queues.

Knows which models there are, whose turn it is, and which requests wait for a result. Does not know
HTTP or wire formats (results come in encoded), nor what an operation does.

Ids are made from the client's numbers, so that a repeated request finds its first answer:
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
from fireworks_training.local.trainer.run.hosted import (
    CreateModel,
    Gone,
    HostedModel,
    SubmittedOperation,
    UnknownRequest,
)
from fireworks_training.local.trainer.run.torch_thread import TorchThread
from fireworks_training.local.trainer.wire.datums import make_backward

_log = logging.getLogger("fireworks_training.local.trainer")

MAX_MODELS = 64
"""Models of a trainer that was given no number of its own; memory allows fewer of large ones."""
MAX_ENDED_MODELS = 16
MAX_SESSIONS = 1024
SESSION_TIMEOUT_S = 300.0
ABANDONED_S = 30.0
"""Silence after which a session's models make room for others; clients are heard of every 10 s."""
FEWEST_LOOKS_S = 0.02
MAX_EXPORTS = 2
"""Snapshots captured and not yet written, at most; each is a copy of the model in memory."""


EncodeFailure = Callable[[Failure, str], EncodedResult]
"""Encodes a failure, with its request's id, as the body of an answer."""


class LimitReached(Exception):
    """Raised where there are as many sessions or models as there may be."""


@dataclass(slots=True)
class _Session:
    """Notes when a session was last heard of, and how it ended."""

    last_seen: float
    finished: bool = False
    ended_because: str = ""


class TrainerService:
    """Keeps sessions and models, and runs the models' operations one at a time.

    Args:
        codec: encodes answers that belong to no operation.
        encode_failure: encodes all failures.
        clock: monotonic seconds.
        limits: bounds of each model's queue.
        session_timeout_s: a session without a request for so long is ended.
        atomic_steps: whether a failure takes the rest of its step with it.
        max_models: models that are loaded at a time, at most.
        fits: whether memory holds so many models more.
    """

    def __init__(
        self,
        codec: Codec,
        encode_failure: EncodeFailure,
        clock: Callable[[], float],
        limits: QueueLimits | None = None,
        session_timeout_s: float = SESSION_TIMEOUT_S,
        *,
        atomic_steps: bool = True,
        max_models: int = MAX_MODELS,
        fits: Callable[[int], bool] = lambda _more: True,
    ) -> None:
        self._max_models = max_models
        self._fits = fits
        self._atomic_steps = atomic_steps
        self._session_timeout_s = session_timeout_s
        self._codec = codec
        self._encode_failure = encode_failure
        self._clock = clock
        self._limits = limits
        self._sessions: dict[str, _Session] = {}
        self._models: dict[str, HostedModel] = {}
        self._work = asyncio.Event()
        self.torch = TorchThread()
        self.exports = TorchThread("export")
        self._export_room = asyncio.Semaphore(MAX_EXPORTS)
        self._exporting: set[asyncio.Task[None]] = set()

    # -- sessions --------------------------------------------------------------------------------

    def create_session(self) -> str:
        """Makes a session and returns its id; raises as `adopt_session`."""
        session_id = f"ts-{uuid.uuid4().hex}"
        self.adopt_session(session_id)
        return session_id

    def adopt_session(self, session_id: str) -> None:
        """Adds a session that the gateway made. Idempotent while it is alive.

        Raises:
            LimitReached: there are as many live ones as there may be.
        """
        if session_id in self._sessions:
            return
        if len(self._sessions) >= MAX_SESSIONS:
            stale = [key for key, session in self._sessions.items() if self._abandoned(session)]
            for key in stale:
                del self._sessions[key]
            if not stale:
                full = f"this trainer has {MAX_SESSIONS} live sessions; finish one first"
                raise LimitReached(full)
        self._sessions[session_id] = _Session(self._clock())

    def heartbeat(self, session_id: str) -> None:
        """Notes that a session is alive; raises Gone for one that has ended."""
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
        for hosted in self._models.values():
            if hosted.session_id == session_id:
                self._begin_unload(hosted)

    def _abandoned(self, session: _Session | None) -> bool:
        if session is None or session.finished:
            return True
        return self._clock() - session.last_seen > self._session_timeout_s

    def _touch_session(self, hosted: HostedModel) -> None:
        session = self._sessions.get(hosted.session_id)
        if session is not None:
            session.last_seen = self._clock()

    def end_silent_sessions(self) -> float:
        """Ends sessions that were silent for too long; returns the seconds to the next check."""
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
        """Accepts the request for a model; returns the model's id, the same one when repeated.

        Raises:
            Gone: no such session.
            Taken: the same ids were used for another model.
            LimitReached: as many models are loaded as there may be.
        """
        self.heartbeat(session_id)
        model_id = f"{session_id}:train:{model_seq_id}"
        known = self._models.get(model_id)
        if known is not None:
            if known.request.digest != request.digest:
                raise Taken(f"model_seq_id {model_seq_id} was used for another model")
            return model_id
        self._make_room()
        self._models[model_id] = HostedModel(
            model_id,
            session_id,
            request,
            ModelLine(self._limits, atomic_steps=self._atomic_steps),
            Leases(),
        )
        self._work.set()
        return model_id

    def _make_room(self) -> None:
        while not (room := self._room())[0]:
            oldest = self._longest_silent()
            if oldest is None:
                raise LimitReached(room[1])
            _log.warning("unloading %s for a new model: its session is silent", oldest.model_id)
            self._begin_unload(oldest)
        ended = [key for key, hosted in self._models.items() if hosted.unloaded is not None]
        for key in ended[: max(len(ended) - MAX_ENDED_MODELS, 0)]:
            del self._models[key]

    def _room(self) -> tuple[bool, str]:
        """Return whether there is room for one model more, and what to say if there is none."""
        loaded = [hosted for hosted in self._models.values() if not hosted.unloading]
        if len(loaded) >= self._max_models:
            return False, (
                f"this trainer holds {len(loaded)} models already, the most that it may: unload"
                " one, close the client that made it, or serve with"
                " a larger --max-models"
            )
        # Memory does not show yet what is to be made, and what is to be given back.
        coming = sum(hosted.created is None for hosted in loaded)
        going = sum(h.unloading and h.unloaded is None for h in self._models.values())
        return self._fits(1 + coming - going), (
            f"this trainer holds {len(loaded)} models, and memory has no room for another: unload"
            " one, close the client that made it, or serve a smaller model"
        )

    def _longest_silent(self) -> HostedModel | None:
        """Return the model whose session has been silent longest, for `ABANDONED_S` at least."""
        silent = [
            (session.last_seen, hosted)
            for hosted in self._models.values()
            if not hosted.unloading
            and (session := self._sessions.get(hosted.session_id)) is not None
            and self._clock() - session.last_seen >= ABANDONED_S
        ]
        return min(silent, key=lambda pair: pair[0])[1] if silent else None

    def model(self, model_id: str) -> HostedModel:
        """Finds a model; raises Gone for one that this process never made."""
        hosted = self._models.get(model_id)
        if hosted is None:
            raise Gone(
                f"this trainer has no model {model_id[:100]!r}: the process that held it is gone."
                " Make a new one and load a saved state into it",
                "ModelLost",
            )
        return hosted

    def unload(self, model_id: str) -> str:
        """Unloads the model after its accepted operations. Returns the request's id."""
        self._begin_unload(self.model(model_id))
        return f"{model_id}:unload"

    def _begin_unload(self, hosted: HostedModel) -> None:
        hosted.unloading = True
        hosted.line.close()
        self._work.set()

    # -- operations ------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> str:
        """Puts an operation into its model's queue; returns the id of its result.

        Raises:
            Gone, Taken, TooFarAhead, Closed: no place was taken.
            OperationFailed: the operation is refused, and stands in its place as failed (but for a
                backward by a forward, which takes no place).
            UnknownForward: no place was taken.
        """
        hosted = self.model(submission.model_id)
        self._touch_session(hosted)
        if isinstance(hosted.created, Failure):
            raise Gone(f"the model was not made: {hosted.created.message}", "ModelLost")
        operation = submission.operation
        if isinstance(operation, BackwardRequest):
            operation = self._with_forward(hosted, submission, operation)
        place = submission.seq_id, submission.digest, submission.role
        if isinstance(operation, OperationFailed):
            hosted.line.submit(*place, _failure(operation))
            self._work.set()
            raise operation
        hosted.line.submit(*place, SubmittedOperation(operation, submission.codec), submission.size)
        self._work.set()
        return f"{submission.model_id}:op-{submission.seq_id}"

    def _with_forward(
        self, hosted: HostedModel, submission: Submission, request: BackwardRequest
    ) -> Operation:
        """Gives a backward the inputs it refers to, which it owns from here on."""
        if hosted.line.holds(submission.seq_id, submission.digest):
            return DiscardGradients()  # never run: the queue has this operation already
        return make_backward(request, hosted.leases.find(request.forward_seq_id, self._clock()))

    async def result(self, request_id: str, hold_s: float) -> EncodedResult | None:
        """Waits for a result up to `hold_s` seconds; None if it is not there by then.

        A caller that is cancelled changes nothing: the result stays for the next one.

        Raises:
            Gone: model or result are not here any more.
            UnknownRequest: nothing was submitted under this id.
        """
        model_id, _, tail = request_id.rpartition(":")
        if not model_id:
            raise UnknownRequest(f"there is no request {request_id[:100]!r}")
        hosted = self.model(model_id)
        self._touch_session(hosted)
        try:
            async with asyncio.timeout(hold_s):
                outcome = await hosted.result(tail)
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
        """Lists a model's results after a cursor; waits up to `hold_s` seconds for the first one.

        Raises:
            Gone: the model is not here.
            UnknownRequest: no answer of this model's polls gave this cursor.
        """
        hosted = self.model(model_id)
        self._touch_session(hosted)
        if cursor > hosted.ended.cursor:
            raise UnknownRequest(
                f"prev_cursor {cursor} is beyond the last one, {hosted.ended.cursor}"
            )
        await hosted.ended.wait(cursor, hold_s)
        request_ids, cursor = hosted.ended.after(cursor)
        return [self._outcome(hosted, request_id) for request_id in request_ids], cursor

    def _outcome(self, hosted: HostedModel, request_id: str) -> RequestOutcome:
        try:
            outcome = hosted.outcome(request_id.rpartition(":")[2])
        except Gone:
            outcome = None
        if outcome is None:
            # A request for it by name gets the reason.
            return RequestOutcome(request_id, failed=False)
        encoded = self._encoded(outcome, request_id)
        failed = isinstance(outcome, Failure)
        return RequestOutcome(request_id, failed, encoded.body, encoded.content_type)

    def retrieved(self, model_id: str, request_ids: Iterable[str]) -> None:
        """Notes the results of a model that its client has; others are ignored. Raises Gone."""
        hosted = self.model(model_id)
        for request_id in request_ids:
            owner, _, tail = request_id.rpartition(":")
            if owner == model_id:
                hosted.delivered(tail)

    # -- running ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Runs operations until cancelled: one of each model in turn, one at a time."""
        while True:
            await self._work.wait()
            self._work.clear()
            busy = True
            while busy:
                busy = False
                for hosted in list(self._models.values()):
                    busy |= await self._advance(hosted)

    async def _advance(self, hosted: HostedModel) -> bool:
        if hosted.created is None:
            await self._create(hosted)
            return True
        if hosted.unloaded is not None:
            return False
        if isinstance(hosted.created, Failure):
            lost = f"the model was not made: {hosted.created.message}"
            self._abandon(hosted, Failure(lost, hosted.created.category, "ModelLost"))
        advance = hosted.line.advance()
        for seq_id in advance.finished:
            hosted.notify(f"op-{seq_id}")
        if advance.run is not None:
            await self._run_operation(hosted, advance.run)
            return True
        if hosted.unloading:
            missing = hosted.line.waits_for
            gap = f"the model was unloaded, and operation {missing} before it never came"
            self._abandon(hosted, Failure(gap, error_class="ModelUnloaded"))
            hosted.model, hosted.leases = None, Leases()
            answer = Answer({"model_id": hosted.model_id, "type": "unload_model"})
            hosted.unloaded = self._codec.encode(answer)
            hosted.notify("unload")
        return False

    def _abandon(self, hosted: HostedModel, failure: Failure) -> None:
        for seq_id in hosted.line.abandon(failure):
            hosted.notify(f"op-{seq_id}")

    async def _create(self, hosted: HostedModel) -> None:
        try:
            hosted.model = await self.torch.run(hosted.request.make)
            answer = Answer({"model_id": hosted.model_id, **hosted.request.answer})
            hosted.created = self._codec.encode(answer)
        except Exception as error:
            hosted.created = _failure(error)
            self._begin_unload(hosted)
        hosted.notify("create")

    async def _run_operation(
        self, hosted: HostedModel, run: NextOperation[SubmittedOperation]
    ) -> None:
        model, job = hosted.model, run.operation
        assert model is not None, "operations run only after their model was made"

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
            hosted.line.fail(_failure(error))
        else:
            if isinstance(result, Deferred):
                self._detach(hosted, result)
                return
            hosted.line.succeed(result, len(result.body))
            if isinstance(job.operation, Pass) and not job.operation.backward:
                hosted.leases.keep(run.seq_id, job.operation, self._clock())
        hosted.notify(f"op-{run.seq_id}")

    def _detach(self, hosted: HostedModel, deferred: Deferred) -> None:
        seq_id = hosted.line.detach()
        task = asyncio.create_task(self._export(hosted, seq_id, deferred))
        self._exporting.add(task)
        task.add_done_callback(self._exporting.discard)

    async def _export(self, hosted: HostedModel, seq_id: int, deferred: Deferred) -> None:
        try:
            encoded = await self.exports.run(lambda: self._codec.encode(deferred.finish()))
        except Exception as error:
            hosted.line.settle(seq_id, _failure(error))
        else:
            hosted.line.settle(seq_id, encoded, len(encoded.body))
        finally:
            self._export_room.release()
        hosted.notify(f"op-{seq_id}")

    async def stop(self, timeout_s: float) -> None:
        """Ends both threads after the calls they run, or leaves them after `timeout_s` seconds;
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
