"""The completions of one call: slots, attempts, retries, and what is said while they last.

Each completion is a task that takes a slot for each HTTP attempt, gives it back during back-off,
and goes on until it has its completion or its budget is used up. One that fails takes its siblings
with it. Tokens are never spliced: an attempt that broke mid-stream starts again from the prompt.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fireworks_training._async.completion_stream import Attempt, AttemptFailed, CompletionStream
from fireworks_training._async.gate import SamplingConcurrencyController
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
from fireworks_training.models import SampledCompletion, ServerMetrics

FIRST_REPORT = 30.0
"""Seconds after which a call that is not done says what it waits for; then at growing intervals."""

LONGEST_REPORT_INTERVAL = 600.0

HOT_LOAD_STATUS = frozenset({404, 425})
"""Statuses of a deployment that is loading a snapshot, or that its gateway doesn't know yet."""

_TIMEOUT_STATUS = frozenset({408, 504})

logger = logging.getLogger("fireworks_training.sampling")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Makes the retry budgets of a completion; tests make quicker ones."""

    transient: Callable[[], Backoff] = Backoff
    hot_load: Callable[[], Backoff] = lambda: Backoff(
        attempts=11, base=0.5, cap=8.0, spread=0.2, retryable=is_hot_load
    )


def is_hot_load(error: ApiError) -> bool:
    """Whether the deployment may be loading a snapshot.

    Our platform says NOT_FOUND only of a deployment that does not exist: no wait mends that.
    """
    if not isinstance(error, ApiStatusError) or error.status not in HOT_LOAD_STATUS:
        return False
    return not (isinstance(error, NotFound) and error.error_class == "NOT_FOUND")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a call, encoded."""

    ids: Sequence[int]
    encoded: EncodedRequest
    index: int


class SamplingRun:
    """One call: `n` completions of each of its prompts.

    Args:
        transport: the connection pool.
        url: the completions route.
        model: model string, for messages.
        controller: bounds the attempts in flight.
        request: what to sample.
        retries: the retry budgets.
        record: keeps what each attempt cost.
        without_echo: takes the text of echoed prompt tokens off a text; None without a tokenizer.
        warn_substituted: told when a server reports raw logprobs only.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        url: str,
        model: str,
        controller: SamplingConcurrencyController,
        request: SamplingRequest,
        retries: RetryPolicy,
        record: deque[ServerMetrics],
        without_echo: Callable[[str, Sequence[int]], str] | None,
        warn_substituted: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._url = url
        self._model = model
        self._controller = controller
        self._request = request
        self._retries = retries
        self._record = record
        self._without_echo = without_echo
        self._warn_substituted = warn_substituted
        self._clock = asyncio.get_running_loop().time
        self._total = 0
        self._done = 0
        self._backing_off = 0
        self._given_up = False
        self._started: dict[str, float] = {}  # attempts in flight, oldest first

    async def complete(self, prompts: Sequence[Prompt], n: int) -> list[SampledCompletion]:
        """All completions, prompt-major.

        Raises:
            SamplingRequestError: one could not be had; the others were given up.
        """
        self._total = len(prompts) * n
        report = _Report(self._describe)
        failed: BaseExceptionGroup[BaseException] | None = None
        tasks: list[asyncio.Task[SampledCompletion]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks.extend(
                    group.create_task(self._one(prompt, sample))
                    for prompt in prompts
                    for sample in range(n)
                )
        except BaseExceptionGroup as errors:
            failed = errors
        finally:
            report.stop()
        if failed is not None:
            raise failed.exceptions[0]
        return [task.result() for task in tasks]

    async def _one(self, prompt: Prompt, sample: int) -> SampledCompletion:
        """One completion, however many attempts it takes."""
        request_id = uuid.uuid4().hex
        headers = self._headers(request_id)
        body = prompt.encoded.body(sample)
        transient, hot_load = self._retries.transient(), self._retries.hot_load()
        number = 0
        while True:
            number += 1
            attempt = Attempt(
                url=self._url,
                headers=headers,
                body=body,
                request=self._request,
                prompt_ids=prompt.ids,
                number=number,
                prompt_index=prompt.index,
                sample_index=sample,
            )
            try:
                completion = await self._attempt(attempt, request_id)
            except AttemptFailed as failure:
                budget = hot_load if is_hot_load(failure.error) else transient
                delay = budget.next_delay(failure.error, now=self._clock())
                if delay is None:
                    self._given_up = True
                    raise self._final_error(failure, request_id, number) from failure.error
                self._say_retry(failure, request_id, number, delay)
            else:
                self._done += 1
                return completion
            self._backing_off += 1
            try:
                await asyncio.sleep(delay)
            finally:
                self._backing_off -= 1

    async def _attempt(self, attempt: Attempt, request_id: str) -> SampledCompletion:
        """One HTTP attempt, in a slot of the controller."""
        await self._controller.acquire()
        told: ServerMetrics | None = None
        self._started[request_id] = self._clock()
        try:
            if self._given_up:
                # The slot is that of a sibling that failed: the call is over, send nothing.
                raise asyncio.CancelledError
            async with CompletionStream(
                self._transport, attempt, without_echo=self._without_echo
            ) as stream:
                completion = await stream.read()
            told = completion.metrics
            self._record.append(told)
            if stream.sampling_substituted:
                self._warn_substituted()
            return completion
        except AttemptFailed as failure:
            self._record.append(failure.metrics)
            # Other failures say nothing about how crowded the server is.
            told = failure.metrics if is_congestion(failure.metrics) else None
            raise
        finally:
            del self._started[request_id]
            self._controller.release(told)

    def _headers(self, request_id: str) -> Mapping[str, str]:
        extra = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            # A compressing proxy would hold tokens back until it has enough of them.
            "Accept-Encoding": "identity",
            **self._request.headers,
            "X-Request-Id": request_id,
        }
        return self._transport.headers(extra)

    def _context(self) -> str:
        return f" [{self._request.context}]" if self._request.context else ""

    def _say_retry(
        self, failure: AttemptFailed, request_id: str, number: int, delay: float
    ) -> None:
        logger.info(
            "sampling from %s%s: attempt %d failed (%s), next in %.2f s, request %s",
            self._model,
            self._context(),
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
            f"no completion from {self._model}{self._context()} after {tries}: {error.message}."
            f"{_advice(failure, hot_loading)}",
            logical_request_id=request_id,
            model=self._model,
            attempts=attempts,
            final_status=status,
            final_error_kind=failure.kind,
            retry_budget_exhausted=exhausted,
            request_id=error.request_id or failure.metrics.request_id or request_id,
            cause=error,
        )

    def _describe(self) -> str:
        in_flight = len(self._started)
        waiting = self._total - self._done - in_flight - self._backing_off
        text = (
            f"sampling: {self._done} of {self._total} done, window "
            f"{self._controller.window_size}, {in_flight} in flight, {waiting} waiting for a "
            f"slot, {self._backing_off} waiting to retry"
        )
        if self._started:
            oldest = self._clock() - next(iter(self._started.values()))
            text += f", oldest {oldest:.0f} s"
        return text + self._context()


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


class _Report:
    """Says what a call waits for, once it takes long, and then at growing intervals."""

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe = describe
        self._loop = asyncio.get_running_loop()
        self._interval = FIRST_REPORT
        self._timer = self._loop.call_later(self._interval, self._say)

    def _say(self) -> None:
        logger.warning("%s", self._describe())
        self._interval = min(self._interval * 2, LONGEST_REPORT_INTERVAL)
        self._timer = self._loop.call_later(self._interval, self._say)

    def stop(self) -> None:
        self._timer.cancel()
