"""`POST /inference/v1/completions`: samples one stream in an engine, as SSE or as one JSON answer.

Knows the order of the work: check, choose an engine, encode, sample, write. Does not know the
fields of a request (`completion_request`), the form of an answer (`completion_output`) or the
choice of an engine (`serving`).

An engine that dies ends a begun SSE stream without a finish reason, which a client takes for a
truncation and retries; a client that goes away cancels its stream in the engine. So does a
deadline: a request with the header `x-request-timeout` (seconds) that has not ended by then is
given up, as 504 or, once begun, as an error event.

A new field of a completion takes three steps: `completion_request` gets the field and its bounds;
`_generation` below passes it to the engine, or `OutputOptions` to the answer; `completion_output`
shows it. A new route beside this one goes into a module of its own with an `add_routes`, as
`tokenizer_route` does, which `app.create_app` calls.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path

import orjson
from aiohttp import web

from fireworks_training.local.engine_frames import Finish
from fireworks_training.local.gateway.inference.completion_output import (
    KEEPALIVE,
    CompletionOutput,
    OutputOptions,
    error_event,
)
from fireworks_training.local.gateway.inference.completion_request import (
    DEFAULT_MAX_TOKENS,
    CompletionBody,
    parse_body,
)
from fireworks_training.local.gateway.inference.detokenize import NoTokenizer, TextCodec
from fireworks_training.local.gateway.inference.engine_client import FLUSH_TOKENS, EngineClient
from fireworks_training.local.gateway.inference.engine_stream import (
    EngineFull,
    EngineGone,
    EngineRefused,
    EngineStream,
    Generation,
)
from fireworks_training.local.gateway.inference.registry import LiveDeployment, ModelEntry
from fireworks_training.local.gateway.inference.serving import (
    REGISTRY,
    RETRY_SOON,
    add_waking,
    choose_engine,
    engines_within,
    find_deployment,
)
from fireworks_training.local.gateway.web.bodies import SAMPLING_BYTES, parse_aside, read_bytes
from fireworks_training.local.gateway.web.extensions import are_offered
from fireworks_training.local.gateway.web.problems import REQUEST_ID, HttpProblem

KEEPALIVE_SECONDS = 15.0
TIMEOUT_HEADER = "x-request-timeout"
MAX_TIMEOUT_SECONDS = 86_400
_LONG_TEXT = 4096
_WHOLE = 1 << 30
"""Flush threshold of a reader that only waits for the end."""

CODECS: web.AppKey[dict[Path, TextCodec]] = web.AppKey("codecs")
KEEPALIVE_AFTER: web.AppKey[float] = web.AppKey("keepalive_after", float)
"""Seconds of silence after which a stream gets a comment."""


def add_routes(app: web.Application) -> None:
    """Register the completions route; the app holds `REGISTRY`."""
    app[CODECS] = {}
    app[KEEPALIVE_AFTER] = KEEPALIVE_SECONDS
    add_waking(app)
    app.router.add_post("/inference/v1/completions", completions)


class NotFinite(HttpProblem):
    """Raised when the logits hold NaN or infinity. A retry can't help, so the status is none of
    those that are retried."""

    def __init__(self) -> None:
        super().__init__(
            422,
            "the weights give logits that are not finite: training has diverged. Load an earlier "
            "snapshot",
        )


class DeadlinePassed(HttpProblem):
    """Raised when the client would not wait any longer."""

    def __init__(self, seconds: float) -> None:
        super().__init__(504, f"not done within the {seconds:g} s of {TIMEOUT_HEADER}")


async def completions(request: web.Request) -> web.StreamResponse:
    """POST /inference/v1/completions: sample one completion."""
    received = time.monotonic()
    patience = _patience(request)
    body = await parse_aside(await read_bytes(request, SAMPLING_BYTES), parse_body)
    live = find_deployment(request.app[REGISTRY], body.model)
    engines = await engines_within(request.app, live, patience)
    engine = choose_engine(engines, body.prompt_cache_key or body.user)
    codec = await _codec(request.app, live.model)
    prompt = body.prompt if isinstance(body.prompt, list) else await _encode(codec, body.prompt)
    encoded = time.monotonic()
    generation = _generation(body, prompt, engine)
    flush_tokens = FLUSH_TOKENS if body.stream else _WHOLE
    try:
        stream = engine.generate(generation, flush_tokens=1 if body.stop_texts else flush_tokens)
    except EngineFull as error:
        raise _busy(live, error) from None
    except EngineGone as error:
        raise _gone(live) from error
    answer = _CompletionAnswer(
        request, body, live, engine, prompt, codec, stream, received, encoded, patience
    )
    try:
        return await (answer.stream() if body.stream else answer.whole())
    except ConnectionResetError:
        return web.Response()  # the client has left: nobody reads it
    finally:
        stream.cancel()


class _CompletionAnswer:
    """Answers one request, from its first token to its last byte."""

    def __init__(
        self,
        request: web.Request,
        body: CompletionBody,
        live: LiveDeployment,
        engine: EngineClient,
        prompt: list[int],
        codec: TextCodec,
        stream: EngineStream,
        received: float,
        encoded: float,
        patience: float | None,
    ) -> None:
        self._patience = patience
        self._deadline = None if patience is None else received + patience
        self._request = request
        self._body = body
        self._live = live
        self._engine = engine
        self._stream = stream
        self._prompt_tokens = len(prompt)
        self._received, self._encoded = received, encoded
        self._echoed = False
        self._written = asyncio.get_running_loop().time()
        self._output = CompletionOutput(
            head={
                "id": f"cmpl-{request.get(REQUEST_ID, uuid.uuid4().hex)}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": body.model,
            },
            prompt=prompt,
            options=OutputOptions(
                stop_texts=body.stop_texts,
                min_tokens=body.min_tokens or 0,
                logprobs=body.wants_logprobs,
                top=body.top_count > 0,
                raw_output=bool(body.raw_output),
                echo=body.echo_count(len(prompt)),
            ),
            codec=codec,
        )

    async def whole(self) -> web.Response:
        """Answer with one JSON object."""
        while self._output.finish_reason is None:
            await self._next()
        answer = self._output.whole(self._metrics(), self._stream.cached_tokens)
        return web.Response(body=orjson.dumps(answer), content_type="application/json")

    async def stream(self) -> web.StreamResponse:
        """Answer with server-sent events; the status waits for the first token, so that it can be
        an error."""
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        try:
            while self._output.finish_reason is None:
                await self._advance(response)
        except HttpProblem as problem:
            if not response.prepared:
                raise
            if isinstance(problem, NotFinite | DeadlinePassed):
                await self._write(response, error_event(problem))
            # Without a finish reason this is a truncation, which clients retry.
        else:
            last = self._output.last_chunks(self._metrics(), self._stream.cached_tokens)
            await self._write(response, last)
        await response.write_eof()
        return response

    async def _advance(self, response: web.StreamResponse) -> None:
        """Writes what the next tokens show, or a comment when nothing was written for long."""
        patience = self._request.app[KEEPALIVE_AFTER]
        try:
            async with asyncio.timeout_at(self._written + patience):
                await self._next()
        except TimeoutError:
            await self._write(response, KEEPALIVE)
            return
        if self._output.finish_reason is None:
            # The first token is worth an event even if it is half a character: clients time it.
            await self._write(response, self._output.chunk(even_if_empty=not response.prepared))

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if not data:
            return
        if not response.prepared:
            await response.prepare(self._request)
        await response.write(data)
        self._written = asyncio.get_running_loop().time()

    async def _next(self) -> None:
        """Waits for the next tokens and takes them into the output.

        Raises:
            NotFinite: the weights have diverged.
            DeadlinePassed: the client's patience has ended.
            HttpProblem: the engine is gone, full, or refused the request.
        """
        try:
            # The loop's clock is the monotonic one.
            async with asyncio.timeout_at(self._deadline):
                delta = await self._stream.next()
        except TimeoutError:
            raise DeadlinePassed(self._patience or 0.0) from None
        except EngineGone as error:
            raise _gone(self._live) from error
        except EngineFull as error:
            raise _busy(self._live, error) from None
        except EngineRefused as error:
            raise HttpProblem(400, str(error)) from None
        if not self._echoed:
            self._echoed = True
            self._output.echo(self._stream.prompt_logprobs, self._stream.prompt_top)
        if delta.finish is Finish.NOT_FINITE:
            raise NotFinite
        self._output.push(delta)

    def _metrics(self) -> dict[str, object] | None:
        """Return the `perf_metrics` of the end; durations in seconds."""
        if not self._body.perf_metrics_in_response:
            return None
        now = time.monotonic()
        stream, first = self._stream, self._stream.began_at or now
        metrics: dict[str, object] = {
            "num-concurrent-requests": stream.concurrent,
            "prompt-tokens": self._prompt_tokens,
            "cached-prompt-tokens": stream.cached_tokens,
            "tokenizer-queue-duration": 0.0,
            "tokenizer-duration": self._encoded - self._received,
            "prefill-queue-duration": stream.queued,
            "prefill-duration": stream.prefill,
            "generation-queue-duration": 0.0,
            "generation-duration": now - first,
            "server-time-to-first-token": first - self._received,
            "server-processing-time": now - self._received,
            "backend-host": self._engine.name,
            "deployment": self._live.resource,
        }
        if not are_offered(self._request.app):
            return metrics
        if stream.identity_first is not None:
            metrics["snapshot-identity-first"] = stream.identity_first
        if stream.identity is not None:
            metrics["snapshot-identity"] = stream.identity
        if stream.switch_index is not None:
            metrics["snapshot-switch-index"] = stream.switch_index
        return metrics


def _patience(request: web.Request) -> float | None:
    """Return the seconds that the client waits, from the header; None for as long as it takes.

    Raises:
        HttpProblem: 400, the header is no number of seconds.
    """
    given = request.headers.get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise HttpProblem(
            400, f"{TIMEOUT_HEADER} is a number of seconds, over 0, at most {MAX_TIMEOUT_SECONDS}"
        )
    return seconds


def _generation(body: CompletionBody, prompt: list[int], engine: EngineClient) -> Generation:
    """Return what the engine is asked for.

    Raises:
        HttpProblem: 400, an id outside the vocabulary, or more tokens than the context has.
    """
    limits = engine.limits
    for name, ids in (("prompt", prompt), ("stop", body.stop_ids)):
        if ids and max(ids) >= limits.vocab_size:
            raise HttpProblem(
                400,
                f"token id {max(ids)} is outside the vocabulary of {limits.vocab_size} tokens, "
                f"field: '{name}'. Use the tokenizer that service.get_tokenizer() returns",
            )
    room = limits.max_context - len(prompt)
    if not prompt:
        raise HttpProblem(400, "the prompt has no tokens, field: 'prompt'")
    max_tokens = body.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(DEFAULT_MAX_TOKENS, room))
    if max_tokens > room:
        raise HttpProblem(
            400,
            f"prompt ({len(prompt)} tokens) and max_tokens ({max_tokens}) are "
            f"{len(prompt) + max_tokens} tokens, over the context of {limits.max_context}: "
            "shorten the prompt, or pass a smaller max_tokens",
        )
    if (body.min_tokens or 0) > max_tokens:
        raise HttpProblem(400, f"min_tokens {body.min_tokens} is over max_tokens {max_tokens}")
    return Generation(
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        seed=body.seed,
        stop_ids=body.stop_ids,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        top_logprobs=min(body.top_count, limits.vocab_size),
        echo=body.echo_count(len(prompt)) if body.wants_logprobs else 0,
    )


async def _codec(app: web.Application, model: ModelEntry) -> TextCodec:
    codecs = app[CODECS]
    if model.path not in codecs:
        try:
            # Two requests may both read it; the later one just replaces an equal codec.
            codecs[model.path] = await asyncio.to_thread(TextCodec, model.path)
        except NoTokenizer as error:
            raise HttpProblem(400, str(error), code="FAILED_PRECONDITION") from None
    return codecs[model.path]


async def _encode(codec: TextCodec, text: str) -> list[int]:
    if len(text) < _LONG_TEXT:
        return codec.encode(text)
    return await asyncio.to_thread(codec.encode, text)


def _busy(live: LiveDeployment, error: EngineFull) -> HttpProblem:
    return HttpProblem(429, f"{live.resource}: {error}", headers=RETRY_SOON)


def _gone(live: LiveDeployment) -> HttpProblem:
    return HttpProblem(503, f"{live.resource}: its engine is being replaced", headers=RETRY_SOON)
