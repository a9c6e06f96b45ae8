"""Defines the errors of an agent's call, for the rollout and for the agent's HTTP client.

It knows error codes and OpenAI's error body; the other modules decide which error to raise.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from fireworks_training.errors import FireworksTrainingError

TITOErrorOrigin = Literal[
    "sdk", "sdk_parser", "server", "transport", "adapter", "environment", "unknown"
]
"""The part that failed: this package's checks, its parser, the deployment, the way to it, ..."""


DISCARD = ": the trajectory is to be discarded"
"""Ends the message of an error after which nothing true can be recorded."""


class TITOError(FireworksTrainingError, RuntimeError):
    """A call of an agent was refused or failed, or a trajectory can't be used in this way.

    Args:
        code: stable and machine-readable, such as "tito_context_overflow".
        status: HTTP status that the agent's client gets.
        message: what happened, why, what to do next; without prompts, tokens and keys.
        should_retry: whether the same call may succeed later; sent as `x-should-retry`.
        origin: the part that failed, a `TITOErrorOrigin`; any other text counts as "unknown".
        discard_trajectory: whether nothing more can be recorded truthfully: later calls get this
            error too, and the trajectory ends as "failed".
        context: further facts for `as_error_record()`.
    """

    def __init__(
        self,
        code: str,
        status: int,
        message: str,
        *,
        should_retry: bool = False,
        origin: str = "sdk",
        discard_trajectory: bool = False,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.should_retry = should_retry
        self.origin: str = origin if origin in get_args(TITOErrorOrigin) else "unknown"
        self.discard_trajectory = discard_trajectory
        self.context = dict(context or {})

    def as_error_record(self) -> dict[str, Any]:
        """Give the facts as a flat dictionary, `context` included."""
        if self.discard_trajectory:
            kind = "trajectory_error"
        elif self.origin in ("server", "transport"):
            kind = "server_error"
        else:
            kind = "sdk_error" if self.status >= 500 else "invalid_request_error"
        return {
            **self.context,
            "message": str(self),
            "type": kind,
            "code": self.code,
            "origin": self.origin,
            "should_retry": self.should_retry,
            "discard_trajectory": self.discard_trajectory,
        }

    def for_auxiliary_call(self) -> TITOError:
        """Copy the error for an auxiliary call, which does not discard its trajectory."""
        return TITOError(
            self.code,
            self.status,
            str(self).removesuffix(DISCARD) + "; the trajectory goes on without this call",
            should_retry=self.should_retry,
            origin=self.origin,
            context=self.context,
        )

    def openai_body(self) -> dict[str, Any]:
        """Give the body of an OpenAI-compatible error answer."""
        return {"error": self.as_error_record()}


class TITOParseError(FireworksTrainingError, ValueError):
    """Raised by renderers: the sampled output is malformed, or can't be parsed safely.

    Args:
        reason_code: a stable tag for metrics, such as "tool_call_json".
    """

    def __init__(self, *args: object, reason_code: str = "unclassified") -> None:
        super().__init__(" ".join(map(str, args)))
        self.reason_code = reason_code


def invalid(message: str, *, code: str = "tito_invalid_request") -> TITOError:
    """Make the error (400) for a request that can't succeed without a change."""
    return TITOError(code, 400, message)


def safe_text(error: BaseException) -> str:
    """Describe an exception by its type and where it was raised; its text may hold a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"
