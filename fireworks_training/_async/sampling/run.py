"""Runs the completions of one call: slots, attempts, retries.

Each completion takes a slot for each HTTP attempt, gives it back during back-off, and goes on until
it is there or its retry budget is used up. If one completion fails, the others of the call go on,
and are handed out with the error or without it; unless what failed it (a wrong key, a dead server)
fails them too: then they are cancelled. Tokens are never spliced: an attempt that broke mid-stream
starts again from the prompt, and a stream whose deltas were handed out already fails.

It knows what the sampler's calls share (`context.py`) and how one HTTP attempt is made
(`completion_stream.py`); it does not know prompts as text, nor who waits for the result.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import Self

from fireworks_training._async.sampling import events
from fireworks_training._async.sampling.completion_stream import (
    Attempt,
    AttemptFailed,
    CompletionStream,
)
from fireworks_training._async.sampling.concurrency import SlotQueue
from fireworks_training._async.sampling.context import RequestLog, SamplerContext
from fireworks_training._async.sampling.retries import Budgets, fails_all, final_error, is_hot_load
from fireworks_training._async.sampling.token_stream import DeltaBuffer
from fireworks_training._core.backoff import is_billing, is_retryable
from fireworks_training._core.window.status_law import is_congestion
from fireworks_training._wire.completions.request import EncodedRequest, SamplingRequest
from fireworks_training.errors import SamplingRequestError
from fireworks_training.models import SampledCompletion, ServerMetrics

logger = logging.getLogger("fireworks_training.sampling")


class SamplingRun:
    """Samples the completions of one call, which is under way within the `with` block.

    Args:
        context: holds the state that the sampler's calls share.
        request: the checked options.
        total: completions that the call asks for.

    Attributes:
        labels: those of the call, as the end of a message.
        started: when it began, by the loop's clock.
        done: completions that are there.
    """

    __slots__ = (
        "_context",
        "_controller",
        "_given_up",
        "_loop",
        "_request",
        "done",
        "labels",
        "started",
        "total",
    )

    def __init__(self, context: SamplerContext, request: SamplingRequest, total: int = 1) -> None:
        self._context = context
        self._controller = context.concurrency_controller
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._given_up = False
        self.labels = f" [{request.labels}]" if request.labels else ""
        self.started = self._loop.time()
        self.total = total
        self.done = 0

    def __enter__(self) -> Self:
        self._context.progress.begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._context.progress.end(self)

    async def all(self, prompts: Sequence[EncodedRequest], n: int) -> list[SampledCompletion]:
        """Sample `n` completions of each prompt; those of the first prompt come first.

        Raises:
            SamplingRequestError: one completion failed for good; its `completions` are those that
                came. With `return_partial` only if none came.
        """
        failures: list[SamplingRequestError] = []
        tasks: list[asyncio.Task[SampledCompletion | None]] = []
        unforeseen: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one_of(prompt, sample, failures))
                    for prompt in prompts
                    for sample in range(n)
                ]
        except BaseExceptionGroup as errors:
            unforeseen = next((e for e in errors.exceptions if e not in failures), None)
        if unforeseen is not None:
            raise unforeseen
        came = [one for task in tasks if (one := _result_of(task)) is not None]
        return self._partial(came, failures) if failures else came

    async def _one_of(
        self, prompt: EncodedRequest, sample: int, failures: list[SamplingRequestError]
    ) -> SampledCompletion | None:
        """Sample one of several completions; None if it failed, and its siblings may go on."""
        try:
            return await self.one(prompt, sample)
        except SamplingRequestError as failure:
            failures.append(failure)
            if self._given_up:
                raise  # cancels the siblings
            return None

    def _partial(
        self, came: list[SampledCompletion], failures: list[SamplingRequestError]
    ) -> list[SampledCompletion]:
        """Return what came in spite of failures, if that was asked for; else raise the first."""
        first = failures[0]
        if not (came and self._request.return_partial):
            first.completions = tuple(came)
            if came:
                first.message += (
                    f" {len(came)} of the call's {self.total} completions came: they are in this "
                    "error's `completions`, and return_partial=True returns them."
                )
            raise first
        logger.warning(
            "sampling from %s%s: %d of %d completions failed and are left out; the first one: %s",
            self._context.model,
            self.labels,
            self.total - len(came),
            self.total,
            first,
        )
        return came

    async def one(
        self,
        prompt: EncodedRequest,
        sample: int = 0,
        log: RequestLog | None = None,
        deltas: DeltaBuffer | None = None,
    ) -> SampledCompletion:
        """Sample one completion, however many attempts it takes.

        Args:
            sample: its place among those of the prompt.
            log: collects its attempts.
            deltas: gets its deltas.

        Raises:
            SamplingRequestError: no attempt succeeded within the retry budget.
        """
        context = self._context
        request_id = os.urandom(16).hex() if log is None else log.request_id
        attempt = Attempt(
            url=context.url,
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
                completion = await self._attempt(attempt, log, deltas)
                self.done += 1
                return completion
            except AttemptFailed as failure:
                budgets = budgets or Budgets(context.retries, context.hot_loads)
                now = self._loop.time()
                delay = budgets.next_delay(failure, now=now)
                if context.transport.hosts.hopeless(context.url, failure.error, now):
                    delay = None
                if deltas is not None and not deltas.restart():
                    delay = None
                if log is not None:
                    log.failed(failure, retried=delay is not None)
                if delay is None:
                    raise self._give_up(failure, attempt, request_id) from failure.error
                self._report_retry(failure, attempt, request_id, delay)
            await self._back_off(delay, budgets)

    async def _back_off(self, delay: float, budgets: Budgets) -> None:
        """Wait before the next attempt, or for the end of a hot load."""
        progress = self._context.progress
        progress.backing_off(1)
        try:
            if not budgets.loading:
                await asyncio.sleep(delay)
            elif await self._context.hot_loads.wait(delay):
                budgets.loaded()
        finally:
            progress.backing_off(-1)

    def _slot(self, number: int) -> Awaitable[None]:
        """Wait for a slot; a retry goes before new requests, if the controller knows of retries."""
        if number > 1 and isinstance(self._controller, SlotQueue):
            return self._controller.acquire(retry=True)
        return self._controller.acquire()

    async def _attempt(
        self, attempt: Attempt, log: RequestLog | None, deltas: DeltaBuffer | None
    ) -> SampledCompletion:
        """Make one HTTP attempt, in a slot of the controller."""
        context = self._context
        hook = context.transport.events
        await self._slot(attempt.number)
        reported: ServerMetrics | None = None
        stream: CompletionStream | None = None
        context.progress.attempt(attempt, self._loop.time())
        try:
            if self._given_up:
                # The slot is that of a sibling that failed: the call is over, send nothing.
                raise asyncio.CancelledError
            if hook is not None:
                events.submitted(hook, attempt, self._controller)
            stream = CompletionStream(
                context.transport,
                attempt,
                without_echo=context.without_echo,
                keep_tokens=deltas is not None,
            )
            await stream.open()
            completion = await stream.read(None if deltas is None else deltas.put)
            completion = self._with_distance(completion)
            reported = completion.metrics
            context.metrics.append(reported)
            context.note_answer(None)
            context.transport.usage.sampled(
                reported.prompt_tokens, reported.cached_prompt_tokens, reported.completion_tokens
            )
            if stream.sampling_substituted and completion.completion_len:
                context.warn_substituted()
            if stream.logprobs_missing:
                context.warn_no_logprobs()
            if log is not None:
                log.succeeded(reported, stream.response_id)
            if hook is not None:
                events.finished(hook, attempt, reported)
            return completion
        except AttemptFailed as failure:
            context.metrics.append(failure.metrics)
            context.note_answer(failure)
            # Other failures are no evidence of how crowded the server is.
            reported = failure.metrics if is_congestion(failure.metrics) else None
            raise
        finally:
            if stream is not None:
                stream.close()
            context.progress.attempt_over(attempt)
            self._controller.release(reported)
            if hook is not None:
                hook.report_window(self._controller)

    def _with_distance(self, completion: SampledCompletion) -> SampledCompletion:
        """Note how far the trainer has gone since the weights that began the completion."""
        if self._context.distance is None:
            return completion
        steps = self._context.distance(completion.snapshot_identity_first)
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
        return self._context.transport.headers(extra)

    def _report_retry(
        self, failure: AttemptFailed, attempt: Attempt, request_id: str, delay: float
    ) -> None:
        hook = self._context.transport.events
        events.retried(hook, attempt.headers, attempt.number, delay, failure.error)
        self._context.progress.failed(failure.error.message)
        if is_billing(failure.error):
            self._context.warn_billing()
        logger.info(
            "sampling from %s%s: attempt %d failed (%s), next in %.2f s, request %s",
            self._context.model,
            self.labels,
            attempt.number,
            failure.error.message,
            delay,
            request_id,
        )

    def _give_up(
        self, failure: AttemptFailed, attempt: Attempt, request_id: str
    ) -> SamplingRequestError:
        """End a completion that failed for good, and the call if all fail so; returns the error."""
        self._given_up = self._given_up or fails_all(failure)
        note = getattr(self._controller, "note_retry_exhausted", None)
        if note is not None and is_retryable(failure.error) and not is_hot_load(failure.error):
            note(failure.metrics)
        error = final_error(failure, attempt.number, request_id, self._context.model, self.labels)
        events.failed(self._context.transport.events, attempt.headers, error)
        return error


def _result_of(task: asyncio.Task[SampledCompletion | None]) -> SampledCompletion | None:
    """Return the completion that a finished task made; None if it made none."""
    return None if task.cancelled() or task.exception() is not None else task.result()
