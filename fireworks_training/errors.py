"""Every error the SDK raises, in one tree with one root.

    FireworksTrainingError
    |-- UsageError                    the call is wrong: change the call, a retry can't help
    |   |-- InvalidArgument           a value out of range or of the wrong kind  (ValueError)
    |   |-- UnknownOption             a keyword nobody knows; names the near ones  (TypeError)
    |   |-- InvalidDatum              a datum's content; says which datum  (ValueError)
    |   |-- NotSupported              a real feature of the field that this version refuses
    |   |-- ClientClosed              use after close()  (RuntimeError)
    |   |-- WrongLoop                 .result() where it would dead-lock  (RuntimeError)
    |   |   `-- OwnerLoopGone         the loop that owns the service is closed or stopped
    |   `-- MissingExtra              an optional dependency is not installed  (ImportError)
    |-- OperationError                an operation in the trainer's line failed
    |   |-- RequestFailed             the trainer executed it and says why (category user | server)
    |   |-- LossFailed                the caller's loss function raised, or is not connected
    |   |-- OperationCancelled        .cancel() before it was sent
    |   |-- PrecedingOperationFailed  it was not applied, since its step had failed before; .cause
    |   |-- GradientsInDoubt          a foreign server may hold part of a failed step
    |   `-- SessionEnded              nothing of this client goes on
    |       |-- TrainerLost           the trainer's process died; .last_saved_state
    |       `-- SessionLost           a gap in the line could not be filled; .cause
    |-- ApiError                      an HTTP exchange failed
    |   |-- ApiStatusError            the server answered with an error status; .status
    |   |   |-- AuthenticationFailed      401, 403
    |   |   |-- NotFound                  404
    |   |   |-- Conflict                  409
    |   |   |-- RateLimited               429; a retry helps
    |   |   `-- ServerFailed              5xx; a retry may help
    |   |-- ConnectionFailed          no connection, or it broke; a retry may help
    |   |-- RequestTimedOut           no answer in time; a retry may help  (TimeoutError)
    |   `-- ProtocolError             an answer that the contract does not allow
    |-- ProvisioningError             a trainer or deployment did not become ready
    |   `-- ProvisioningTimeout       not within its budget  (TimeoutError)
    |-- WeightSyncError               a snapshot is not what the deployment serves
    |   |-- HotLoadFailed             a replica refused or failed to load it
    |   |-- HotLoadTimeout            not every replica reported it in time  (TimeoutError)
    |   `-- WeightsDrifted            engine and trainer compute different logprobs; .drift
    |-- SamplingError                 a completion could not be had
    |   |-- SamplingRequestError      the attempts of one completion are used up
    |   |   `-- DeploymentSamplerTimeoutError
    |   `-- SamplingClientClosedError cancelled by close(); safe to submit again
    |-- LedgerUnavailable             the list of held resources can't be read or written
    `-- LocalPlatformError            the embedded platform did not start, or stopped

The type tells whose fault it is (`fault`) and whether the same call may succeed later
(`retryable`). The message tells what happened, why, and what to do next. Errors pickle, carry the
request id where there is one, and never hold a prompt, a token or a key.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

Fault = Literal["caller", "server", "network", "environment"]


class FireworksTrainingError(Exception):
    """Root of the tree.

    Attributes:
        request_id: id of the HTTP request or operation, where there is one.
        cause: the error behind this one, where there is one (also set as `__cause__`).
    """

    fault: ClassVar[Fault] = "caller"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.cause = cause
        if cause is not None:
            self.__cause__ = cause

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, _portable(self.__dict__))


def _rebuild(
    cls: type[FireworksTrainingError], args: tuple[Any, ...], state: dict[str, Any]
) -> FireworksTrainingError:
    # A TimeoutError has the memory layout of OSError, and only that one's __new__ may make it.
    error = OSError.__new__(cls) if issubclass(cls, OSError) else cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    error.__cause__ = error.cause
    return error


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a cause that pickles: a user's exception need not."""
    cause = state.get("cause")
    if cause is None or isinstance(cause, FireworksTrainingError):
        return state
    try:
        pickle.loads(pickle.dumps(cause))  # noqa: S301 - our own bytes, made on this line
    except Exception:
        return {**state, "cause": FireworksTrainingError(f"{type(cause).__name__}: {cause}")}
    return state


# -- the caller's --------------------------------------------------------------------------------


class UsageError(FireworksTrainingError):
    """The call itself is wrong; nothing was sent and nothing was lost."""


class InvalidArgument(UsageError, ValueError):
    """A value out of range or of the wrong kind."""


