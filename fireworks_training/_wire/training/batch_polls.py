"""The wire format of batch polls: one request for all requests of a model that have ended.

`POST retrieve_futures`, which the Tinker API has for sampling sessions, and some trainers for their
models. A small result comes with its completion; a larger one is fetched by `retrieve_future`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from fireworks_training.errors import ProtocolError

INLINE_BYTES = 1 << 14
"""Results of at most so many bytes come with the answer of the batch poll."""

MAX_IDS = 4096
"""Ids that one request may name."""


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that has ended.

    Attributes:
        request_id: its id.
        body: the result or the failure; None where it is to be fetched.
        content_type: the media type of the body.
    """

    request_id: str
    body: bytes | None = None
    content_type: str = "application/json"


def encode_poll(model_id: str, cursor: int, retrieved: Sequence[str]) -> bytes:
    """Write a batch poll.

    Args:
        cursor: the cursor of the last answer; 0 for the first.
        retrieved: requests whose results are here; at most `MAX_IDS`.
    """
    return orjson.dumps(
        {
            "target": {"type": "model", "model_id": model_id},
            "prev_cursor": cursor,
            "retrieved_request_ids": retrieved,
            "inline_bytes": INLINE_BYTES,
        }
    )


def decode_poll(payload: dict[str, Any]) -> tuple[list[FinishedRequest], int]:
    """Read the answer: the requests that have ended, and the next cursor.

    Raises:
        ProtocolError: it is not such an answer.
    """
    completions, cursor = payload.get("completions"), payload.get("cursor")
    if not isinstance(completions, list) or not isinstance(cursor, int):
        raise ProtocolError("the answer to a batch poll has no list of completions, or no cursor")
    return [_ended(entry) for entry in cast(list[object], completions)], cursor


def _ended(entry: object) -> FinishedRequest:
    fields = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
    request_id, payload = fields.get("request_id"), fields.get("payload")
    if not isinstance(request_id, str):
        raise ProtocolError("a completion of a batch poll names no request")
    if not isinstance(payload, str):
        return FinishedRequest(request_id)
    try:
        body = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProtocolError(f"the payload of a completion is no base64: {error}") from error
    return FinishedRequest(request_id, body, str(fields.get("content_type", "application/json")))
