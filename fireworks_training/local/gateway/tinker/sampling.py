"""Sampling through the Tinker API: sampling sessions, asample, and the polls for all results.

Knows which snapshot a sampling session samples and how a request becomes engine streams. Does not
know the fields of a request (`sample_request`), the choice of its engine (`engines`) or how its
result is kept (`results`).
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from aiohttp import web

from fireworks_training.local.engine_frames import Finish
from fireworks_training.local.gateway.inference.detokenize import NoTokenizer, TextCodec
from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.engine_stream import (
    EngineFull,
    EngineGone,
    EngineRefused,
    EngineStream,
    Generation,
)
from fireworks_training.local.gateway.inference.registry import ModelEntry
from fireworks_training.local.gateway.tinker.engines import TinkerEngines
from fireworks_training.local.gateway.tinker.results import Result, SampleResults
from fireworks_training.local.gateway.tinker.sample_request import (
    Sample,
    SamplePlan,
    StopText,
    encode_samples,
    parse_sample,
    plan_samples,
)
from fireworks_training.local.gateway.tinker.training import TinkerTraining
from fireworks_training.local.gateway.tinker.training_routes import pass_to_trainer
from fireworks_training.local.gateway.web.bodies import (
    SAMPLING_BYTES,
    int_field,
    parse_aside,
    read_bytes,
    read_object,
    required_text,
)
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.results import (
    MAX_BODY_BYTES,
    BadPoll,
    ModelTarget,
    Poll,
    answer,
    parse_poll,
)
from fireworks_training.local.store.tinker_store import SamplerNote, sampling_session_id

HOLD_S = 30.0
FULL_WAIT_S = 0.05
FLUSH_TOKENS = 1 << 30
"""A reader here wants the end alone; one that looks for stop strings wants every token."""


class TinkerSampling:
    """Makes sampling sessions, and turns their requests into engine streams.

    Args:
        training: has the sessions and notes.
        engines: has the engines that sample.
    """

    def __init__(self, training: TinkerTraining, engines: TinkerEngines) -> None:
        self._training = training
        self._engines = engines
        self.results = SampleResults()
        self._codecs: dict[Path, TextCodec] = {}

    # -- sampling sessions -----------------------------------------------------------------------

    async def create_session(self, body: dict[str, object]) -> str:
        """Make a sampling session for a base model or a checkpoint; return its id.

        Raises:
            HttpProblem: 400, 404.
        """
        session = required_text(body, "session_id")
        self._training.session(session)
        number = int_field(body, "sampling_session_seq_id", 0, 10**9 - 1)
        named = body.get("base_model"), body.get("model_path")
        note = self._note(sampling_session_id(session, number), *named)
        known = self._training.store.sampler(note.session)
        if known is not None and known != note:
            raise HttpProblem(409, f"sampling_session_seq_id {number} was used for another one")
        # Its engine starts meanwhile; a request that comes before waits for it.
        await self._engines.engine(
            self._training.model(note.base_model), base=note.identity is None
        )
        await asyncio.to_thread(self._training.store.write_sampler, note)
        return note.session

    def _note(self, id_: str, base_model: object, model_path: object) -> SamplerNote:
        if isinstance(model_path, str):
            checkpoint = self._training.checkpoint(model_path)
            if checkpoint.kind != "sampler_weights":
                text = f"{model_path} is a training state; sample from sampler weights"
                raise HttpProblem(400, text)
            run = self._training.store.run(checkpoint.run)
            if run is None:
                raise HttpProblem(404, f"no training run {checkpoint.run!r}")
            return SamplerNote(id_, run.base_model, checkpoint.identity, model_path)
        if not isinstance(base_model, str):
            raise HttpProblem(400, "either base_model or model_path must be given")
        self._training.model(base_model)
        return SamplerNote(id_, base_model, None)

    def session(self, id_: str) -> SamplerNote:
        """Return a sampling session.

        Raises:
            HttpProblem: 404.
        """
        note = self._training.store.sampler(id_)
        if note is None:
            raise HttpProblem(404, f"no sampling session {id_[:100]!r}")
        return note

    def folder(self, note: SamplerNote) -> str | None:
        """Return the folder of what a sampling session samples; None if it is served no more."""
        try:
            return str(self._training.model(note.base_model).path)
        except HttpProblem:
            return None

    # -- requests --------------------------------------------------------------------------------

    async def submit(self, raw: bytes) -> tuple[str, int]:
        """Take a request; return its id, and how many samples it has.

        Raises:
            HttpProblem: 400, 404, 409 for an id with another content, 429 when too much waits.
        """
        body = await parse_aside(raw, parse_sample)
        if body.sampling_session_id is None or body.seq_id is None:
            raise HttpProblem(400, "sampling_session_id and seq_id must be given")
        note = self.session(body.sampling_session_id)
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        request_id, known = self.results.taken(note.session, body.seq_id, digest)
        if not known:
            entry = self._training.model(note.base_model)
            engine = await self._engines.engine(entry, base=note.identity is None)
            plan = plan_samples(body, engine.limits)
            self.results.take(
                note.session,
                body.seq_id,
                digest,
                body.num_samples,
                lambda: self._run(entry, note, plan),
            )
        return request_id, body.num_samples

    async def close(self) -> None:
        """Cancel everything that runs."""
        await self.results.close()
        await self._engines.close()

    # -- running ---------------------------------------------------------------------------------

    async def _run(self, entry: ModelEntry, note: SamplerNote, plan: SamplePlan) -> Result:
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
            except* (EngineGone, EngineRefused, HttpProblem) as failures:
                raise _first(failures) from None
            finally:
                for stream in streams:
                    stream.cancel()
        samples = [read.result() for read in reads]
        return encode_samples(plan, samples, streams[0]), "application/x-protobuf"

    async def _codec(self, entry: ModelEntry) -> TextCodec:
        if entry.path not in self._codecs:
            try:
                self._codecs[entry.path] = await asyncio.to_thread(TextCodec, entry.path)
            except NoTokenizer as error:
                raise HttpProblem(400, str(error), code="FAILED_PRECONDITION") from None
        return self._codecs[entry.path]


SAMPLING: web.AppKey[TinkerSampling] = web.AppKey("tinker_sampling", TinkerSampling)


def _first(failures: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return HttpProblem(400, str(error)) if isinstance(error, EngineRefused) else error


async def _open(engine: EngineClient, generation: Generation, every_token: bool) -> EngineStream:
    """Open a stream, as soon as the engine has room for it."""
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
            raise HttpProblem(
                400, "the weights give logits that are not finite: training has diverged"
            )
        if sample.push(delta, stops):
            return sample
        if delta.finish:
            sample.stopped = delta.finish is Finish.STOP
            return sample


# -- routes --------------------------------------------------------------------------------------


def add_routes(app: web.Application) -> None:
    """Register sampling and the polls for all results; the app holds TRAINING and SAMPLING."""
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
    await read_bytes(request)
    return web.json_response({"sample_cancel_enabled": True})


async def _create_sampling_session(request: web.Request) -> web.Response:
    id_ = await request.app[SAMPLING].create_session(await read_object(request))
    return web.json_response({"sampling_session_id": id_, "type": "create_sampling_session"})


async def _sampler(request: web.Request) -> web.Response:
    note = request.app[SAMPLING].session(request.match_info["sampler"])
    # Clients look for its tokenizer under this name: a folder has one, a resource's name has none.
    folder = request.app[SAMPLING].folder(note)
    answer = {"sampler_id": note.session, "base_model": folder or note.base_model}
    if note.model_path is not None:
        answer["model_path"] = note.model_path
    return web.json_response(answer)


async def _asample(request: web.Request) -> web.Response:
    request_id, samples = await request.app[SAMPLING].submit(
        await read_bytes(request, SAMPLING_BYTES)
    )
    ids = [f"{request_id}:{index}" for index in range(samples)]
    return web.json_response({"request_id": request_id, "sample_sequence_ids": ids})


async def _cancel_future(request: web.Request) -> web.Response:
    request.app[SAMPLING].results.cancel(required_text(await read_object(request), "request_id"))
    return web.json_response({})


async def _retrieve_future(request: web.Request) -> web.StreamResponse:
    raw = await read_bytes(request)
    request_id = required_text(await read_object(request), "request_id")
    owner = request_id.rpartition(":")[0]
    if ":sampler:" not in owner:
        return await pass_to_trainer(request, raw, owner)
    found = await request.app[SAMPLING].results.result(request_id, HOLD_S)
    if found is None:
        waits = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        return web.json_response(waits)
    body, content_type = found
    return web.Response(body=body, content_type=content_type)


async def _retrieve_futures(request: web.Request) -> web.StreamResponse:
    """Answer a batch poll, as `local.results` describes."""
    raw = await read_bytes(request, MAX_BODY_BYTES)
    try:
        poll: Poll = parse_poll(raw)
    except BadPoll as error:
        raise HttpProblem(400, str(error)) from None
    if isinstance(poll.target, ModelTarget):
        return await pass_to_trainer(request, raw, poll.target.model_id)
    results = request.app[SAMPLING].results
    request.app[SAMPLING].session(poll.target.sampling_session_id)
    results.retrieved(poll.target.sampling_session_id, poll.retrieved_request_ids)
    completions, cursor = await results.ended(poll.target, poll.prev_cursor, poll.hold_s(HOLD_S))
    return web.json_response(answer(completions, cursor, poll.inline_bytes))
