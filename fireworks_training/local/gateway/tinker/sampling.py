"""Sampling through the Tinker API: sampling sessions, asample, and the results that are polled for.

Knows which snapshot a sampling session samples, how a request becomes engine streams, and how long
a result is kept. What a request means is `sample_request`'s, which engine serves it `engines`'.

A request is known by (sampling session, seq_id): a repeated one finds its first answer. Results are
in this process alone; one that is gone is answered with 410, on which clients sample anew. So is a
batch poll that waits for requests of which this process knows nothing: its client must not wait for
ever for what an earlier process took with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from aiohttp import web

from fireworks_training.local.ended import (
    MAX_BODY_BYTES,
    BadPoll,
    Ended,
    EndedLog,
    ModelTarget,
    Poll,
    SamplingTarget,
    answer,
    parse_poll,
)
from fireworks_training.local.frames import Finish
from fireworks_training.local.gateway.detokenize import TextCodec
from fireworks_training.local.gateway.engine_client import EngineClient
from fireworks_training.local.gateway.engine_stream import (
    EngineFull,
    EngineGone,
    EngineRefused,
    EngineStream,
    Generation,
)
from fireworks_training.local.gateway.problems import Problem
from fireworks_training.local.gateway.registry import ModelEntry
from fireworks_training.local.gateway.tinker.engines import TinkerEngines
from fireworks_training.local.gateway.tinker.sample_request import (
    Sample,
    SamplePlan,
    StopText,
    encode_samples,
    parse_sample,
    plan_samples,
)
from fireworks_training.local.gateway.tinker.training import (
    TinkerTraining,
    pass_to_trainer,
    read_json,
    text,
)
from fireworks_training.local.tinker_store import (
    BadTinkerPath,
    SamplerNote,
    parse_path,
    sampling_session_id,
)

log = logging.getLogger(__name__)

HOLD_S = 30.0
MAX_PENDING = 4096
"""Samples that run or wait, all requests together."""
MAX_RESULTS = 4096
MAX_LOGS = 4096
"""Sampling sessions and clones whose endings are remembered for batch polls."""
CLONE = 10**9
"""A clone's `seq_id`s begin at its own number times this."""
FULL_WAIT_S = 0.05
FLUSH_TOKENS = 1 << 30
"""A reader here wants the end alone; one that looks for stop strings wants every token."""


@dataclass(slots=True, eq=False)
class _Pending:
    """A request that was taken; `task` gives its body and content type."""

    digest: bytes
    samples: int
    task: asyncio.Task[tuple[bytes, str]]
    delivered: bool = False


@dataclass(slots=True, eq=False)
class _Log:
    """Endings of one clone's requests; `open` are those that have not ended."""

    ended: EndedLog = field(default_factory=EndedLog)
    open: int = 0


