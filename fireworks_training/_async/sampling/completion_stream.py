"""`CompletionStream`: makes one HTTP attempt at one completion, and reads deltas as bytes arrive.

It runs on the owner loop, and knows nothing of slots and retries. What is read is bounded by what
was asked for: in bytes, in silence (keep-alives are none of the answer), and in seconds once all
has been given. Whatever ends it early, the connection is closed at once, which is how a server
learns that it may stop. A stream that was read to its end leaves its connection in the pool.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import aiohttp

from fireworks_training._async.http import open_files
from fireworks_training._async.http.hosts import advice
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._core.backoff import parse_retry_after
from fireworks_training._core.sse import SseDecoder
from fireworks_training._perf_metrics import request_id_of
from fireworks_training._wire.completions.chunks import (
    CompletionAssembler,
    server_metrics,
)
from fireworks_training._wire.completions.errors import status_error
from fireworks_training._wire.completions.request import SamplingRequest
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    ConnectionFailed,
    ProtocolError,
    RequestTimedOut,
)
from fireworks_training.models import SampledCompletion, ServerMetrics, TokenDelta

ErrorKind = Literal["http_status", "sse_truncation", "connection", "timeout", "upstream_stream"]

END_TIMEOUT = 1.0
"""Seconds that a server may take after `[DONE]` to end its answer, to keep the connection."""

GIVEN_TIMEOUT = 1.5
"""Seconds that a server may take after all that was asked for to say that this was all."""

_EVENT_STREAM = "text/event-stream"
_LARGE_BODY = 2**20  # over this, aiohttp wants a file, which it sends in pieces
_ERROR_BODY = 64 * 2**10


class AttemptFailed(Exception):
    """Reports that an attempt failed; internal: the caller retries, or raises a public error.

    Attributes:
        kind: where it failed.
        error: why it failed, as a typed error.
        metrics: those of the attempt.
        flawed: whether the answer was whole, and lacks what another attempt may bring, or was no
            completion at all.
    """

    def __init__(
        self, kind: ErrorKind, error: ApiError, metrics: ServerMetrics, *, flawed: bool = False
    ) -> None:
        super().__init__(kind)
        self.flawed = flawed
        self.kind: ErrorKind = kind
        self.error = error
        self.metrics = metrics


@dataclass(slots=True, eq=False)
class Attempt:
    """Holds what one attempt sends, and which completion of the call it is for."""

    url: str
    headers: Mapping[str, str]
    body: bytes
    request: SamplingRequest
    prompt_ids: Sequence[int]
    number: int
    prompt_index: int
    sample_index: int


class CompletionStream:
    """Sends the request in `open()`, which checks that a stream comes back; reads it in `read()`.

    The caller closes it, however that went.

    Args:
        transport: the connection pool.
        attempt: holds the request to send.
        without_echo: takes the text of echoed prompt tokens off a text; it is called in a thread.
            None leaves the text as the server sent it.
        keep_tokens: whether the deltas hold token ids.
    """

    __slots__ = (
        "_assembler",
        "_attempt",
        "_decoder",
        "_first_token_at",
        "_given_at",
        "_limit",
        "_loop",
        "_opener",
        "_response",
        "_sent_at",
        "_silence",
        "_transport",
        "_without_echo",
    )

    def __init__(
        self,
        transport: Transport,
        attempt: Attempt,
        *,
        without_echo: Callable[[str, Sequence[int]], str] | None = None,
        keep_tokens: bool = False,
    ) -> None:
        self._transport = transport
        self._attempt = attempt
        self._limit = attempt.request.answer_limit(len(attempt.prompt_ids))
        self._decoder = SseDecoder(self._limit)
        self._assembler = CompletionAssembler(
            attempt.request, attempt.prompt_ids, keep_tokens=keep_tokens
        )
        self._without_echo = without_echo
        self._response: aiohttp.ClientResponse | None = None
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._first_token_at: float | None = None
        self._given_at: float | None = None  # when all that was asked for had come
        self._opener: asyncio.Task[Any] | None = None  # waits for the headers
        self._silence: TimeoutError | None = None

    @property
    def sampling_substituted(self) -> bool:
        """Whether raw logprobs stand in for sampling logprobs that the server does not report."""
        return self._assembler.sampling_substituted

    @property
    def logprobs_missing(self) -> bool:
        """Whether logprobs were asked for, and the server sent none at all."""
        return self._assembler.logprobs_missing

    @property
    def response_id(self) -> str | None:
        """The id that the stream's chunks bear; None if there is none."""
        return self._assembler.response_id

    @property
    def received(self) -> int:
        """How much of the answer has come: grows with its headers, events and parts of events.

        Keep-alives are none of it: a server that sends nothing else is silent.
        """
        if self._response is None:
            return 0
        return 1 + self._assembler.events + self._decoder.held

    def fail(self, error: TimeoutError) -> None:
        """End the wait for a server that has been silent for too long."""
        if self._response is not None:
            self._response.content.set_exception(error)
        elif self._opener is not None:
            self._silence = error
            self._opener.cancel()

    def close(self) -> None:
        """Close the connection, unless the answer has ended and the pool has it again."""
        self._transport.read_timeouts.discard(self, self._attempt.request.http_timeout)
        if self._response is not None:
            self._response.close()

    async def open(self) -> None:
        """Send the request, and check that a stream comes back.

        Raises:
            AttemptFailed: the connection failed, or the answer is not a stream.
        """
        attempt = self._attempt
        session = self._session()
        body = attempt.body if len(attempt.body) <= _LARGE_BODY else io.BytesIO(attempt.body)
        self._sent_at = self._loop.time()
        self._transport.read_timeouts.add(self, attempt.request.http_timeout)
        try:
            response = await self._post(session, body)
        except (aiohttp.ClientError, OSError) as error:
            raise self._broken(error) from error
        self._response = response
        self._transport.hosts.answered(attempt.url)
        if response.status != 200:
            raise self._failed("http_status", await self._status_error(response))
        exact = response.headers.get("Content-Type") == _EVENT_STREAM
        if not exact and response.content_type != _EVENT_STREAM:
            wrong = ProtocolError(
                f"the server answered with {response.content_type} instead of an event stream; is "
                "the inference URL right?",
                request_id=request_id_of(response.headers),
            )
            # A page is a proxy's, perhaps for a moment, or a wrong URL: a few tries tell.
            page = response.content_type.startswith("text/")
            raise self._failed("upstream_stream", wrong, flawed=page)

    def _session(self) -> aiohttp.ClientSession:
        """Return the pool's session; the first use of it may read certificates from a file."""
        try:
            return self._transport.session()
        except OSError as error:
            if not (open_files.exhausted(error) and open_files.raise_limit()):
                raise self._broken(error) from error
        return self._transport.session()

    async def _post(
        self, session: aiohttp.ClientSession, body: bytes | io.BytesIO
    ) -> aiohttp.ClientResponse:
        attempt, task = self._attempt, asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        while True:
            try:
                self._opener = task
                return await session.post(
                    attempt.url,
                    data=body,
                    headers=attempt.headers,
                    allow_redirects=False,
                    proxy=self._transport.proxy_for(attempt.url),
                )
            except asyncio.CancelledError as cancelled:
                if self._silence is None or task.uncancel() > cancelled_before:
                    raise
                raise self._silence from cancelled
            except aiohttp.ClientConnectorError as error:
                # Nothing was sent: with a higher limit the connection can be made after all.
                if not (open_files.exhausted(error.os_error) and open_files.raise_limit()):
                    raise
            finally:
                self._opener = None

    async def _status_error(self, response: aiohttp.ClientResponse) -> ApiError:
        try:
            body = await response.content.read(_ERROR_BODY)
        except (aiohttp.ClientError, OSError):
            body = b""  # the status is known; what it lacks is an explanation
        headers = response.headers
        return status_error(
            response.status,
            body,
            retry_after=parse_retry_after(
                headers.get("retry-after"), date=headers.get("date"), now=time.time()
            ),
            request_id=request_id_of(headers),
        )

    async def read(self, on_delta: Callable[[TokenDelta], None] | None = None) -> SampledCompletion:
        """Read the stream to its end.

        Args:
            on_delta: is called with the tokens that each piece of the stream added.

        Raises:
            AttemptFailed: the stream broke, or its chunks make no completion.
        """
        response, assembler = self._response, self._assembler
        assert response is not None
        content = response.content
        while not assembler.done:
            try:
                if assembler.given:
                    piece = await asyncio.wait_for(content.readany(), self._time_to_end())
                else:
                    piece = await content.readany()
            except TimeoutError as error:
                if not assembler.given:
                    raise self._broken(error) from error
                piece = content.read_nowait()  # what came while something blocked the loop
            except (aiohttp.ClientError, OSError) as error:
                raise self._broken(error) from error
            if not piece:
                break
            if content.total_bytes > self._limit:
                raise self._failed("upstream_stream", self._too_long())
            if on_delta is None:
                self._take(response, piece)
                continue
            mark = assembler.mark()
            self._take(response, piece)
            if assembler.mark() != mark:
                on_delta(assembler.since(mark))
        completion = self._finish()
        if not assembler.done:
            response.close()  # nobody knows what would follow
        elif not content.at_eof():
            await self._reach_the_end(response)
        echoed = self._attempt.request.echoed(completion.prompt_len)
        if not (echoed and self._without_echo):
            return completion
        # The tokenizer may be busy with a template in another thread.
        ids = completion.prompt_tokens[completion.prompt_len - echoed :]
        text = await in_thread(self._without_echo, completion.text, ids)
        return replace(completion, text=text)

    def _time_to_end(self) -> float:
        """Seconds left for the end of a stream that has given all; 0 if that was long ago."""
        now = self._loop.time()
        if self._given_at is None:
            self._given_at = now
        return max(0.0, self._given_at + GIVEN_TIMEOUT - now)

    def _too_long(self) -> ProtocolError:
        return ProtocolError(
            f"the server sent more than {self._limit:,} bytes, which is more than an answer of "
            "max_tokens tokens can have: it was cut off"
        )

    def _take(self, response: aiohttp.ClientResponse, piece: bytes) -> None:
        """Take one piece of the stream, as it came from the network."""
        assembler, decoder = self._assembler, self._decoder
        try:
            if (messages := decoder.plain(piece)) is not None:
                assembler.feed_messages(messages)
            else:
                for data, event in decoder.feed(piece):
                    assembler.feed(data, event)
        except ApiError as error:
            error.request_id = error.request_id or request_id_of(response.headers)
            raise self._failed("upstream_stream", error) from error
        if self._first_token_at is None and self._assembler.started:
            self._first_token_at = self._loop.time()

    def _finish(self) -> SampledCompletion:
        if self._assembler.truncated:
            error = ConnectionFailed("the stream ended before the completion did")
            raise self._failed("sse_truncation", error)
        try:
            return self._assembler.completion(
                prompt_index=self._attempt.prompt_index,
                sample_index=self._attempt.sample_index,
                metrics=self._metrics(),
            )
        except ProtocolError as error:
            flawed = self._assembler.flawed
            raise self._failed("upstream_stream", error, flawed=flawed) from error

    @staticmethod
    async def _reach_the_end(response: aiohttp.ClientResponse) -> None:
        """Read what follows `[DONE]`, normally nothing, so that the connection can be used again.

        The completion is whole: a server that does not end its answer costs a connection only.
        """
        try:
            async with asyncio.timeout(END_TIMEOUT):
                while await response.content.readany():
                    pass
        except (aiohttp.ClientError, OSError):
            response.close()

    def _broken(self, error: Exception) -> AttemptFailed:
        what = type(error).__name__
        if isinstance(error, TimeoutError):
            timed_out = RequestTimedOut(f"no byte came in time ({what})", cause=error)
            return self._failed("timeout", timed_out)
        system = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        if isinstance(system, OSError) and open_files.exhausted(system):
            what = open_files.advice()
        told = f"the connection failed ({what})"
        if not self._transport.hosts.known(self._attempt.url):
            told += f". {advice(self._attempt.url, error)}"
        return self._failed("connection", ConnectionFailed(told, cause=error))

    def _failed(self, kind: ErrorKind, error: ApiError, *, flawed: bool = False) -> AttemptFailed:
        transport_error = type(error).__name__ if kind in ("connection", "timeout") else None
        status = error.status if isinstance(error, ApiStatusError) else None
        metrics = self._metrics(transport_error, status)
        return AttemptFailed(kind, error, metrics, flawed=flawed)

    def _metrics(
        self, transport_error: str | None = None, status: int | None = None
    ) -> ServerMetrics:
        response, assembler = self._response, self._assembler
        headers: Mapping[str, str] = {} if response is None else response.headers
        if status is None and response is not None:
            status = response.status
        first = self._first_token_at
        return server_metrics(
            headers,
            assembler.perf_metrics,
            client_ttft=None if first is None else first - self._sent_at,
            client_latency=self._loop.time() - self._sent_at,
            completion_tokens=assembler.completion_tokens,
            http_status_code=status,
            transport_error=transport_error,
            retry_attempt=self._attempt.number,
            snapshot_identity=assembler.snapshot_identity(),
        )
