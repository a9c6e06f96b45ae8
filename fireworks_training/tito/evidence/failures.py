"""Turns the failure of a sampling into an answer to the agent's client: status, code, retry or not.

It knows the SDK's errors and `TITOError`; it does not know HTTP servers.
"""

from __future__ import annotations

from fireworks_training.errors import (
    ApiError,
    SamplingClientClosedError,
    SamplingRequestError,
    UsageError,
)
from fireworks_training.tito.values.errors import DISCARD, TITOError, invalid, safe_text


def as_tito_error(error: Exception, phase: str) -> TITOError:
    """Turn a failure into the typed error of a call; its text never holds a prompt or a key."""
    if isinstance(error, TITOError):
        return error
    if isinstance(error, SamplingClientClosedError):
        return TITOError(
            "tito_sampler_closed",
            503,
            "the sampler behind the sidecar was closed",
            origin="environment",
            context={"phase": phase},
        )
    if isinstance(error, SamplingRequestError):
        return _sampling(error, phase)
    if isinstance(error, UsageError):
        return invalid(str(error), code="tito_invalid_sampling_field")
    if isinstance(error, (ApiError, ConnectionError, TimeoutError)):
        return TITOError(
            "tito_transport_error",
            504 if isinstance(error, TimeoutError) else 502,
            f"the deployment could not be reached ({type(error).__name__})",
            should_retry=True,
            origin="transport",
            context={"phase": phase},
        )
    return TITOError(
        "tito_sdk_internal_error",
        500,
        f"the sidecar failed ({safe_text(error)}, {phase}){DISCARD}",
        discard_trajectory=True,
        context={"phase": phase, "error_type": type(error).__name__},
    )


def _sampling(error: SamplingRequestError, phase: str) -> TITOError:
    status = error.final_status
    refused = status is not None and status >= 400
    code = "tito_server_http_error" if refused else "tito_transport_error"
    if error.final_error_kind == "upstream_stream":
        code = "tito_server_stream_error"
    # The sampler has used up its own retries: a client that retried too would multiply them.
    return TITOError(
        code,
        status if refused and status is not None else 502,
        f"sampling failed ({error.final_error_kind or 'unknown'}): {error}",
        origin="server" if status is not None else "transport",
        context={**error.as_error_record(), "upstream_status": status, "phase": phase},
    )
