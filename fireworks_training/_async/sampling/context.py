"""`SamplerContext`: holds the pool, window, budgets, tokenizer and metrics that calls share.

It also checks the options of each call; `RequestLog` collects the attempts of one completion.
Neither knows prompts, attempts under way (`run.py`) or tasks (`tasks.py`).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fireworks_training._async.http.transport import Transport
from fireworks_training._async.sampling.completion_stream import AttemptFailed
from fireworks_training._async.sampling.concurrency import (
    AdaptiveConcurrencyController,
    SamplingConcurrencyController,
)
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training._async.sampling.progress import Progress
from fireworks_training._async.sampling.prompts import LockedTokenizer
from fireworks_training._async.sampling.retries import RetryPolicy
from fireworks_training._core.backoff import BILLING_PATIENCE
from fireworks_training._wire.completions.request import (
    PATH,
    SamplingRequest,
    check_labels,
    sampling_request,
)
from fireworks_training.errors import InvalidArgument
from fireworks_training.models import SampledServerAttempt, ServerMetrics
from fireworks_training.options import SamplingOptions, Tokenizer

METRICS_KEPT = 65_536
"""Attempts whose metrics are kept until `drain_metrics()`; the oldest go first."""

BILLING_REPORT = 60.0
"""Seconds between two log lines about an account that has to be paid for."""

_IMMUTABLE = frozenset({bool, int, float, str, type(None)})

logger = logging.getLogger("fireworks_training.sampling")


class SamplerContext:
    """Holds what the calls of one sampler share, and checks each call's options.

    Args:
        transport: the connection pool.
        inference_url: scheme and host of the inference API.
        model: model string of the deployment.
        tokenizer: turns messages into token ids; None samples token ids only.
        concurrency_controller: bounds the attempts in flight; None makes an adaptive one.
        integer_stops: whether the server takes token ids in `stop`.
        retries: makes the retry budgets; None makes the usual ones.
        labels: stand in the error messages and logs of all calls.
        hot_loads: wakes the requests that wait for a hot load to end.
        distance: returns the optimizer steps that the trainer has made since a snapshot; None where
            nobody counts them.
        current_snapshot: identity of the snapshot that the service synced last.

    Attributes:
        url: the completions route.
        metrics: those of the attempts since the last drain, oldest first.
        progress: counts what is under way, and logs calls that take long.
        without_echo: takes the text of echoed prompt tokens off a text; None without a tokenizer.

    Raises:
        InvalidArgument: an argument is missing, or no sampler can use it.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        inference_url: str,
        model: str,
        tokenizer: Tokenizer | None = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
        integer_stops: bool = False,
        retries: RetryPolicy | None = None,
        labels: Mapping[str, object] | None = None,
        hot_loads: HotLoadSignal | None = None,
        distance: Callable[[str | None], int | None] | None = None,
        current_snapshot: str | None = None,
    ) -> None:
        if not model:
            raise InvalidArgument("model is empty: pass accounts/<account>/deployments/<name>")
        check_labels(labels or {})
        if concurrency_controller is None:
            concurrency_controller = AdaptiveConcurrencyController()
        self.concurrency_controller = concurrency_controller
        self.transport = transport
        self.inference_url = inference_url.rstrip("/")
        self.url = self.inference_url + PATH
        self.model = model
        self.tokenizer = None if tokenizer is None else LockedTokenizer(tokenizer)
        self.without_echo = None if self.tokenizer is None else self.tokenizer.without_echo
        self.integer_stops = integer_stops
        self.retries = retries or RetryPolicy()
        self.hot_loads = hot_loads or HotLoadSignal()
        self.distance = distance
        self.current_snapshot = current_snapshot
        self.metrics: deque[ServerMetrics] = deque(maxlen=METRICS_KEPT)
        self.progress = Progress(lambda: self._controller.window_size)
        self._labels = dict(labels or {})
        self._warned_substituted = False
        self._warned_no_logprobs = False
        self._warned_unreachable = False
        self._answered = False
        self._next_billing_warning = -math.inf
        # A rollout loop makes the same call again and again: it is checked once.
        self._last_request: tuple[dict[str, object], list[type], SamplingRequest] | None = None

    @property
    def concurrency_controller(self) -> SamplingConcurrencyController:
        """Bounds the attempts in flight; may be replaced for the calls that follow."""
        return self._controller

    @concurrency_controller.setter
    def concurrency_controller(self, controller: SamplingConcurrencyController) -> None:
        if not isinstance(controller, SamplingConcurrencyController):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(
                "a concurrency controller has window_size, acquire(), release(metrics) and "
                f"step_completed(); {type(controller).__name__} lacks some of them"
            )
        self._controller = controller

    def request(
        self, max_tokens: int, temperature: float, options: SamplingOptions
    ) -> SamplingRequest:
        """Check the options of a call and make its request.

        Raises:
            UsageError: something is unknown, refused, out of range or without effect.
        """
        call: dict[str, object] = {"max_tokens": max_tokens, "temperature": temperature, **options}
        # Types too: True equals 1, and only one of them is allowed.
        kinds = [*map(type, call.values())]
        last = self._last_request
        if last is not None and last[1] == kinds and last[0] == call:
            return last[2]
        if self._labels:
            own = options.get("sampling_context") or {}
            options = {**options, "sampling_context": {**self._labels, **own}}
        request = sampling_request(
            self.model,
            max_tokens=max_tokens,
            temperature=temperature,
            options=options,
            decode_stop=None if self.integer_stops else self._stop_texts,
        )
        if _IMMUTABLE.issuperset(kinds):
            self._last_request = (call, kinds, request)
        return request

    def _stop_texts(self, ids: list[int]) -> list[str]:
        if self.tokenizer is None:
            raise InvalidArgument(
                "stop holds token ids, and this server takes strings: pass tokenizer= when making "
                "the sampler, or strings"
            )
        return self.tokenizer.stop_texts(ids)

    def needed_tokenizer(self) -> LockedTokenizer:
        """Return the tokenizer, for calls that take messages.

        Raises:
            InvalidArgument: the sampler was made without one.
        """
        if self.tokenizer is None:
            raise InvalidArgument(
                "sampling from messages needs a tokenizer: pass tokenizer= when making the "
                "sampler, or token ids to sample_with_prompt_tokens"
            )
        return self.tokenizer

    def warn_billing(self) -> None:
        """Log, once a minute at most, that requests wait until the account is paid for."""
        now = time.monotonic()
        if now >= self._next_billing_warning:
            self._next_billing_warning = now + BILLING_REPORT
            logger.warning(
                "%s answers 402 (payment required): its requests wait until the account is paid "
                "for, for up to %g minutes",
                self.model,
                BILLING_PATIENCE / 60,
            )

    def note_answer(self, failure: AttemptFailed | None) -> None:
        """Note an attempt that ended: whether this server has ever answered is in its warnings."""
        if failure is None or failure.kind not in ("connection", "timeout"):
            self._answered = True
        elif not self._answered and not self._warned_unreachable:
            self._warned_unreachable = True
            logger.warning(
                "%s has not answered yet (%s): is the inference URL right, and the server up?",
                self.inference_url,
                failure.error.message,
            )

    def warn_no_logprobs(self) -> None:
        """Log once that the server sends no logprobs though they are asked for."""
        if not self._warned_no_logprobs:
            self._warned_no_logprobs = True
            logger.warning(
                "%s was asked for logprobs and sends none: inference_logprobs, sampling_logprobs "
                "and top_logprobs of its completions are None",
                self.model,
            )

    def warn_substituted(self) -> None:
        """Log once that raw logprobs stand in for the sampling logprobs that no answer reports."""
        if not self._warned_substituted:
            self._warned_substituted = True
            logger.warning(
                "%s reports no sampling logprobs; at temperature 1 without top-p and top-k they "
                "equal the raw ones, which stand in for them",
                self.model,
            )


@dataclass(slots=True)
class RequestLog:
    """Collects the attempts of one completion, for callers who ask for them.

    Attributes:
        request_id: sent as `X-Request-Id` by all attempts.
        attempts: the attempts so far, in order.
    """

    request_id: str = field(default_factory=lambda: os.urandom(16).hex())
    attempts: list[SampledServerAttempt] = field(default_factory=list[SampledServerAttempt])

    def succeeded(self, metrics: ServerMetrics, response_id: str | None) -> None:
        """Note the attempt that made the completion."""
        self._add("succeeded", metrics, None, response_id)

    def failed(self, failure: AttemptFailed, *, retried: bool) -> None:
        """Note an attempt that failed."""
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
