"""What a sampler is: its construction, its checks of a call, its end.

What it can be asked for stands in `sampler.py`; its tasks in `sampler_tasks.py`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Self

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.event_hook import EventHook
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.sampling.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training._async.sampling.progress import Progress
from fireworks_training._async.sampling.prompts import LockedTokenizer, Tokenizer
from fireworks_training._async.sampling.retries import RetryPolicy
from fireworks_training._async.sampling.run import SamplerContext
from fireworks_training._async.sampling.tasks import SamplerTasks
from fireworks_training._wire.completions.request import (
    PATH,
    SamplingOptions,
    SamplingRequest,
    check_context,
    sampling_request,
)
from fireworks_training.errors import InvalidArgument
from fireworks_training.events import OnEvent
from fireworks_training.models import ServerMetrics

METRICS_KEPT = 65_536
"""Attempts whose metrics are kept until `drain_metrics()`; the oldest go first."""

_IMMUTABLE = frozenset({bool, int, float, str, type(None)})

logger = logging.getLogger("fireworks_training.sampling")


class SamplerBase:
    """A deployment, the connections to it, and who may use them; base of `DeploymentSampler`."""

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
        self._set_up(
            transport,
            inference_url,
            model,
            tokenizer,
            concurrency_controller,
            integer_stops,
            retries or RetryPolicy(),
            HotLoadSignal(),
            owns_transport=True,
        )
        check_context(request_context or {})
        self._context: Mapping[str, object] = dict(request_context or {})

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
        retries: RetryPolicy | None = None,
        news: HotLoadSignal | None = None,
        distance: Callable[[str | None], int | None] | None = None,
    ) -> Self:
        """A sampler on the connections and the loop of a service, which closes them.

        `news` wakes requests that wait for a hot load to end; `distance` tells how far the trainer
        has gone since a snapshot.
        """
        sampler = cls.__new__(cls)
        sampler._set_up(
            transport,
            inference_url,
            model,
            tokenizer,
            concurrency_controller,
            integer_stops,
            retries or RetryPolicy(),
            news or HotLoadSignal(),
            owns_transport=False,
            distance=distance,
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
        retries: RetryPolicy,
        news: HotLoadSignal,
        *,
        owns_transport: bool,
        distance: Callable[[str | None], int | None] | None = None,
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
        self._context = {}
        self._metrics: deque[ServerMetrics] = deque(maxlen=METRICS_KEPT)
        self._source = SamplerContext(
            transport=transport,
            url=self._inference_url + PATH,
            model=model,
            retries=retries,
            record=self._metrics,
            news=news,
            distance=distance,
            progress=Progress(lambda: self._controller.window_size),
            without_echo=None if self._tokenizer is None else self._tokenizer.without_echo,
            warn_substituted=self._say_substituted,
        )
        self._tasks = SamplerTasks(
            transport, owns_transport=owns_transport, label=f"sampler of {model}"
        )
        self._substitution_said = False
        # A rollout loop makes the same call again and again: it is checked once.
        self._last_request: tuple[dict[str, object], list[type], SamplingRequest] | None = None

    # -- what it is --------------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Model string of the deployment."""
        return self._model

    @property
    def account_id(self) -> str | None:
        """Account of the deployment; None where the model string names none."""
        found = re.match(r"accounts/([^/]+)/", self._model)
        return found[1] if found else None

    @property
    def inference_url(self) -> str:
        """Scheme and host of the inference API."""
        return self._inference_url

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that messages are turned into ids with."""
        return None if self._tokenizer is None else self._tokenizer.tokenizer

    @property
    def additional_headers(self) -> Mapping[str, str]:
        """Sent with every request."""
        return self._transport.additional_headers

    @property
    def integer_stops(self) -> bool:
        """Whether the server takes token ids in `stop`."""
        return self._integer_stops

    @property
    def verify_ssl(self) -> bool:
        """Whether the server's certificate is checked."""
        return self._transport.verify_ssl

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

    def _set_retries(self, retries: RetryPolicy) -> None:
        """For the sampling client whose sampler it is: the retry budgets from now on."""
        self._source = replace(self._source, retries=retries)

    def _request(
        self, max_tokens: int, temperature: float, options: SamplingOptions
    ) -> SamplingRequest:
        self._tasks.check_open()
        call: dict[str, object] = {"max_tokens": max_tokens, "temperature": temperature, **options}
        # Types too: True equals 1, and only one of them is allowed.
        kinds = [*map(type, call.values())]
        last = self._last_request
        if last is not None and last[1] == kinds and last[0] == call:
            return last[2]
        if self._context:
            own = options.get("sampling_context") or {}
            options = {**options, "sampling_context": {**self._context, **own}}
        request = sampling_request(
            self._model,
            max_tokens=max_tokens,
            temperature=temperature,
            options=options,
            decode_stop=None if self._integer_stops else self._stop_texts,
        )
        if _IMMUTABLE.issuperset(kinds):
            self._last_request = (call, kinds, request)
        return request

    def _stop_texts(self, ids: list[int]) -> list[str]:
        if self._tokenizer is None:
            raise InvalidArgument(
                "stop holds token ids, and this server takes strings: pass tokenizer= when making "
                "the sampler, or strings"
            )
        return self._tokenizer.stop_texts(ids)

    def _needed_tokenizer(self) -> LockedTokenizer:
        if self._tokenizer is None:
            raise InvalidArgument(
                "sampling from messages needs a tokenizer: pass tokenizer= when making the "
                "sampler, or token ids to sample_with_prompt_tokens"
            )
        return self._tokenizer

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
        await self._tasks.aclose()

    def close(self) -> None:
        """`aclose()` for plain functions; not for the loop that runs the sampler."""
        self._tasks.close()

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
        return f"<{type(self).__name__} of {self._model}: {self._controller!r}>"
