"""`FiretitanSamplingClient`: Tinker's sampling client over a `DeploymentSampler`.

It turns tinker's types into a sampler's calls and back; connections, window and retries are the
sampler's. Importing this loads no tinker: whoever passes its types has loaded it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from fireworks_training._async.sampling import handles
from fireworks_training._async.sampling.concurrency import SamplingConcurrencyController
from fireworks_training._async.sampling.retry_config import (
    ProgressTimeout,
    Retries,
    retries_of,
    window_of,
)
from fireworks_training._async.sampling.sampler import DeploymentSampler, SamplerInternals
from fireworks_training.errors import (
    InvalidArgument,
    NotSupported,
    SamplingError,
    SamplingRequestError,
)
from fireworks_training.events import OnEvent
from fireworks_training.futures import APIFuture
from fireworks_training.models import SampledCompletion
from fireworks_training.options import RetryConfig, SamplingOptions, Tokenizer

if TYPE_CHECKING:
    from tinker import ModelInput, SampledSequence, SampleResponse, SamplingParams

T = TypeVar("T")

DRAIN_TIMEOUT = 3600.0
"""Seconds that requests under way may still take after `close()`."""

DEFAULT_MAX_TOKENS = 1024


class FiretitanSamplingClient:
    """Samples as Tinker's `SamplingClient` does, from a serving deployment.

    `service.create_sampling_client(...)` makes one on the service's connections; `create(...)` one
    of its own. Calls start at once and return an `APIFuture`: `.result()` in plain functions,
    `await` in coroutines, from any thread and loop.

    Pickling keeps where to sample, and no credentials: the process that unpickles it uses its own
    `FIREWORKS_API_KEY`, connections, concurrency window and retries.

    Args:
        deployment_sampler: does the work; `close()` closes it.
        retries: replace the sampler's own, for the rest of the SDK; users pass a `retry_config` to
            what makes the client.
    """

    def __init__(
        self, deployment_sampler: DeploymentSampler, *, retries: Retries | None = None
    ) -> None:
        self.deployment_sampler = deployment_sampler
        self._timeout: ProgressTimeout | None = None
        if retries is not None:
            SamplerInternals.context_of(deployment_sampler).retries = retries.policy
            self._timeout = ProgressTimeout(retries.progress_timeout, deployment_sampler.model)

    @classmethod
    def create(
        cls,
        *,
        inference_url: str,
        model: str,
        api_key: str,
        tokenizer: Tokenizer | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
        max_concurrency: int | None = None,
        additional_headers: Mapping[str, str] | None = None,
        on_event: OnEvent | None = None,
        retry_config: RetryConfig | None = None,
    ) -> Self:
        """Make a client with connections of its own; it takes the arguments of `DeploymentSampler`.

        Args:
            retry_config: tinker's; `RetryConfig` describes what its fields do here.
        """
        retries = retries_of(retry_config)
        window = window_of(retries, concurrency_controller or max_concurrency)
        sampler = DeploymentSampler(
            inference_url,
            model,
            api_key,
            tokenizer,
            window or concurrency_controller,
            max_concurrency,
            additional_headers,
            on_event=on_event,
        )
        return cls(sampler, retries=retries)

    # -- sampling ----------------------------------------------------------------------------------

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        images: Sequence[str] | None = None,
    ) -> APIFuture[SampleResponse]:
        """Sample completions of a prompt.

        Args:
            prompt: text tokens only.
            num_samples: how many.
            sampling_params: `max_tokens` None means 1,024; sample i is drawn with `seed + i`;
                `stop=[]` ignores the model's own end of text.
            include_prompt_logprobs: also the raw model's logprobs of the prompt's tokens, None for
                the first.
            topk_prompt_logprobs: must be 0.
            images: must be None.

        Returns:
            A future of tinker's `SampleResponse`. The logprobs of its sequences are those of the
            distribution that was sampled.

        Raises:
            InvalidArgument, NotSupported, ClientClosed: at the call.
            SamplingRequestError: from the future: a completion failed for good.
            SamplingError: from the future: the server does not report the logprobs of the
                distribution that it sampled.
        """
        if topk_prompt_logprobs:
            raise NotSupported("topk_prompt_logprobs: the deployment does not report them")
        if images is not None:
            raise NotSupported("images: vision inputs are not supported")
        options: SamplingOptions = {
            "logprobs": True,
            "top_p": float(sampling_params.top_p),
            "top_k": sampling_params.top_k,
        }
        if sampling_params.seed is not None:
            options["seed"] = sampling_params.seed
        if sampling_params.stop is not None:
            options["stop"] = cast(Any, sampling_params.stop)
        if include_prompt_logprobs:
            options["echo"] = True
        limit = sampling_params.max_tokens
        sampling = SamplerInternals.sampling(
            self.deployment_sampler,
            _text_tokens(prompt),
            num_samples,
            DEFAULT_MAX_TOKENS if limit is None else limit,
            float(sampling_params.temperature),
            options,
        )

        async def work() -> SampleResponse:
            return _response(await sampling(), with_prompt=include_prompt_logprobs)

        return self._start(work, "sampling")

    async def sample_async(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        images: Sequence[str] | None = None,
    ) -> SampleResponse:
        """Await `sample`; cancelling the caller cancels the requests."""
        future = self.sample(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs,
            topk_prompt_logprobs,
            images=images,
        )
        return await _cancelling(future)

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """Compute the natural logprobs of a prompt under the raw model; None for the first token.

        It samples one token with an echo; and none, where the server refuses that one: a prompt may
        fill the context. For training, `forward` of the training client gives the trainer's own.
        """
        tokens = _text_tokens(prompt)
        one_token, no_token = (
            SamplerInternals.sampling(
                self.deployment_sampler, tokens, 1, limit, 1.0, {"logprobs": True, "echo": True}
            )
            for limit in (1, 0)
        )

        async def work() -> list[float | None]:
            try:
                (one,) = await one_token()
            except SamplingRequestError as refused:
                if refused.final_status != 400:
                    raise
                try:
                    (one,) = await no_token()
                except SamplingRequestError:
                    raise refused from None
            return _prompt_logprobs(one)

        return self._start(work, "computing logprobs")

    async def compute_logprobs_async(self, prompt: ModelInput) -> list[float | None]:
        """Await `compute_logprobs`; cancelling the caller cancels the request."""
        return await _cancelling(self.compute_logprobs(prompt))

    def _start(self, work: Callable[[], Coroutine[Any, Any, T]], label: str) -> APIFuture[T]:
        timeout = self._timeout
        timed = work if timeout is None else lambda: timeout.run(work)
        return APIFuture(
            SamplerInternals.tasks_of(self.deployment_sampler).spawn(timed, label=label)
        )

    # -- what it is --------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer of the model.

        Raises:
            InvalidArgument: the client was made without one.
        """
        tokenizer = self.deployment_sampler.tokenizer
        if tokenizer is None:
            raise InvalidArgument("this client has no tokenizer: pass tokenizer= when making it")
        return tokenizer

    def get_base_model(self) -> str:
        """Return the model string that is sampled."""
        return self.deployment_sampler.model

    async def get_base_model_async(self) -> str:
        """Return `get_base_model()`, for callers that await it."""
        return self.get_base_model()

    # -- other processes ---------------------------------------------------------------------------

    def get_sampler_handle(self) -> str:
        """Encode where this client samples in a string without credentials and tokenizer."""
        return handles.encode(self.deployment_sampler)

    @classmethod
    def from_sampler_handle(
        cls, handle: str, *, api_key: str | None = None, tokenizer: Tokenizer | None = None
    ) -> Self:
        """Make a client of the sampler behind a handle, with this process's credentials.

        Args:
            handle: a result of `get_sampler_handle()`.
            api_key: default `FIREWORKS_API_KEY`.

        Raises:
            InvalidArgument: this is not a handle, or there is no key.
        """
        found = handles.arguments(handle, api_key=api_key)
        return cls(DeploymentSampler(tokenizer=tokenizer, **found))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (
            type(self),
            self.get_sampler_handle(),
            self.deployment_sampler.tokenizer,
        )

    # -- the end -----------------------------------------------------------------------------------

    def close(self, drain_timeout_s: float = DRAIN_TIMEOUT) -> None:
        """Refuse new requests, and return; those that are running finish in the background.

        They go on with the snapshot that they began with, as far as the deployment allows. What
        still runs after `drain_timeout_s` seconds is cancelled, and fails with
        `SamplingClientClosedError`. Idempotent.
        """
        SamplerInternals.tasks_of(self.deployment_sampler).close_later(drain_timeout_s)

    async def aclose(self, drain_timeout_s: float = DRAIN_TIMEOUT) -> None:
        """Refuse new requests, and wait until none is running any more."""
        await SamplerInternals.tasks_of(self.deployment_sampler).aclose(drain_timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<FiretitanSamplingClient of {self.get_base_model()}>"


def _unpickled(
    cls: type[FiretitanSamplingClient], handle: str, tokenizer: Tokenizer | None
) -> FiretitanSamplingClient:
    return cls.from_sampler_handle(handle, tokenizer=tokenizer)


async def _cancelling(future: APIFuture[T]) -> T:
    """Await a future, and cancel its work when the caller is cancelled."""
    try:
        return await future
    finally:
        if not future.done():
            future.cancel()


def _text_tokens(prompt: ModelInput) -> list[int]:
    """Return the token ids of a prompt without images."""
    tokens: list[int] = []
    for index, chunk in enumerate(prompt.chunks):
        ids = getattr(chunk, "tokens", None)
        if ids is None:
            raise NotSupported(
                f"chunk {index} of the prompt is a {type(chunk).__name__}: vision inputs are not "
                "supported"
            )
        tokens.extend(ids)
    return tokens


def _response(completions: Sequence[SampledCompletion], *, with_prompt: bool) -> SampleResponse:
    from tinker import SampleResponse

    call = uuid.uuid4().hex
    sequences = [_sequence(one, f"{call}:{one.sample_index}") for one in completions]
    prompt = _prompt_logprobs(completions[0]) if with_prompt else None
    return SampleResponse(sequences=sequences, _prompt_logprobs_list=prompt)


def _sequence(one: SampledCompletion, sequence_id: str) -> SampledSequence:
    import numpy as np
    from tinker import SampledSequence

    logprobs = one.sampling_logprobs
    if logprobs is None:
        raise SamplingError(
            "the deployment reports no logprobs of the distribution it sampled from, and at this "
            "temperature, top_p and top_k the raw model's are others; sample at temperature 1, "
            "top_p 1 and top_k -1"
        )
    return SampledSequence(
        stop_reason="length" if one.finish_reason == "length" else "stop",
        sequence_id=sequence_id,
        tokens_np=np.asarray(one.completion_tokens, dtype=np.int64),
        logprobs_np=np.asarray(logprobs, dtype=np.float64)[one.echoed_prompt_logprob_count :],
    )


def _prompt_logprobs(one: SampledCompletion) -> list[float | None]:
    rows = one.inference_logprobs
    if rows is None or one.echoed_prompt_logprob_count != one.prompt_len - 1:
        raise SamplingError("the deployment did not echo the prompt's logprobs")
    return [None, *rows[: one.prompt_len - 1]]