class TinkerSampling:
    """See the module.

    Args:
        training: the sessions and notes.
        engines: what samples.
    """

    def __init__(self, training: TinkerTraining, engines: TinkerEngines) -> None:
        self._training = training
        self._engines = engines
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._logs: OrderedDict[tuple[str, int], _Log] = OrderedDict()
        self._codecs: dict[Path, TextCodec] = {}

    # -- sampling sessions -----------------------------------------------------------------------

    async def create_session(self, body: dict[str, object]) -> str:
        """A sampling session for a base model or a checkpoint; its id.

        Raises:
            Problem: 400, 404.
        """
        session, number = text(body, "session_id"), body.get("sampling_session_seq_id")
        self._training.session(session)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 10**9:
            raise Problem(400, "sampling_session_seq_id must be a whole number from 0")
        named = body.get("base_model"), body.get("model_path")
        note = self._note(sampling_session_id(session, number), *named)
        known = self._training.store.sampler(note.session)
        if known is not None and known != note:
            raise Problem(409, f"sampling_session_seq_id {number} was used for another one")
        # Its engine starts meanwhile; a request that comes before waits for it.
        await self._engines.engine(
            self._training.model(note.base_model), base=note.identity is None
        )
        self._training.store.write_sampler(note)
        return note.session

    def _note(self, id_: str, base_model: object, model_path: object) -> SamplerNote:
        if isinstance(model_path, str):
            try:
                checkpoint = parse_path(model_path)
            except BadTinkerPath as error:
                raise Problem(400, str(error)) from None
            run = self._training.store.run(checkpoint.run)
            found = self._training.store.checkpoint(checkpoint)
            if checkpoint.kind != "sampler_weights":
                raise Problem(400, f"{model_path} is a training state; sample from sampler weights")
            if run is None or found is None:
                raise Problem(404, f"no checkpoint {model_path[:200]!r}")
            return SamplerNote(id_, run.base_model, checkpoint.identity, model_path)
        if not isinstance(base_model, str):
            raise Problem(400, "either base_model or model_path must be given")
        self._training.model(base_model)
        return SamplerNote(id_, base_model, None)

    def session(self, id_: str) -> SamplerNote:
        """A sampling session. Raises Problem 404."""
        note = self._training.store.sampler(id_)
        if note is None:
            raise Problem(404, f"no sampling session {id_[:100]!r}")
        return note

    # -- requests --------------------------------------------------------------------------------

    async def submit(self, raw: bytes) -> tuple[str, int]:
        """Takes a request; its id, and how many samples it has.

        Raises:
            Problem: 400, 404, 409 for an id with another content, 429 when too much waits.
        """
        body = parse_sample(raw)
        if body.sampling_session_id is None or body.seq_id is None:
            raise Problem(400, "sampling_session_id and seq_id must be given")
        note = self.session(body.sampling_session_id)
        request_id = f"{note.session}:sample-{body.seq_id}"
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        known = self._pending.get(request_id)
        if known is not None:
            if known.digest != digest:
                raise Problem(409, f"seq_id {body.seq_id} was used for another request")
            return request_id, known.samples
        entry = self._training.model(note.base_model)
        engine = await self._engines.engine(entry, base=note.identity is None)
        plan = plan_samples(body, engine.limits)
        waiting = sum(p.samples for p in self._pending.values() if not p.task.done())
        if waiting and waiting + body.num_samples > MAX_PENDING:
            text_ = f"{waiting} samples run or wait already"
            raise Problem(429, text_, headers={"Retry-After": "1"})
        task = asyncio.create_task(self._run(entry, note, plan), name=request_id)
        self._pending[request_id] = _Pending(digest, body.num_samples, task)
        self._log(note.session, body.seq_id // CLONE, request_id, task)
        self._drop_old()
        return request_id, body.num_samples

    def _log(
        self, session: str, clone: int, request_id: str, task: asyncio.Task[tuple[bytes, str]]
    ) -> None:
        log_ = self._logs.setdefault((session, clone), _Log())
        self._logs.move_to_end((session, clone))
        log_.open += 1

        def end(_: object) -> None:
            log_.open -= 1
            log_.ended.add(request_id)

        task.add_done_callback(end)
        idle = [key for key, other in self._logs.items() if not other.open]
        for key in idle[: max(len(self._logs) - MAX_LOGS, 0)]:
            del self._logs[key]

    def _drop_old(self) -> None:
        excess = len(self._pending) - MAX_RESULTS
        finished = [key for key, pending in self._pending.items() if pending.task.done()]
        finished.sort(key=lambda key: not self._pending[key].delivered)
        for key in finished[: max(excess, 0)]:
            del self._pending[key]

    async def result(self, request_id: str, hold_s: float) -> tuple[bytes, str] | None:
        """A result and its content type; None when it is not there within `hold_s`.

        Raises:
            Problem: 410 when the request is not known (any more), or has to be sent again.
        """
        pending = self._pending.get(request_id)
        if pending is None:
            raise Problem(410, f"no result of {request_id[:150]!r} is here; sample again")
        await asyncio.wait([pending.task], timeout=hold_s)
        if not pending.task.done():
            return None
        if pending.task.cancelled():
            raise Problem(410, f"{request_id!r} was cancelled")
        error = pending.task.exception()
        if isinstance(error, EngineGone):
            self._pending.pop(request_id, None)
            raise Problem(410, f"{error}; sample again")
        pending.delivered = True
        if error is None:
            return pending.task.result()
        server = not isinstance(error, Problem) or error.status >= 500
        if server:
            log.error("sampling failed", exc_info=error)
        told = {"error": str(error), "category": "server" if server else "user"}
        return orjson.dumps(told), "application/json"

    async def ended(
        self, target: SamplingTarget, cursor: int, hold_s: float
    ) -> tuple[list[Ended], int]:
        """What has ended of a clone's requests after a cursor, waited for up to `hold_s` seconds.

        Raises:
            Problem: 404 without such a session; 410 for a cursor that this process never gave, or
                when none of its requests is under way that could end.
        """
        self.session(target.sampling_session_id)
        key = target.sampling_session_id, target.cloned_sampler_id
        log_ = self._logs.get(key, _Log())
        behind = cursor < log_.ended.cursor
        if cursor > log_.ended.cursor or (hold_s > 0 and not behind and not log_.open):
            raise Problem(
                410,
                f"nothing of {target.sampling_session_id!r} is under way here: the process that had"
                " its requests is gone. Make another sampling client",
            )
        await log_.ended.wait(cursor, hold_s)
        request_ids, cursor = log_.ended.after(cursor)
        return [self._ended(request_id) for request_id in request_ids], cursor

    def _ended(self, request_id: str) -> Ended:
        pending = self._pending.get(request_id)
        if pending is None:
            return Ended(request_id, failed=False)  # asked for by name, it is answered with 410
        if pending.task.cancelled() or pending.task.exception() is not None:
            return Ended(request_id, failed=True)
        return Ended(request_id, False, *pending.task.result())

    def retrieved(self, session: str, request_ids: Iterable[str]) -> None:
        """Results that their client has: among the first to be dropped. Others are ignored."""
        for request_id in request_ids:
            pending = self._pending.get(request_id)
            if pending is not None and request_id.startswith(f"{session}:"):
                pending.delivered = True

    def cancel(self, request_id: str) -> None:
        """Frees what a request takes. Idempotent."""
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.task.cancel()

    async def close(self) -> None:
        """Ends everything that runs."""
        tasks = [pending.task for pending in self._pending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._engines.close()

    # -- running ---------------------------------------------------------------------------------

    async def _run(
        self, entry: ModelEntry, note: SamplerNote, plan: SamplePlan
    ) -> tuple[bytes, str]:
        codec = await self._codec(entry) if plan.stop_texts else None
        async with self._engines.serving(entry, note.identity) as engine:
            streams: list[EngineStream] = []
            try:
                async with asyncio.TaskGroup() as group:
                    reads: list[asyncio.Task[Sample]] = []
                    for generation in plan.generations:
                        stream = await _open(engine, generation, bool(plan.stop_texts))
                        streams.append(stream)
                        stops = None if codec is None else StopText(codec, plan.stop_texts)
                        reads.append(group.create_task(_read(stream, stops)))
            except* (EngineGone, EngineRefused, Problem) as failures:
                raise _first(failures) from None
            finally:
                for stream in streams:
                    stream.cancel()
        samples = [read.result() for read in reads]
        return encode_samples(plan, samples, streams[0]), "application/x-protobuf"

    async def _codec(self, entry: ModelEntry) -> TextCodec:
        if entry.path not in self._codecs:
            self._codecs[entry.path] = await asyncio.to_thread(TextCodec, entry.path)
        return self._codecs[entry.path]


SAMPLING: web.AppKey[TinkerSampling] = web.AppKey("tinker_sampling", TinkerSampling)


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return Problem(400, str(error)) if isinstance(error, EngineRefused) else error


async def _open(engine: EngineClient, generation: Generation, every_token: bool) -> EngineStream:
    """A stream, as soon as the engine has room for it."""
    while True:
        try:
            return engine.generate(generation, flush_tokens=1 if every_token else FLUSH_TOKENS)
        except EngineFull:
            await asyncio.sleep(FULL_WAIT_S)


async def _read(stream: EngineStream, stops: StopText | None) -> Sample:
    sample = Sample()
    while True:
        try:
            delta = await stream.next()
        except EngineFull as error:
            raise EngineGone(str(error)) from error  # refused on arrival: to be sent again
        if delta.finish is Finish.NOT_FINITE:
            raise Problem(400, "the weights give logits that are not finite: training has diverged")
        if sample.push(delta, stops):
            return sample
        if delta.finish:
            sample.stopped = delta.finish is Finish.STOP
            return sample


# -- routes --------------------------------------------------------------------------------------


def add_routes(app: web.Application) -> None:
    """Registers sampling and the polls for all results; the app holds TRAINING and SAMPLING."""
    for name, handler in {
        "client/dynamic_config": _dynamic_config,
        "create_sampling_session": _create_sampling_session,
        "asample": _asample,
        "cancel_future": _cancel_future,
        "retrieve_future": _retrieve_future,
        "retrieve_futures": _retrieve_futures,
    }.items():
        app.router.add_post(f"/api/v1/{name}", handler)
    app.router.add_get("/api/v1/samplers/{sampler}", _sampler)


async def _dynamic_config(request: web.Request) -> web.Response:
    await request.read()
    return web.json_response({"sample_cancel_enabled": True})


async def _create_sampling_session(request: web.Request) -> web.Response:
    id_ = await request.app[SAMPLING].create_session(await read_json(request))
    return web.json_response({"sampling_session_id": id_, "type": "create_sampling_session"})


async def _sampler(request: web.Request) -> web.Response:
    note = request.app[SAMPLING].session(request.match_info["sampler"])
    answer = {"sampler_id": note.session, "base_model": note.base_model}
    if note.model_path is not None:
        answer["model_path"] = note.model_path
    return web.json_response(answer)


async def _asample(request: web.Request) -> web.Response:
    request_id, samples = await request.app[SAMPLING].submit(await request.read())
    ids = [f"{request_id}:{index}" for index in range(samples)]
    return web.json_response({"request_id": request_id, "sample_sequence_ids": ids})


async def _cancel_future(request: web.Request) -> web.Response:
    request.app[SAMPLING].cancel(text(await read_json(request), "request_id"))
    return web.json_response({})


async def _retrieve_future(request: web.Request) -> web.StreamResponse:
    raw = await request.read()
    request_id = text(await read_json(request), "request_id")
    owner = request_id.rpartition(":")[0]
    if ":sampler:" not in owner:
        return await pass_to_trainer(request, raw, owner)
    found = await request.app[SAMPLING].result(request_id, HOLD_S)
    if found is None:
        waits = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        return web.json_response(waits)
    body, content_type = found
    return web.Response(body=body, content_type=content_type)


async def _retrieve_futures(request: web.Request) -> web.StreamResponse:
    """Batch polling; see `local.ended`."""
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise Problem(413, f"the body is over {MAX_BODY_BYTES} bytes")
    raw = await request.read()
    try:
        poll: Poll = parse_poll(raw)
    except BadPoll as error:
        raise Problem(400, str(error)) from None
    if isinstance(poll.target, ModelTarget):
        return await pass_to_trainer(request, raw, poll.target.model_id)
    sampling = request.app[SAMPLING]
    sampling.retrieved(poll.target.sampling_session_id, poll.retrieved_request_ids)
    completions, cursor = await sampling.ended(poll.target, poll.prev_cursor, poll.hold_s(HOLD_S))
    return web.json_response(answer(completions, cursor, poll.inline_bytes))
