"""Errors as HTTP answers: `{"error": {"message", "code"}}`.

Knows the codes, which are those of gRPC as the cloud's control plane uses them. A message names
what happened and what to do; it holds no key, no prompt and no path of another user.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

REQUEST_ID = web.RequestKey("request_id", str)
"""The id of a request: given by its client, or made; every answer and log line has it."""

STARTED = web.RequestKey("started", bool)
"""True once an answer has begun: an error can't be an answer any more."""

_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    409: "ALREADY_EXISTS",
    410: "GONE",
    413: "OUT_OF_RANGE",
    421: "PERMISSION_DENIED",
    429: "RESOURCE_EXHAUSTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
    507: "RESOURCE_EXHAUSTED",
}


class HttpProblem(Exception):
    """Raised anywhere below a handler to answer with an error status.

    Attributes:
        status: HTTP status.
        message: for a person.
        code: for a program; derived from the status unless given.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or code_of(status)
        self.headers = dict(headers or {})


def code_of(status: int) -> str:
    """Return the code of an HTTP error status."""
    return _CODES.get(status, "INTERNAL" if status >= 500 else "FAILED_PRECONDITION")


def render(problem: HttpProblem) -> web.Response:
    """Make the answer of a problem."""
    body = {"error": {"message": problem.message, "code": problem.code}}
    return web.json_response(body, status=problem.status, headers=problem.headers)


def model_lost(message: str) -> web.Response:
    """Make the answer for a trainer that is gone with the models in its memory."""
    return web.json_response({"error": message, "error_class": "ModelLost"}, status=410)
