"""`DeploymentSampler`: samples completions from a serving deployment.

One class for plain functions and for coroutines: its calls return a `SampleCall`, which is awaited
or asked for its `.result()`. It checks arguments when it is called, and turns conversations into
token ids in a worker thread; what happens on the wire is `sampling_run`'s.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from fireworks_training._async.gate import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from fireworks_training._async.loops import OwnerLoop
from fireworks_training._async.prompts import (
    Conversation,
    LockedTokenizer,
    Tokenizer,
    conversations_of,
    prompts_of,
)
from fireworks_training._async.sampling_run import Prompt, RetryPolicy, SamplingRun
from fireworks_training._async.transport import Transport
from fireworks_training._portal import at_exit
from fireworks_training._wire.completions import (
    PATH,
    SamplingOptions,
    SamplingRequest,
    integer,
    sampling_request,
)
from fireworks_training.errors import (
    ClientClosed,
    InvalidArgument,
    SamplingClientClosedError,
    UsageError,
)
from fireworks_training.futures import Outcome, SampleCall
from fireworks_training.models import SampledCompletion, ServerMetrics

T = TypeVar("T")

METRICS_KEPT = 65_536
"""Attempts whose metrics are kept until `drain_metrics()`; the oldest go first."""

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

    Raises:
        InvalidArgument: an argument is missing or contradicts another.
    """

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
        transport = Transport(
            owner=OwnerLoop(portal=True),
            base_url=inference_url,
            api_key=api_key,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
        )
        self._set_up(
            transport, inference_url, model, tokenizer, concurrency_controller, integer_stops
        )
        self._owns_transport = True
        self._retries = retries or RetryPolicy()

    @classmethod
    def _shared(
        cls,
        *,
        transport: Transport,
        inference_url: str,
        model: str,
        tokenizer: Tokenizer | None,
        concurrency_controller: SamplingConcurrencyController,
        current_snapshot: str | None = None,
        integer_stops: bool = False,
    ) -> Self:
        """A sampler on the connections and the loop of a service, which closes them."""
        sampler = cls.__new__(cls)
        sampler._set_up(
            transport, inference_url, model, tokenizer, concurrency_controller, integer_stops
        )
        sampler._current_snapshot = current_snapshot
        return sampler

    def _set_up(
        self,
        transport: Transport,
        inference_url: str,
        model: str,
        tokenizer: Tokenizer | None,
        controller: SamplingConcurrencyController | None,
        integer_stops: bool,
    ) -> None:
        if not model:
            raise InvalidArgument("model is empty: pass accounts/<account>/deployments/<name>")
        controller = controller if controller is not None else AdaptiveConcurrencyController()
        self.concurrency_controller = controller
        self._transport = transport
        self._inference_url = inference_url.rstrip("/")
        self._model = model
        self._tokenizer = None if tokenizer is None else LockedTokenizer(tokenizer)
        self._integer_stops = integer_stops
        self._current_snapshot: str | None = None
        self._owns_transport = False
        self._retries = RetryPolicy()
        self._metrics: deque[ServerMetrics] = deque(maxlen=METRICS_KEPT)
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._substitution_said = False
        self._forget_exit: Callable[[], None] | None = None

    # -- what it is --------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Model string of the deployment."""
        return self._model

    @property
    def inference_url(self) -> str:
        """Scheme and host of the inference API."""
        return self._inference_url

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that messages are turned into ids with."""
        return None if self._tokenizer is None else self._tokenizer.tokenizer

    @property
    def concurrency_controller(self) -> SamplingConcurrencyController:
        """Bounds the requests in flight; may be replaced for the calls that follow."""
        return self._controller

    @concurrency_controller.setter
    def concurrency_controller(self, controller: SamplingConcurrencyController) -> None:
        if not isinstance(controller, SamplingConcurrencyController):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(
                "a concurrency controller has window_size, acquire(), release(metrics) and "
                f"step_completed(); {type(controller).__name__} lacks some of them"
            )
        self._controller = controller

    @property
    def current_snapshot(self) -> str | None:
        """Identity of the snapshot that the service synced last; None if it synced none."""
        return self._current_snapshot

    def _set_snapshot(self, identity: str | None) -> None:
        """For the service: what the deployment serves now."""
        self._current_snapshot = identity

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
            first; `prompt_index` and `sample_index` tell which is which.

        Raises:
            InvalidArgument, UnknownOption, NotSupported: at the call, if it is wrong.
            SamplingRequestError: from the result: one completion could not be had.
            SamplingClientClosedError: from the result: the sampler was closed under it.
        """
        request = self._request(max_tokens, temperature, options)
        conversations = conversations_of(messages)
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise InvalidArgument(
                "sampling from messages needs a tokenizer: pass tokenizer= when making the "
                "sampler, or token ids to sample_with_prompt_tokens"
            )
        return self._call(
            lambda: asyncio.to_thread(tokenizer.apply_template, conversations),
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

        async def as_they_are() -> list[list[int]]:
            return prompts

        return self._call(as_they_are, len(prompts), n, request, max_seq_len)

    def drain_metrics(self) -> list[ServerMetrics]:
        """What each attempt since the last drain cost, oldest first; the newest 65,536."""
        drained: list[ServerMetrics] = []
        while self._metrics:
            drained.append(self._metrics.popleft())
        return drained

    def _request(
        self, max_tokens: int, temperature: float, options: SamplingOptions
    ) -> SamplingRequest:
        if self._closed:
            raise ClientClosed("the sampler was closed; make a new one")
        return sampling_request(
            self._model,
            max_tokens=max_tokens,
            temperature=temperature,
            options=options,
            decode_stop=None if self._integer_stops else self._stop_texts,
        )

    def _stop_texts(self, ids: list[int]) -> list[str]:
        if self._tokenizer is None:
            raise InvalidArgument(
                "stop holds token ids, and this server takes strings: pass tokenizer= when making "
                "the sampler, or strings"
            )
        return self._tokenizer.stop_texts(ids)

    def _call(
        self,
        find_prompts: Callable[[], Coroutine[Any, Any, list[list[int]]]],
        prompts: int,
        n: int,
        request: SamplingRequest,
        max_seq_len: int | None,
    ) -> SampleCall[list[SampledCompletion]]:
        integer("n", n, 1)
        if max_seq_len is not None:
            integer("max_seq_len", max_seq_len, 1)

        async def work() -> list[SampledCompletion]:
            return await self._sample(await find_prompts(), n, request, max_seq_len)

        total = prompts * n
        label = "sampling a completion" if total == 1 else f"sampling {total} completions"

        def start() -> Outcome[list[SampledCompletion]]:
            try:
                return self._spawn(work, label)
            except UsageError as error:
                # The call has started, and this is its result: also for later awaits.
                outcome = Outcome[list[SampledCompletion]](label=label)
                outcome.fail(error)
                return outcome

        return SampleCall(start, label=label)

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, T]], label: str) -> Outcome[T]:
        if self._closed:
            raise ClientClosed("the sampler was closed; make a new one")
        if self._owns_transport and self._forget_exit is None:
            self._forget_exit = at_exit(f"sampler of {self._model}", self._transport.close)
        return self._transport.owner.spawn(lambda: self._until_closed(work), label=label)

    async def _until_closed(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run work that `close()` may end."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            if self._closed:
                raise asyncio.CancelledError
            return await work()
        except asyncio.CancelledError:
            if not self._closed:
                raise
            raise SamplingClientClosedError(
                "the sampler was closed before the completions were there; they are safe to ask "
                "for again"
            ) from None
        finally:
            self._running.discard(task)

    async def _sample(
        self,
        prompts: list[list[int]],
        n: int,
        request: SamplingRequest,
        max_seq_len: int | None,
    ) -> list[SampledCompletion]:
        fitting = [
            Prompt(ids, request.encode(ids, earlier=index * n), index)
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
        if not fitting:
            return []
        run = SamplingRun(
            transport=self._transport,
            url=self._inference_url + PATH,
            model=self._model,
            controller=self._controller,
            request=request,
            retries=self._retries,
            record=self._metrics,
            without_echo=None if self._tokenizer is None else self._tokenizer.without_echo,
            warn_substituted=self._say_substituted,
        )
        completions = await run.complete(fitting, n)
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

    def _say_substituted(self) -> None:
        if not self._substitution_said:
            self._substitution_said = True
            logger.warning(
                "%s reports no sampling logprobs; at temperature 1 without top-p and top-k they "
                "equal the raw ones, which stand in for them",
                self._model,
            )

    # -- the end -----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Cancel what is under way, and close the connections if they are the sampler's own.

        Calls that are under way fail with `SamplingClientClosedError`. Idempotent.
        """
        if self._start_closing():
            await self._transport.owner.run(self._end, label="closing a sampler")
            self._release()

    def close(self) -> None:
        """`aclose()` for plain functions; not for the loop that runs the sampler."""
        if self._start_closing():
            outcome = self._transport.owner.spawn(self._end, label="closing a sampler")
            outcome.refuse_dead_lock()
            outcome.result()
            self._release()

    def _start_closing(self) -> bool:
        """Refuse further calls; whether there is anything to end."""
        if self._closed:
            return False
        self._closed = True
        return self._transport.owner.bound is not None

    async def _end(self) -> None:
        mine = asyncio.current_task()
        running = [task for task in self._running if task is not mine]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        if self._owns_transport:
            await self._transport.close()

    def _release(self) -> None:
        if self._owns_transport:
            if self._forget_exit is not None:
                self._forget_exit()
            self._transport.owner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._transport.owner.use_running()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<DeploymentSampler of {self._model}: {self._controller!r}>"
