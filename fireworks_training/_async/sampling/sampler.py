"""`DeploymentSampler`: samples completions from a serving deployment.

One class for plain functions and for coroutines: its calls return a `SampleCall`, which is awaited
or asked for its `.result()`. It checks arguments when it is called, and turns conversations into
token ids in a worker thread. What its calls share stands in `context.py`, its running calls in
`tasks.py`; `run.py` sends the requests.
"""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Self, TypeAlias, TypeVar, TypeVarTuple, Unpack, cast

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._async.sampling import handles
from fireworks_training._async.sampling.concurrency import (
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from fireworks_training._async.sampling.context import RequestLog, SamplerContext
from fireworks_training._async.sampling.prompts import (
    Ids,
    conversations_of,
    is_conversation,
    one_prompt,
    prompts_of,
)
from fireworks_training._async.sampling.retries import RetryPolicy
from fireworks_training._async.sampling.run import SamplingRun
from fireworks_training._async.sampling.signatures import show_options
from fireworks_training._async.sampling.tasks import SamplerTasks
from fireworks_training._async.sampling.token_stream import DeltaBuffer, TokenStream
from fireworks_training._checks import integer
from fireworks_training._outcome import Outcome
from fireworks_training._wire.completions.body import completion_body
from fireworks_training._wire.completions.request import EncodedRequest, SamplingRequest
from fireworks_training.errors import InvalidArgument, NotSupported, UsageError
from fireworks_training.events import OnEvent
from fireworks_training.futures import SampleCall
from fireworks_training.models import SampledCompletion, SampledRequestResult, ServerMetrics
from fireworks_training.options import Conversation, SamplingOptions, Tokenizer

T = TypeVar("T")
Args = TypeVarTuple("Args")

Prompts: TypeAlias = list[Ids] | Callable[[], Coroutine[Any, Any, list[Ids]]]
"""Prompts as token ids, or a coroutine function that finds these on the owner loop."""

logger = logging.getLogger("fireworks_training.sampling")


class DeploymentSampler:
    """Samples completions from a serving deployment.

    `service.create_deployment_sampler(...)` makes one that shares the service's connections; this
    constructor makes one of its own, to be closed by `close()` or as a context manager. It may be
    used from any thread and any event loop. Entered by `async with` before its first call, it does
    its work on that loop, which saves each call a hop to the background loop and back.

    Args:
        inference_url: scheme and host of the inference API; `/inference/v1/completions` is added.
        model: `accounts/<account>/deployments/<deployment>`.
        api_key: key of the inference API.
        tokenizer: needed to sample from messages, and to turn stop token ids into text.
        concurrency_controller: bounds the requests in flight; one `AdaptiveConcurrencyController()`
            unless given. Share one among samplers of the same deployment.
        max_concurrency: deprecated: pass `FixedConcurrencyController(max_concurrency)`.
        additional_headers: sent with every request.
        integer_stops: whether the server takes token ids in `stop`, as the local platform does.
            Others get their text, from the tokenizer; ids without a text of their own are refused.
        verify_ssl: False accepts any certificate.
        retries: retry budgets, for tests.
        request_context: labels for error messages and logs of all calls; `sampling_context` of a
            call adds to them. Never sent.
        on_event: is called with requests, retries, windows and failures, as the `on_event` of
            `from_firetitan_config` is.

    A pickled sampler keeps where it samples, its headers and its tokenizer, but no credentials, and
    no other concurrency controller than a fixed one: the process that unpickles it uses its own
    `FIREWORKS_API_KEY`, connections and window.

    Raises:
        InvalidArgument: an argument is missing or contradicts another.
    """

    _context: SamplerContext
    _tasks: SamplerTasks

    def __init__(
        self,
        inference_url: str,
        model: str,
        api_key: str,
        tokenizer: Tokenizer | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
        max_concurrency: int | None = None,
        additional_headers: Mapping[str, str] | None = None,
        *,
        integer_stops: bool = False,
        verify_ssl: bool = True,
        retries: RetryPolicy | None = None,
        request_context: Mapping[str, object] | None = None,
        on_event: OnEvent | None = None,
    ) -> None:
        if max_concurrency is not None:
            warnings.warn(
                "max_concurrency is deprecated: pass "
                f"concurrency_controller=FixedConcurrencyController({max_concurrency})",
                DeprecationWarning,
                stacklevel=2,
            )
            if concurrency_controller is not None:
                raise InvalidArgument("pass concurrency_controller or max_concurrency, not both")
            concurrency_controller = FixedConcurrencyController(max_concurrency)
        if not inference_url.startswith(("http://", "https://")):
            raise InvalidArgument(f"inference_url must begin with http(s)://, got {inference_url}")
        if not api_key:
            raise InvalidArgument("api_key is empty: pass the key of the inference API")
        events = EventHook.of(on_event)
        transport = Transport(
            owner=OwnerLoop(portal=True, on_blocked=None if events is None else events.blocked),
            base_url=inference_url,
            api_key=api_key,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            events=events,
        )
        self._context = SamplerContext(
            transport=transport,
            inference_url=inference_url,
            model=model,
            tokenizer=tokenizer,
            concurrency_controller=concurrency_controller,
            integer_stops=integer_stops,
            retries=retries,
            labels=request_context,
        )
        self._tasks = SamplerTasks(transport, owns_transport=True, label=f"sampler of {model}")

    # -- what it is --------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Model string of the deployment."""
        return self._context.model

    @property
    def base_url(self) -> str:
        """Scheme and host of the inference API."""
        return self._context.inference_url

    @property
    def account_id(self) -> str | None:
        """Account of the deployment; None where the model string names none."""
        found = re.match(r"accounts/([^/]+)/", self._context.model)
        return found[1] if found else None

    @property
    def inference_url(self) -> str:
        """Scheme and host of the inference API."""
        return self._context.inference_url

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that turns messages into token ids."""
        return None if self._context.tokenizer is None else self._context.tokenizer.tokenizer

    @property
    def additional_headers(self) -> Mapping[str, str]:
        """HTTP headers that are sent with every request."""
        return self._context.transport.additional_headers

    @property
    def integer_stops(self) -> bool:
        """Whether the server takes token ids in `stop`."""
        return self._context.integer_stops

    @property
    def verify_ssl(self) -> bool:
        """Whether the server's certificate is checked."""
        return self._context.transport.verify_ssl

    @property
    def concurrency_controller(self) -> SamplingConcurrencyController:
        """Bounds the requests in flight; may be replaced for the calls that follow."""
        return self._context.concurrency_controller

    @concurrency_controller.setter
    def concurrency_controller(self, controller: SamplingConcurrencyController) -> None:
        self._context.concurrency_controller = controller

    @property
    def current_snapshot(self) -> str | None:
        """Identity of the snapshot that the service synced last; None if it synced none."""
        return self._context.current_snapshot

    # -- sampling ----------------------------------------------------------------------------------

    def sample_with_tokens(
        self,
        messages: Conversation | Sequence[Conversation],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> SampleCall[list[SampledCompletion]]:
        """Sample `n` completions of each conversation.

        Args:
            messages: one conversation (a list of `{"role", "content"}`), or a list of them. The
                tokenizer's chat template is applied, with a generation prompt.
            n: completions of each, each a streaming request of its own.
            max_tokens: tokens of a completion at most.
            temperature: 0 is greedy.
            max_seq_len: a prompt of this many tokens or more gives no completions, without a
                request; completions that end up longer, with their prompt, are dropped.
            **options: see `SamplingOptions`.

        Returns:
            A call whose result is the list of completions, the ones of the first conversation
            first; `prompt_index` and `sample_index` number them.

        Raises:
            InvalidArgument, UnknownOption, NotSupported: at the call, if it is wrong.
            SamplingRequestError: from the result: one completion failed for good. Its
                `completions` are those that came; `return_partial=True` returns them instead.
            SamplingClientClosedError: from the result: the sampler was closed under it.
        """
        request = self._request(max_tokens, temperature, options)
        conversations = conversations_of(messages)
        tokenizer = self._context.needed_tokenizer()
        return self._call(
            lambda: in_thread(tokenizer.apply_template, conversations),
            len(conversations),
            n,
            request,
            max_seq_len,
        )

    def sample_with_prompt_tokens(
        self,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]],
        n: int = 1,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> SampleCall[list[SampledCompletion]]:
        """Sample `n` completions of each prompt, given as token ids; no tokenizer is needed.

        Args:
            prompt_token_ids: one prompt (a list of token ids), or a list of them.

        The other arguments, the result and the errors are those of `sample_with_tokens`.
        """
        request = self._request(max_tokens, temperature, options)
        prompts = prompts_of(prompt_token_ids)
        return self._call(prompts, len(prompts), n, request, max_seq_len)

    def sample_with_prompt_tokens_result(
        self,
        prompt_token_ids: Sequence[int],
        *,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        logical_request_id: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> SampleCall[SampledRequestResult]:
        """Sample one completion of a prompt, and return its request and all its attempts with it.

        Args:
            max_seq_len: a prompt of this many tokens or more is refused; a completion that ends up
                longer, with its prompt, is left out of the result.
            logical_request_id: sent as `X-Request-Id`; a random one unless given.

        The other arguments and the errors are those of `sample_with_prompt_tokens`.
        """
        request = self._request_of_one(max_tokens, temperature, options)
        (ids,) = one_prompt(prompt_token_ids)
        if max_seq_len is not None and len(ids) >= integer("max_seq_len", max_seq_len, 1):
            raise InvalidArgument(
                f"the prompt has {len(ids)} tokens, and max_seq_len is {max_seq_len}: nothing "
                "could be sampled"
            )

        log = RequestLog() if logical_request_id is None else RequestLog(logical_request_id)
        label = "sampling a completion"
        return SampleCall(
            self._begin,
            self._sample_with_log,
            (ids, request, max_seq_len, log),
            label,
            label=label,
        )

    async def _sample_with_log(
        self, ids: Ids, request: SamplingRequest, max_seq_len: int | None, log: RequestLog
    ) -> SampledRequestResult:
        started = time.monotonic()
        with SamplingRun(self._context, request) as run:
            one = await run.one(request.encode(ids), log=log)
        return SampledRequestResult(
            completions=self._within([one], max_seq_len),
            server_metrics=one.metrics,
            logical_request_id=log.request_id,
            attempts=len(log.attempts),
            wall_seconds=time.monotonic() - started,
            upstream_response_id=log.attempts[-1].upstream_response_id,
            server_attempts=tuple(log.attempts),
        )

    async def async_completions_stream(
        self,
        prompt: Sequence[int],
        max_tokens: int = 1024,
        temperature: float = 1.0,
        hotload_retry_interval: float | None = None,
        hotload_max_retries: int | None = None,
        logical_request_id: str | None = None,
        prompt_cache_key: str | None = None,
        additional_headers_snapshot: Mapping[str, str] | None = None,
        **options: Any,
    ) -> tuple[dict[str, Any], ServerMetrics]:
        """Sample one completion, as the route's own JSON and the metrics of its attempt.

        For scripts that read that JSON; `sample_with_prompt_tokens_result` gives values.

        Args:
            prompt: token ids.
            hotload_retry_interval, hotload_max_retries: refused: a request waits for a hot load as
                long as that takes, and is woken by its end.
            logical_request_id: sent as `X-Request-Id`; a random one unless given.

        Returns:
            `{"choices": [{"text", "finish_reason", "raw_output", "logprobs"}], "usage", "id"}`, and
            the metrics of the attempt that made it.

        The other arguments and the errors are those of `sample_with_prompt_tokens`.
        """
        for name, value in (
            ("hotload_retry_interval", hotload_retry_interval),
            ("hotload_max_retries", hotload_max_retries),
        ):
            if value is not None:
                raise NotSupported(
                    f"{name}: a request waits for a hot load as long as that takes, and is woken "
                    "by its end; leave it out"
                )
        given: dict[str, Any] = {
            **options,
            "prompt_cache_key": prompt_cache_key,
            "additional_headers_snapshot": additional_headers_snapshot,
        }
        result = await self.sample_with_prompt_tokens_result(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            logical_request_id=logical_request_id,
            **cast(SamplingOptions, {k: v for k, v in given.items() if v is not None}),
        )
        (one,) = result.completions
        return completion_body(one, result.upstream_response_id), one.metrics

    def stream(
        self,
        prompt: Sequence[int] | Conversation,
        max_tokens: int = 1024,
        temperature: float = 1.0,
        **options: Unpack[SamplingOptions],
    ) -> TokenStream:
        """Sample one completion and hand its tokens over as they come.

            async with sampler.stream(prompt, logprobs=True) as deltas:
                async for delta in deltas:
                    ...  # delta.text, delta.tokens, delta.logprobs
            deltas.completion  # the whole; a plain `with` and `for` do the same in a thread

        Leaving early closes the connection, and the server stops generating.

        Args:
            prompt: token ids, or one conversation.

        The other arguments are those of `sample_with_tokens`.

        Raises:
            InvalidArgument, UnknownOption, NotSupported: at the call, if it is wrong.
            SamplingRequestError: from the iteration: the completion failed for good, or the stream
                broke after a delta had been handed over.
        """
        request = self._request_of_one(max_tokens, temperature, options)
        find = self._finder(prompt)
        label = "streaming a completion"
        return TokenStream(
            lambda buffer: self._tasks.spawn(self._stream, find, request, buffer, label=label),
            label=label,
        )

    async def _stream(
        self, find: Prompts, request: SamplingRequest, buffer: DeltaBuffer
    ) -> SampledCompletion:
        (ids,) = await find() if callable(find) else find
        with SamplingRun(self._context, request) as run:
            return await run.one(request.encode(ids), deltas=buffer)

    def _request(
        self, max_tokens: int, temperature: float, options: SamplingOptions
    ) -> SamplingRequest:
        self._tasks.check_open()
        return self._context.request(max_tokens, temperature, options)

    def _request_of_one(
        self, max_tokens: int, temperature: float, options: SamplingOptions
    ) -> SamplingRequest:
        request = self._request(max_tokens, temperature, options)
        if request.return_partial:
            raise InvalidArgument(
                "return_partial has no effect on a call of one completion: leave it out"
            )
        return request

    def _finder(self, prompt: Sequence[int] | Conversation) -> Prompts:
        """Check one prompt as far as it can be at once; returns its ids, or what finds them."""
        if not is_conversation(prompt):
            return one_prompt(prompt)
        conversations = conversations_of(cast(Conversation, prompt))
        if len(conversations) != 1:
            raise InvalidArgument(f"a stream takes one conversation, got {len(conversations)}")
        tokenizer = self._context.needed_tokenizer()
        return lambda: in_thread(tokenizer.apply_template, conversations)

    def drain_metrics(self) -> list[ServerMetrics]:
        """Take the metrics of attempts since the last drain, oldest first; the newest 65,536."""
        metrics = self._context.metrics
        drained: list[ServerMetrics] = []
        while metrics:
            drained.append(metrics.popleft())
        return drained

    def _call(
        self,
        find: Prompts,
        prompts: int,
        n: int,
        request: SamplingRequest,
        max_seq_len: int | None,
    ) -> SampleCall[list[SampledCompletion]]:
        n = integer("n", n, 1)
        if max_seq_len is not None:
            max_seq_len = integer("max_seq_len", max_seq_len, 1)
        total = prompts * n
        label = "sampling a completion" if total == 1 else f"sampling {total} completions"
        args = (find, n, request, max_seq_len)
        return SampleCall(self._begin, self._sample, args, label, label=label)

    def _begin(
        self,
        work: Callable[[*Args], Coroutine[Any, Any, T]],
        args: tuple[*Args],
        label: str,
    ) -> Outcome[T]:
        try:
            return self._tasks.spawn(work, *args, label=label)
        except UsageError as error:
            # The call has started, and this is its result: also for later awaits.
            outcome = Outcome[T](label=label)
            outcome.fail(error)
            return outcome

    async def _sample(
        self, find: Prompts, n: int, request: SamplingRequest, max_seq_len: int | None
    ) -> list[SampledCompletion]:
        fitting = _fitting(await find() if callable(find) else find, n, request, max_seq_len)
        del find  # for as long as the request runs the collector would visit it
        if not fitting:
            return []
        total = len(fitting) * n
        with SamplingRun(self._context, request, total) as run:
            found = [await run.one(fitting.pop())] if total == 1 else await run.all(fitting, n)
        return self._within(found, max_seq_len)

    @staticmethod
    def _within(
        completions: list[SampledCompletion], max_seq_len: int | None
    ) -> list[SampledCompletion]:
        """Keep the completions that are no longer than `max_seq_len` with their prompt."""
        if max_seq_len is None:
            return completions
        kept = [one for one in completions if len(one.full_tokens) <= max_seq_len]
        if len(kept) < len(completions):
            logger.warning(
                "%d of %d completions are longer than max_seq_len (%d) with their prompt: dropped",
                len(completions) - len(kept),
                len(completions),
                max_seq_len,
            )
        return kept

    # -- the end -----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Cancel the running calls, and close the connections if they are the sampler's own.

        The calls fail with `SamplingClientClosedError`. Idempotent.
        """
        await self._tasks.aclose()

    def close(self) -> None:
        """Do as `aclose()`, for plain functions; not for the loop that runs the sampler."""
        self._tasks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._context.transport.owner.use_running()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where the sampler samples, and its tokenizer, without credentials.

        The process that unpickles it uses its own `FIREWORKS_API_KEY`, connections and window.
        """
        return _unpickled, (handles.encode(self), self.tokenizer)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.model}: {self.concurrency_controller!r}>"


class SamplerInternals(DeploymentSampler):
    """Gives the rest of the SDK what stands behind a sampler; users meet the sampler alone."""

    @staticmethod
    def over(context: SamplerContext) -> DeploymentSampler:
        """Make a sampler over the pool and the loop of a service, which closes them."""
        sampler = DeploymentSampler.__new__(DeploymentSampler)
        sampler._context = context
        sampler._tasks = SamplerTasks(
            context.transport, owns_transport=False, label=f"sampler of {context.model}"
        )
        return sampler

    @staticmethod
    def context_of(sampler: DeploymentSampler) -> SamplerContext:
        """Return the state that the calls of a sampler share."""
        return sampler._context

    @staticmethod
    def sampling(
        sampler: DeploymentSampler,
        prompt: Sequence[int],
        n: int,
        max_tokens: int,
        temperature: float,
        options: SamplingOptions,
    ) -> Callable[[], Coroutine[Any, Any, list[SampledCompletion]]]:
        """Check a call of one prompt; returns the coroutine function that does its work.

        For a caller whose own task of the sampler awaits it: that task was accepted, and its
        work is not asked for admission a second time.
        """
        request = sampler._request(max_tokens, temperature, options)
        prompts, samples = one_prompt(prompt), integer("n", n, 1)
        return lambda: sampler._sample(prompts, samples, request, None)

    @staticmethod
    def tasks_of(sampler: DeploymentSampler) -> SamplerTasks:
        """Return the running calls of a sampler."""
        return sampler._tasks


def _unpickled(handle: str, tokenizer: Tokenizer | None) -> DeploymentSampler:
    return DeploymentSampler(tokenizer=tokenizer, **handles.arguments(handle))


def _fitting(
    prompts: list[Ids], n: int, request: SamplingRequest, max_seq_len: int | None
) -> list[EncodedRequest]:
    """Encode the prompts that leave room for a token."""
    fitting = [
        request.encode(ids, index=index, earlier=index * n)
        for index, ids in enumerate(prompts)
        if max_seq_len is None or len(ids) < max_seq_len
    ]
    if len(fitting) < len(prompts):
        logger.warning(
            "%d of %d prompts have max_seq_len (%s) tokens or more: not sampled",
            len(prompts) - len(fitting),
            len(prompts),
            max_seq_len,
        )
    return fitting


for _method in (
    DeploymentSampler.sample_with_tokens,
    DeploymentSampler.sample_with_prompt_tokens,
    DeploymentSampler.sample_with_prompt_tokens_result,
    DeploymentSampler.stream,
):
    show_options(_method, SamplingOptions)
