"""Turns errors of the completions route, in a stream and instead of one, into typed errors.

It knows how servers spell them, and repeats nothing of a payload that may hold tokens or a key.
"""

from __future__ import annotations

import re
from typing import Any, cast

import orjson

from fireworks_training._wire.server_words import scrubbed
from fireworks_training.errors import ApiError, ProtocolError, for_status


def object_in(value: object) -> dict[str, Any]:
    """Return a JSON object; an empty one for anything else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


_NAME = re.compile(r"[A-Za-z][\w.:/-]{0,59}", re.ASCII)


def named(value: object) -> str | None:
    """Return a server's name for something if it is a name; text may be of the prompt."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def stream_error(error: object) -> ApiError:
    """Make the typed error of one that a stream reports; its text is not repeated."""
    fields = object_in(error)
    status = fields.get("status_code", fields.get("status"))
    code = fields.get("code", fields.get("type"))
    # A number of more digits is none of an error's codes.
    code = str(code) if isinstance(code, int) and abs(code) < 10_000 else named(code)
    label = f" ({code})" if code else ""
    if isinstance(status, int) and 400 <= status <= 599:
        return for_status(
            status,
            f"the server reported error {status}{label} mid-stream",
            error_class=code,
        )
    return ProtocolError(f"the server reported an error{label} mid-stream")


def status_error(
    status: int, body: bytes, *, retry_after: float | None, request_id: str | None
) -> ApiError:
    """Make the typed error of an answer that is not a stream.

    Of the body only a JSON error's own message is repeated, short, and without lists of numbers
    (token ids of the prompt) and what looks like a key.
    """
    if status < 400:
        return ProtocolError(
            f"the server answered {status} instead of a stream; is the inference URL right?",
            request_id=request_id,
        )
    try:
        payload = object_in(orjson.loads(body))
    except orjson.JSONDecodeError:
        payload = {}
    error = payload.get("error", payload)
    fields = object_in(error)
    message = error if isinstance(error, str) else fields.get("message")
    text = scrubbed(message, limit=300) if isinstance(message, str) else ""
    code = payload.get("error_class", fields.get("code"))
    if code == "NOT_FOUND" and "object" in fields:
        # The cloud's inference gateway answers this also while a deployment loads a snapshot.
        code = None
    return for_status(
        status,
        f"the server answered {status}: {text}" if text else f"the server answered {status}",
        error_class=None if code is None else str(code)[:60],
        retry_after=retry_after,
        request_id=request_id,
    )
