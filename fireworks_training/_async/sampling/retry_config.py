"""Translates tinker's `RetryConfig` into a sampler's retry budget, window and progress timeout.

It goes field by field, and refuses fields that have no counterpart. It retries nothing itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fireworks_training._async.sampling.concurrency import AdaptiveConcurrencyController
from fireworks_training._async.sampling.retries import RetryPolicy
from fireworks_training._core.backoff import Backoff
from fireworks_training._core.window.settings import AimdSettings
from fireworks_training.errors import (
    DeploymentSamplerTimeoutError,
    InvalidArgument,
    NotSupported,
)
from fireworks_training.options import RetryConfig

T = TypeVar("T")


class ProgressTimeout:
    """Cancels the running calls of a client when none of them has ended for so long.

    Args:
        seconds: after the end of the last call, or after the first one began.
        model: the model string that is sampled, for the message.
    """

    def __init__(self, seconds: float, model: str) -> None:
        self._seconds = seconds
        self._model = model
        self._running = 0
        self._progress = 0.0

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a call, and return its result.

        Raises:
            DeploymentSamplerTimeoutError: there was no progress; the call was cancelled.
        """
        clock = asyncio.get_running_loop().time
        if not self._running:
            self._progress = clock()
        self._running += 1
        task = asyncio.ensure_future(work())
        try:
            while (left := self._progress + self._seconds - clock()) > 0:
                await asyncio.wait({task}, timeout=left)
                if task.done():
                    self._progress = clock()
                    return task.result()
        finally:
            self._running -= 1
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        raise DeploymentSamplerTimeoutError(
            f"no call of this client has ended for {self._seconds:g} s: requests appear to be "
            "stuck; raise progress_timeout, or lower the concurrency",
            model=self._model,
            final_error_kind="timeout",
            retry_budget_exhausted=True,
        )


@dataclass(frozen=True, slots=True)
class Retries:
    """Holds a translated `RetryConfig`.

    Attributes:
        policy: makes the retry budgets.
        most: requests in flight at most; None leaves that to the sampler's controller.
        progress_timeout: seconds without the end of any call after which all are cancelled.
    """

    policy: RetryPolicy
    most: int | None
    progress_timeout: float


def window_of(retries: Retries | None, given: object) -> AdaptiveConcurrencyController | None:
    """Make a controller that keeps to `max_connections`; None if there is no such bound.

    Raises:
        InvalidArgument: the caller has given another.
    """
    if retries is None or retries.most is None:
        return None
    if given:
        raise InvalidArgument(
            "retry_config.max_connections and a concurrency controller both bound the requests in "
            "flight: pass one of them"
        )
    initial = min(AimdSettings().initial_window, retries.most)
    return AdaptiveConcurrencyController(initial_window=initial, max_window=retries.most)


def retries_of(config: RetryConfig | None) -> Retries | None:
    """Translate tinker's retry configuration, as `RetryConfig` describes its fields.

    Raises:
        NotSupported: other `retryable_exceptions` than tinker's, or `enable_stuck_detection=False`.
        InvalidArgument: it is not a `RetryConfig`, or a value is out of range.
    """
    if config is None:
        return None
    module = sys.modules.get("tinker.lib.retry_handler")  # who has one has loaded it
    if module is None or not isinstance(config, module.RetryConfig):
        raise InvalidArgument(
            f"retry_config is a {type(config).__name__}: pass a RetryConfig of "
            "tinker.lib.retry_handler"
        )
    usual: RetryConfig = module.RetryConfig()
    if config.retryable_exceptions != usual.retryable_exceptions:
        raise NotSupported(
            "retry_config.retryable_exceptions: what is retried follows from an error's status, "
            "or from its being one of the network; leave the default"
        )
    if not config.enable_stuck_detection:
        raise NotSupported(
            "retry_config.enable_stuck_detection=False: nothing waits for ever here; set a large "
            "progress_timeout"
        )
    if config.progress_timeout <= 0:
        raise InvalidArgument(
            f"retry_config.progress_timeout must be over 0 seconds, got {config.progress_timeout}"
        )
    most = config.max_connections
    policy = replace(RetryPolicy(), transient=_budgets(config))
    if not config.enable_retry_logic:
        policy = replace(policy, billing=policy.transient)
    return Retries(
        policy=policy,
        most=None if most == usual.max_connections else most,
        progress_timeout=config.progress_timeout,
    )


def _budgets(config: RetryConfig) -> Callable[[], Backoff]:
    def budget() -> Backoff:
        return Backoff(
            attempts=sys.maxsize if config.enable_retry_logic else 1,
            base=min(config.retry_delay_base, config.retry_delay_max),
            cap=config.retry_delay_max,
            spread=config.jitter_factor,
            max_elapsed=config.progress_timeout,
        )

    budget()  # a value that is out of range is refused here
    return budget
