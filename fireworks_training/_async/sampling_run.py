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

from fireworks_training._async import sampling_events
from fireworks_training._async.completion_stream import Attempt, AttemptFailed, CompletionStream
from fireworks_training._async.gate import Gate, SamplingConcurrencyController
from fireworks_training._async.load_news import LoadNews
from fireworks_training._async.sampling_progress import Progress
from fireworks_training._async.token_stream import DeltaBuffer
from fireworks_training._async.transport import Transport
from fireworks_training._core.aimd import is_congestion
from fireworks_training._core.backoff import Backoff, is_retryable
from fireworks_training._wire.completions import EncodedRequest, SamplingRequest
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    AuthenticationFailed,
    DeploymentSamplerTimeoutError,
    NotFound,
    SamplingRequestError,
)
from fireworks_training.models import SampledCompletion, SampledServerAttempt, ServerMetrics

HOT_LOAD_STATUS = frozenset({404, 425})
"""Statuses of a deployment that is loading a snapshot, or that its gateway doesn't know yet."""

HOT_LOAD_POLL = 8.0
"""Seconds between two looks at a deployment of which a load is known to be under way."""

_TIMEOUT_STATUS = frozenset({408, 504})

logger = logging.getLogger("fireworks_training.sampling")


def is_hot_load(error: ApiError) -> bool:
    """Whether the deployment may be loading a snapshot.

    Our platform says NOT_FOUND only of a deployment that does not exist: no wait mends that.
    """
    if not isinstance(error, ApiStatusError) or error.status not in HOT_LOAD_STATUS:
        return False
    return not (isinstance(error, NotFound) and error.error_class == "NOT_FOUND")


def _hot_load_budget() -> Backoff:
    # About a minute; the ones that the coordinator knows of are waited for as long as they take.
    return Backoff(attempts=11, base=0.5, cap=HOT_LOAD_POLL, spread=0.2, retryable=is_hot_load)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Makes the retry budgets of a completion; tests make quicker ones.

    `transient` counts attempts, not seconds: a budget in seconds would have to be larger than the
    time-out of one attempt, which the caller chooses.
    """

    transient: Callable[[], Backoff] = Backoff
    hot_load: Callable[[], Backoff] = _hot_load_budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
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
    news: LoadNews
    distance: Callable[[str | None], int | None] | None
    progress: Progress
    without_echo: Callable[[str, Sequence[int]], str] | None
    warn_substituted: Callable[[], None]


@dataclass(slots=True)
class Logged:
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
        source: Source,
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
        logged: Logged | None = None,
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
        headers = self._headers(request_id)
        body = prompt.body(sample)
        transient: Backoff | None = None
        hot_load: Backoff | None = None
        number = 0
        while True:
            number += 1
            attempt = Attempt(
                url=source.url,
                headers=headers,
                body=body,
                request=self._request,
                prompt_ids=prompt.ids,
                number=number,
                prompt_index=prompt.index,
                sample_index=sample,
            )
            try:
                completion = await self._attempt(attempt, logged, deltas)
                self.done += 1
                return completion
            except AttemptFailed as failure:
                loading = is_hot_load(failure.error)
                if loading:
                    budget = hot_load = hot_load or source.retries.hot_load()
                else:
                    budget = transient = transient or source.retries.transient()
                delay = budget.next_delay(failure.error, now=self._loop.time())
                if loading and delay is None and source.news.loading:
                    delay = HOT_LOAD_POLL
                if deltas is not None and not deltas.restart():
                    delay = None
                if logged is not None:
                    logged.failed(failure, retried=delay is not None)
                if delay is None:
                    self._given_up = True
                    error = self._final_error(failure, request_id, number)
                    sampling_events.failed(source.transport.events, headers, error)
                    raise error from failure.error
                self._say_retry(failure, request_id, number, delay)
                sampling_events.retried(
                    source.transport.events, headers, number, delay, failure.error
                )
            if await self._back_off(delay, loading=loading) and hot_load is not None:
                hot_load.reset()

    async def _back_off(self, delay: float, *, loading: bool) -> bool:
        """Wait before the next attempt; whether news of a hot load ended the wait."""
        progress = self._source.progress
        progress.backing_off(1)
        try:
            if loading:
                return await self._source.news.wait(delay)
            await asyncio.sleep(delay)
            return False
        finally:
            progress.backing_off(-1)

    def _slot(self, number: int) -> Awaitable[None]:
        """A slot for an attempt; a retry goes before new work, where the controller knows both."""
        if number > 1 and isinstance(self._controller, Gate):
            return self._controller.acquire(retry=True)
        return self._controller.acquire()

    async def _attempt(
        self, attempt: Attempt, logged: Logged | None, deltas: DeltaBuffer | None
    ) -> SampledCompletion:
        """One HTTP attempt, in a slot of the controller."""
        source = self._source
        events = source.transport.events
        await self._slot(attempt.number)
        told: ServerMetrics | None = None
        stream: CompletionStream | None = None
        source.progress.attempt(attempt, self._loop.time())
        try:
            if self._given_up:
                # The slot is that of a sibling that failed: the call is over, send nothing.
                raise asyncio.CancelledError
            if events is not None:
                sampling_events.submitted(events, attempt, self._controller)
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
            if events is not None:
                sampling_events.finished(events, attempt, told)
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
            if events is not None:
                events.look_at(self._controller)

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
        self, failure: AttemptFailed, request_id: str, number: int, delay: float
    ) -> None:
        logger.info(
            "sampling from %s%s: attempt %d failed (%s), next in %.2f s, request %s",
            self._source.model,
            self.context,
            number,
            failure.error.message,
            delay,
            request_id,
        )

    def _final_error(
        self, failure: AttemptFailed, request_id: str, attempts: int
    ) -> SamplingRequestError:
        error = failure.error
        status = error.status if isinstance(error, ApiStatusError) else None
        timed_out = failure.kind == "timeout" or status in _TIMEOUT_STATUS
        hot_loading = is_hot_load(error)
        exhausted = hot_loading or is_retryable(error)
        if exhausted and not hot_loading:
            note = getattr(self._controller, "note_retry_exhausted", None)
            if note is not None:
                note(failure.metrics)
        cls = DeploymentSamplerTimeoutError if timed_out else SamplingRequestError
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return cls(
            f"no completion from {self._source.model}{self.context} after {tries}: "
            f"{error.message}.{_advice(failure, hot_loading)}",
            logical_request_id=request_id,
            model=self._source.model,
            attempts=attempts,
            final_status=status,
            final_error_kind=failure.kind,
            retry_budget_exhausted=exhausted,
            request_id=error.request_id or failure.metrics.request_id or request_id,
            cause=error,
        )


def _advice(failure: AttemptFailed, hot_loading: bool) -> str:
    if isinstance(failure.error, AuthenticationFailed):
        return " Check the API key, and that it may use this deployment."
    if hot_loading:
        return " The deployment did not become ready; check its state and the model name."
    if isinstance(failure.error, NotFound):
        return " Check the model name: this server has no such deployment."
    if failure.kind == "timeout":
        return " The server is stuck or far behind: lower the concurrency, or raise http_timeout."
    return ""