class UnknownOption(UsageError, TypeError):
    """A keyword that this call does not know."""


class InvalidDatum(UsageError, ValueError):
    """The content of one datum.

    Attributes:
        index: place of the datum in the list that was passed, from 0; None if it concerns the list.
    """

    def __init__(self, message: str, *, index: int | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.index = index


class NotSupported(UsageError):
    """A feature of the field that this version refuses rather than ignores."""


class ClientClosed(UsageError, RuntimeError):
    """The service, client or sampler was closed."""

    @classmethod
    def of(cls, what: str) -> ClientClosed:
        """The error of whoever uses a closed `what`: "service", "sampler"."""
        return cls(f"the {what} was closed; make a new one")


class WrongLoop(UsageError, RuntimeError):
    """A blocking wait on the loop that has to do the work."""


class OwnerLoopGone(WrongLoop):
    """The event loop that owns the service is closed, or stands still."""


class MissingExtra(UsageError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


# -- the trainer's line --------------------------------------------------------------------------


class OperationError(FireworksTrainingError):
    """An operation of a training client failed."""

    fault: ClassVar[Fault] = "server"


class RequestFailed(OperationError):
    """The trainer took the operation and failed it.

    Attributes:
        category: "user", "server" or "unknown", as the trainer says.
        error_class: the trainer's own name for it, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        category: str = "unknown",
        error_class: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(message, **kwargs)
        self.category = category
        self.error_class = error_class


class LossFailed(OperationError):
    """A custom loss raised, returned the wrong thing, or is not connected to the logprobs."""

    fault: ClassVar[Fault] = "caller"


class OperationCancelled(OperationError):
    """`.cancel()` was called before the operation was sent."""

    fault: ClassVar[Fault] = "caller"


class PrecedingOperationFailed(OperationError):
    """Not applied, since an operation of the same step had failed; `cause` is that failure."""


class GradientsInDoubt(OperationError):
    """The server may hold gradients of a step that failed, and can't be told to drop them."""


class SessionEnded(OperationError):
    """The client can't go on.

    Attributes:
        last_saved_state: name of the newest state that this client saved, or None.
    """

    def __init__(self, message: str, *, last_saved_state: str | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.last_saved_state = last_saved_state


class TrainerLost(SessionEnded):
    """The trainer's process died, and with it the model in its memory."""


class SessionLost(SessionEnded):
    """The line of operations has a gap that can't be filled; `cause` says what made it."""


# -- HTTP ----------------------------------------------------------------------------------------


class ApiError(FireworksTrainingError, RuntimeError):
    """An HTTP exchange failed."""

    fault: ClassVar[Fault] = "server"


class ApiStatusError(ApiError):
    """The server answered with an error status.

    Attributes:
        status: the HTTP status.
        error_class: the server's own name for the error, or None.
        retry_after: seconds that the server asks to wait, or None.
        should_retry: what the server says of a repetition (`x-should-retry`), or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        error_class: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(message, **kwargs)
        self.status = status
        self.error_class = error_class
        self.retry_after = retry_after
        self.should_retry = should_retry

    @property
    def status_code(self) -> int:
        """`status`, by the name that other SDKs use."""
        return self.status


class AuthenticationFailed(ApiStatusError):
    """The key is wrong, or may not do this (401, 403)."""

    fault: ClassVar[Fault] = "caller"


class NotFound(ApiStatusError):
    """No such resource (404)."""

    fault: ClassVar[Fault] = "caller"


class Conflict(ApiStatusError):
    """The resource is in another state than the call needs (409)."""


class RateLimited(ApiStatusError):
    """Too many requests (429)."""

    retryable: ClassVar[bool] = True


class ServerFailed(ApiStatusError):
    """The server failed (5xx)."""

    retryable: ClassVar[bool] = True


class ConnectionFailed(ApiError):
    """No connection could be made, or it broke before the answer was whole."""

    fault: ClassVar[Fault] = "network"
    retryable: ClassVar[bool] = True


class RequestTimedOut(ApiError, TimeoutError):
    """No answer in time."""

    fault: ClassVar[Fault] = "network"
    retryable: ClassVar[bool] = True


class ProtocolError(ApiError):
    """The answer is not one that the contract allows."""


# -- resources -----------------------------------------------------------------------------------


class ProvisioningError(FireworksTrainingError, RuntimeError):
    """A trainer or a deployment did not become ready.

    Attributes:
        resource: full name of the resource, or None if it was never made.
        state: the last state it reported, or None.
    """

    fault: ClassVar[Fault] = "server"

    def __init__(
        self,
        message: str,
        *,
        resource: str | None = None,
        state: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(message, **kwargs)
        self.resource = resource
        self.state = state


class ProvisioningTimeout(ProvisioningError, TimeoutError):
    """Not ready within its budget."""

    retryable: ClassVar[bool] = True


class WeightSyncError(FireworksTrainingError, RuntimeError):
    """The deployment does not serve the snapshot that was asked for.

    Attributes:
        identity: the snapshot asked for.
        replicas: what each replica reported last: `{replica: identity or stage}`.
    """

    fault: ClassVar[Fault] = "server"

    def __init__(
        self,
        message: str,
        *,
        identity: str | None = None,
        replicas: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(message, **kwargs)
        self.identity = identity
        self.replicas = replicas or {}


class HotLoadFailed(WeightSyncError):
    """A replica refused the snapshot or failed to load it; the old weights keep serving."""


class HotLoadTimeout(WeightSyncError, TimeoutError):
    """Not every replica reported the snapshot in time."""

    retryable: ClassVar[bool] = True


class WeightsDrifted(WeightSyncError):
    """Engine and trainer give the same tokens different logprobs, beyond the bound.

    Attributes:
        drift: mean absolute difference, nats a token.
    """

    def __init__(self, message: str, *, drift: float = 0.0, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.drift = drift


# -- sampling ------------------------------------------------------------------------------------


class SamplingError(FireworksTrainingError):
    """A completion could not be had."""

    fault: ClassVar[Fault] = "server"


class SamplingRequestError(SamplingError, RuntimeError):
    """One completion failed after its attempts were used up, or by an error that no retry mends.

    Attributes:
        logical_request_id: the id that all attempts shared (sent as `x-request-id`).
        model: the model string that was sampled.
        attempts: how many HTTP attempts were made.
        final_status: HTTP status of the last one, or None.
        final_error_kind: "http_status", "sse_truncation", "connection", "timeout" or
            "upstream_stream".
        retry_budget_exhausted: whether more attempts could have helped.
        completions: those of the same call that came, `SampledCompletion` each; `prompt_index` and
            `sample_index` number them.
    """

    def __init__(
        self,
        message: str,
        *,
        logical_request_id: str = "",
        model: str = "",
        attempts: int = 0,
        final_status: int | None = None,
        final_error_kind: str = "",
        retry_budget_exhausted: bool = False,
        completions: Sequence[Any] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(message, **kwargs)
        self.logical_request_id = logical_request_id
        self.model = model
        self.attempts = attempts
        self.final_status = final_status
        self.final_error_kind = final_error_kind
        self.retry_budget_exhausted = retry_budget_exhausted
        self.completions = completions

    def as_error_record(self) -> dict[str, object]:
        """The facts as a flat dictionary, for a log or a metrics file."""
        return {
            "type": type(self).__name__,
            "logical_request_id": self.logical_request_id,
            "model": self.model,
            "attempts": self.attempts,
            "final_status": self.final_status,
            "final_error_kind": self.final_error_kind,
            "request_id": self.request_id,
            "retry_budget_exhausted": self.retry_budget_exhausted,
        }


class DeploymentSamplerTimeoutError(SamplingRequestError, TimeoutError):
    """The last attempt timed out (408, 504, or no bytes in time)."""

    retryable: ClassVar[bool] = True


class SamplingClientClosedError(SamplingError):
    """The sampler was closed under the request; it is safe to submit it again."""

    retryable: ClassVar[bool] = True


class LedgerUnavailable(FireworksTrainingError):
    """The ledger of held resources can't be read or written, or another process keeps its lock."""

    fault: ClassVar[Fault] = "environment"
    retryable: ClassVar[bool] = True


class LocalPlatformError(FireworksTrainingError):
    """The embedded platform did not start, or stopped."""

    fault: ClassVar[Fault] = "environment"


def for_status(
    status: int,
    message: str,
    *,
    error_class: str | None = None,
    retry_after: float | None = None,
    should_retry: bool | None = None,
    request_id: str | None = None,
) -> ApiStatusError:
    """The typed error of an HTTP status (400 to 599)."""
    cls: type[ApiStatusError]
    if status in (401, 403):
        cls = AuthenticationFailed
        message = f"{message}. Pass the key of this server as api_key=, or set FIREWORKS_API_KEY"
    elif status >= 500:
        cls = ServerFailed
    else:
        cls = {404: NotFound, 409: Conflict, 429: RateLimited}.get(status, ApiStatusError)
    return cls(
        message,
        status=status,
        error_class=error_class,
        retry_after=retry_after,
        should_retry=should_retry,
        request_id=request_id,
    )
