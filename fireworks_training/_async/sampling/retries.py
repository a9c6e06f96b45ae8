"""Decides how often a completion is tried, and makes the error when that was not often enough.

It knows failures and retry budgets; `run.py` makes the attempts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fireworks_training._async.sampling.completion_stream import AttemptFailed
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training._core.backoff import (
    BILLING_PATIENCE,
    Backoff,
    billing_budget,
    is_billing,
    is_retryable,
    outage_budget,
)
from fireworks_training.errors import (
    ApiError,
    ApiStatusError,
    AuthenticationFailed,
    DeploymentSamplerTimeoutError,
    NotFound,
    SamplingRequestError,
)

HOT_LOAD_STATUS = frozenset({404, 425})
"""Statuses of a deployment that is loading a snapshot, or that its gateway doesn't know yet."""

HOT_LOAD_POLL = 8.0
"""Seconds between two attempts at a deployment of which a load is known to be under way."""

FLAWED_ATTEMPTS = 3
"""Attempts of a completion that ends by an abort, has a token without a logprob, or is a page."""

_FAILS_ALL_STATUS = frozenset({401, 402, 403, 404, 429, 502, 503})
_TIMEOUT_STATUS = frozenset({408, 504})


def is_hot_load(error: ApiError) -> bool:
    """Whether the deployment may be loading a snapshot.

    The local platform answers NOT_FOUND only for a deployment that does not exist: waiting does not
    help there.
    """
    if not isinstance(error, ApiStatusError) or error.status not in HOT_LOAD_STATUS:
        return False
    return not (isinstance(error, NotFound) and error.error_class == "NOT_FOUND")


def _hot_load_budget() -> Backoff:
    # About a minute; loads that the coordinator knows of are waited for as long as they take.
    return Backoff(attempts=11, base=0.5, cap=HOT_LOAD_POLL, spread=0.2, retryable=is_hot_load)


def _flawed_budget() -> Backoff:
    # The server is well, and has answered: a few more tries, and soon.
    return Backoff(attempts=FLAWED_ATTEMPTS, cap=1.0, retryable=lambda _: True)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Makes the retry budgets of a completion; tests make quicker ones.

    Attributes:
        transient: for outages and crowded servers; the usual one outlasts 90 s.
        hot_load: for a deployment that loads a snapshot.
        billing: for an account that has to be paid for.
        flawed: for whole answers that lack what another attempt may bring, by how they ended.
    """

    transient: Callable[[], Backoff] = outage_budget
    hot_load: Callable[[], Backoff] = _hot_load_budget
    billing: Callable[[], Backoff] = billing_budget
    flawed: Callable[[], Backoff] = _flawed_budget


class Budgets:
    """Keeps the retry budgets of one completion, once its first attempt has failed.

    Args:
        policy: makes the budgets.
        hot_loads: knows whether a load is under way.

    Attributes:
        loading: whether the last failure was that of a deployment that loads a snapshot.
    """

    __slots__ = (
        "_billing",
        "_flawed",
        "_hot_load",
        "_hot_loads",
        "_policy",
        "_transient",
        "loading",
    )

    def __init__(self, policy: RetryPolicy, hot_loads: HotLoadSignal) -> None:
        self._policy = policy
        self._hot_loads = hot_loads
        self._transient: Backoff | None = None
        self._hot_load: Backoff | None = None
        self._billing: Backoff | None = None
        self._flawed: Backoff | None = None
        self.loading = False

    def next_delay(self, failure: AttemptFailed, *, now: float) -> float | None:
        """Note a failed attempt; seconds to wait before the next one, or None to give up."""
        error = failure.error
        if failure.flawed:
            self.loading = False
            self._flawed = self._flawed or self._policy.flawed()
            return self._flawed.next_delay(error, now=now)
        self.loading = is_hot_load(error)
        if is_billing(error):
            self._billing = self._billing or self._policy.billing()
            return self._billing.next_delay(error, now=now)
        if not self.loading:
            self._transient = self._transient or self._policy.transient()
            return self._transient.next_delay(error, now=now)
        self._hot_load = self._hot_load or self._policy.hot_load()
        delay = self._hot_load.next_delay(error, now=now)
        # A load that is known of is waited for as long as it takes.
        return HOT_LOAD_POLL if delay is None and self._hot_loads.loading else delay

    def loaded(self) -> None:
        """Note that the load is over: another one has a budget of its own."""
        if self._hot_load is not None:
            self._hot_load.reset()


def fails_all(failure: AttemptFailed) -> bool:
    """Whether what failed one completion for good fails all of its call: no other need be sent.

    A refused prompt, an answer of no use or a slow one are no such thing.
    """
    if failure.kind == "connection" or is_hot_load(failure.error):
        return True
    error = failure.error
    return isinstance(error, ApiStatusError) and error.status in _FAILS_ALL_STATUS


def final_error(
    failure: AttemptFailed, attempts: int, request_id: str, model: str, labels: str
) -> SamplingRequestError:
    """Make the error of a completion that failed for good.

    Args:
        failure: the last one, after so many attempts.
        labels: those of the call, as the end of a message.
    """
    error = failure.error
    status = error.status if isinstance(error, ApiStatusError) else None
    timed_out = failure.kind == "timeout" or status in _TIMEOUT_STATUS
    hot_loading = is_hot_load(error)
    cls = DeploymentSamplerTimeoutError if timed_out else SamplingRequestError
    tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    return cls(
        f"no completion from {model}{labels} after {tries}: "
        f"{error.message}.{_advice(failure, hot_loading)}",
        logical_request_id=request_id,
        model=model,
        attempts=attempts,
        final_status=status,
        final_error_kind=failure.kind,
        retry_budget_exhausted=hot_loading or is_retryable(error) or is_billing(error),
        request_id=error.request_id or failure.metrics.request_id or request_id,
        cause=error,
    )


def _advice(failure: AttemptFailed, hot_loading: bool) -> str:
    if isinstance(failure.error, AuthenticationFailed):
        return " Check the API key, and that it may use this deployment."
    if is_billing(failure.error):
        return (
            f" The account has to be paid for; after {BILLING_PATIENCE / 60:g} minutes the request "
            "was given up."
        )
    if hot_loading:
        return " The deployment did not become ready; check its state and the model name."
    if isinstance(failure.error, NotFound):
        return " Check the model name: this server has no such deployment."
    if failure.kind == "timeout":
        return " The server is stuck or far behind: lower the concurrency, or raise http_timeout."
    return ""
