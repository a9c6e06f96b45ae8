"""The completions of one call: slots, attempts, retries.

Each completion takes a slot for each HTTP attempt, gives it back during back-off, and goes on until
it has its completion or its budget is used up. One that fails takes its siblings with it. Tokens
are never spliced: an attempt that broke mid-stream starts again from the prompt, and a stream whose
deltas were handed out already fails.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.sampling import events
from fireworks_training._async.sampling.completion_stream import (
    Attempt,
    AttemptFailed,
    CompletionStream,
)
from fireworks_training._async.sampling.concurrency import Gate, SamplingConcurrencyController
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training._async.sampling.progress import Progress
from fireworks_training._async.sampling.retries import (
    Budgets,
    RetryPolicy,
    final_error,
    is_hot_load,
)
from fireworks_training._async.sampling.token_stream import DeltaBuffer
from fireworks_training._core.backoff import is_retryable
from fireworks_training._core.window.aimd import is_congestion
from fireworks_training._wire.completions.request import EncodedRequest, SamplingRequest
from fireworks_training.errors import SamplingRequestError
from fireworks_training.models import SampledCompletion, SampledServerAttempt, ServerMetrics

logger = logging.getLogger("fireworks_training.sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerContext:
    """What the calls of one sampler share.

    Attributes:
        transport: the connection pool.
        url: the completions route.
        model: model string, for messages.
        retries: the retry budgets.
        record: keeps what each attempt cost.
        news: of hot loads.
        distance: optimizer steps of the trainer since a snapshot; None where nobody counts them.
        progress: what the sampler is busy with.
        without_echo: takes the text of echoed prompt tokens off a text; None without a tokenizer.
        warn_substituted: told when a server reports raw logprobs only.
    """

    transport: Transport
    url: str
    model: str
    retries: RetryPolicy
    record: deque[ServerMetrics]
    news: HotLoadSignal
    distance: Callable[[str | None], int | None] | None
    progress: Progress
    without_echo: Callable[[str, Sequence[int]], str] | None
    warn_substituted: Callable[[], None]


@dataclass(slots=True)
class RequestLog:
    """What happened to one completion, for those who ask for it.

    Attributes:
        request_id: sent as `X-Request-Id` by all attempts.
        attempts: each of them.
    """

    request_id: str = field(default_factory=lambda: os.urandom(16).hex())
    attempts: list[SampledServerAttempt] = field(default_factory=list[SampledServerAttempt])

    def succeeded(self, metrics: ServerMetrics, response_id: str | None) -> None:
        """The attempt that made the completion."""
        self._add("succeeded", metrics, None, response_id)

    def failed(self, failure: AttemptFailed, *, retried: bool) -> None:
        """One that did not."""
        self._add("retryable_error" if retried else "failed", failure.metrics, failure.kind, None)

    def _add(
        self,
        outcome: Literal["succeeded", "retryable_error", "failed"],
        metrics: ServerMetrics,
        kind: str | None,
        response_id: str | None,
    ) -> None:
        self.attempts.append(
            SampledServerAttempt(
                index=len(self.attempts),
                outcome=outcome,
                status_code=metrics.http_status_code,
                error_kind=kind,
                response_request_id=metrics.request_id,
                upstream_response_id=response_id,
                server_metrics=metrics,
            )
        )


class SamplingRun:
    """One call: completions of its prompts. It is under way within its `with` block.

    Args:
        source: what it shares with the sampler's other calls.
        controller: bounds the attempts in flight.
        request: what to sample.
        total: completions that it asks for.
    """

    __slots__ = (
        "_controller",
        "_given_up",
        "_loop",
        "_request",
        "_source",
        "context",
        "done",
        "started",
        "total",
    )

    def __init__(
        self,
        source: SamplerContext,
        controller: SamplingConcurrencyController,
        request: SamplingRequest,
        total: int = 1,
    ) -> None:
        self._source = source
        self._controller = controller
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._given_up = False
        self.context = f" [{request.context}]" if request.context else ""
        self.started = self._loop.time()
        self.total = total
        self.done = 0

    def __enter__(self) -> Self:
        self._source.progress.begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._source.progress.end(self)

    async def all(self, prompts: Sequence[EncodedRequest], n: int) -> list[SampledCompletion]:
        """`n` completions of each prompt, prompt-major.

        Raises:
            SamplingRequestError: one could not be had; the others were given up.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self.one(prompt, sample))
                    for prompt in prompts
                    for sample in range(n)
                ]
        except BaseExceptionGroup as errors:
            failed = errors.exceptions[0]
        else:
            return [task.result() for task in tasks]
        raise failed

    async def one(
        self,
        prompt: EncodedRequest,
        sample: int = 0,
        logged: RequestLog | None = None,
        deltas: DeltaBuffer | None = None,
    ) -> SampledCompletion:
        """One completion, however many attempts it takes.

        Args:
            sample: its place among those of the prompt.
            logged: notes its attempts.
            deltas: gets its deltas.

        Raises:
            SamplingRequestError: it could not be had.
        """
        source = self._source
        request_id = os.urandom(16).hex() if logged is None else logged.request_id
        attempt = Attempt(
            url=source.url,
            headers=self._headers(request_id),
            body=prompt.body(sample),
            request=self._request,
            prompt_ids=prompt.ids,
            number=0,
            prompt_index=prompt.index,
            sample_index=sample,
        )
        budgets: Budgets | None = None
        while True:
            attempt.number += 1
            try:
                completion = await self._attempt(attempt, logged, deltas)
                self.done += 1
                return completion
            except AttemptFailed as failure:
                budgets = budgets or Budgets(source.retries, source.news)
                delay = budgets.delay(failure.error, now=self._loop.time())
                if deltas is not None and not deltas.restart():
                    delay = None
                if logged is not None:
                    logged.failed(failure, retried=delay is not None)
                if delay is None:
                    raise self._give_up(failure, attempt, request_id) from failure.error
                self._say_retry(failure, attempt, request_id, delay)
            await self._back_off(delay, budgets)

    async def _back_off(self, delay: float, budgets: Budgets) -> None:
        """Wait before the next attempt, or for the end of a hot load."""
        progress = self._source.progress
        progress.backing_off(1)
        try:
            if not budgets.loading:
                await asyncio.sleep(delay)
            elif await self._source.news.wait(delay):
                budgets.loaded()
        finally:
            progress.backing_off(-1)

    def _slot(self, number: int) -> Awaitable[None]:
        """A slot for an attempt; a retry goes before new work, where the controller knows both."""
        if number > 1 and isinstance(self._controller, Gate):
            return self._controller.acquire(retry=True)
        return self._controller.acquire()

    async def _attempt(
        self, attempt: Attempt, logged: RequestLog | None, deltas: DeltaBuffer | None
    ) -> SampledCompletion:
        """One HTTP attempt, in a slot of the controller."""
        source = self._source
        hook = source.transport.events
        await self._slot(attempt.number)
        told: ServerMetrics | None = None
        stream: CompletionStream | None = None
        source.progress.attempt(attempt, self._loop.time())
        try:
            if self._given_up:
                # The slot is that of a sibling that failed: the call is over, send nothing.
                raise asyncio.CancelledError
            if hook is not None:
                events.submitted(hook, attempt, self._controller)
            stream = CompletionStream(
                source.transport,
                attempt,
                without_echo=source.without_echo,
                keep_tokens=deltas is not None,
            )
            await stream.open()
            completion = await stream.read(None if deltas is None else deltas.put)
            completion = self._with_distance(completion)
            told = completion.metrics
            source.record.append(told)
            source.transport.usage.sampled(
                told.prompt_tokens, told.cached_prompt_tokens, told.completion_tokens
            )
            if stream.sampling_substituted:
                source.warn_substituted()
            if logged is not None:
                logged.succeeded(told, stream.response_id)
            if hook is not None:
                events.finished(hook, attempt, told)
            return completion
        except AttemptFailed as failure:
            source.record.append(failure.metrics)
            # Other failures say nothing about how crowded the server is.
            told = failure.metrics if is_congestion(failure.metrics) else None
            raise
        finally:
            if stream is not None:
                stream.close()
            source.progress.attempt_over(attempt)
            self._controller.release(told)
            if hook is not None:
                hook.report_window(self._controller)

    def _with_distance(self, completion: SampledCompletion) -> SampledCompletion:
        """Notes how far the trainer has gone since the weights that began the completion."""
        if self._source.distance is None:
            return completion
        steps = self._source.distance(completion.snapshot_identity_first)
        if steps is None:
            return completion
        return replace(completion, metrics=replace(completion.metrics, snapshot_distance=steps))

    def _headers(self, request_id: str) -> Mapping[str, str]:
        extra = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            # A compressing proxy would hold tokens back until it has enough of them.
            "Accept-Encoding": "identity",
            **self._request.headers,
            "X-Request-Id": request_id,
        }
        return self._source.transport.headers(extra)

    def _say_retry(
        self, failure: AttemptFailed, attempt: Attempt, request_id: str, delay: float
    ) -> None:
        events.retried(
            self._source.transport.events,
            attempt.headers,
            attempt.number,
            delay,
            failure.error,
        )
        logger.info(
            "sampling from %s%s: attempt %d failed (%s), next in %.2f s, request %s",
            self._source.model,
            self.context,
            attempt.number,
            failure.error.message,
            delay,
            request_id,
        )

    def _give_up(
        self, failure: AttemptFailed, attempt: Attempt, request_id: str
    ) -> SamplingRequestError:
        """The end of a completion, and with it of its call; the error that says so."""
        self._given_up = True
        note = getattr(self._controller, "note_retry_exhausted", None)
        if note is not None and is_retryable(failure.error) and not is_hot_load(failure.error):
            note(failure.metrics)
        error = final_error(failure, attempt.number, request_id, self._source.model, self.context)
        events.failed(self._source.transport.events, attempt.headers, error)
        return error
