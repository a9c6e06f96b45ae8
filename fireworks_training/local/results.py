"""Batch polling, `POST /api/v1/retrieve_futures`: reports what has ended since a client last asked.

Knows the request, a log of what ended in its order, and the answer. Does not know what a result is
or who holds it: the gateway answers for sampling sessions, a trainer for its models, both by this.

    request   {"target": {"type": "sampling_session", "sampling_session_id", "cloned_sampler_id"}
                      or {"type": "model", "model_id"},
               "prev_cursor": 0, "timeout": seconds or null, "retrieved_request_ids": [],
               "inline_bytes": 0}
    answer    {"completions": [{"state": "finished", "request_id",
                                "response_payload_uncompressed_size",
                                "content_type"?, "payload"?},
                               {"state": "failed", "request_id", ...}],
               "cursor": 7}

`cursor` is where the next request goes on; a cursor from before what is kept begins with the oldest
that is. A request is held until something has ended, at most `timeout` seconds (null: as long as
`retrieve_future`), 0 not at all. `retrieved_request_ids` may be dropped by the server.

Targets of type "model" and `inline_bytes` are this platform's own: a result of at most so many
bytes comes with its completion, as base64 under `payload` with its `content_type`, so that a small
operation needs no request of its own for its result. A trainer that takes such targets says
`"retrieve_futures": 1` in its create-model answer.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

MAX_BODY_BYTES = 1 << 20
MAX_IDS = 4096
"""Retrieved requests that one poll may name."""
PAGE = 512
"""Completions of one answer; a client that has more to hear of is answered at once again."""
KEPT = 8192
"""Completions that a log keeps."""
MAX_INLINE_BYTES = 1 << 20
"""Results that one answer may carry, all together."""


class BadPoll(ValueError):
    """Raised for a body that is no request for batch polling; names the field."""


LONGEST_POLL_S = 86_400
"""The longest time that a poll may ask to be held for; it is held for less."""


class SamplingTarget(BaseModel):
    """Names the requests of one sampling session whose `seq_id` is in the block of one clone."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["sampling_session"]
    sampling_session_id: StrictStr
    cloned_sampler_id: StrictInt = Field(default=0, ge=0)


class ModelTarget(BaseModel):
    """Names the operations of one model."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["model"]
    model_id: StrictStr


class Poll(BaseModel):
    """Parses a request, whose fields the head of the module shows."""

    model_config = ConfigDict(extra="forbid")

    target: SamplingTarget | ModelTarget = Field(discriminator="type")
    prev_cursor: StrictInt = Field(default=0, ge=0)
    timeout: StrictFloat | StrictInt | None = Field(default=None, ge=0, le=LONGEST_POLL_S)
    retrieved_request_ids: list[StrictStr] = Field(default_factory=list, max_length=MAX_IDS)
    inline_bytes: StrictInt = Field(default=0, ge=0, le=MAX_INLINE_BYTES)

    def hold_s(self, longest_s: float) -> float:
        """Return the seconds to hold the request for."""
        return longest_s if self.timeout is None else min(float(self.timeout), longest_s)


def parse_poll(raw: bytes) -> Poll:
    """Parse a request's body.

    Raises:
        BadPoll: the first field that is wrong; never with what it held.
    """
    if len(raw) > MAX_BODY_BYTES:
        raise BadPoll(f"the body is over {MAX_BODY_BYTES} bytes: name fewer retrieved_request_ids")
    try:
        return Poll.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in fault["loc"]) or "body"
        raise BadPoll(f"{name}: {fault['msg']}") from None


class FinishedRequests:
    """Keeps the ids of requests in the order in which they ended. Belongs to one event loop.

    Args:
        kept: ids that are kept; the oldest go first.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._ids: deque[str] = deque(maxlen=kept)
        self._cursor = 0
        self._news = asyncio.Event()

    @property
    def cursor(self) -> int:
        """Place of the last request that ended; 0 while there is none."""
        return self._cursor

    def add(self, request_id: str) -> None:
        """Add a request that has ended; wake those who wait."""
        self._ids.append(request_id)
        self._cursor += 1
        self._news.set()
        self._news = asyncio.Event()

    def after(self, cursor: int) -> tuple[list[str], int]:
        """Return a page of what ended after a cursor, and the cursor behind that."""
        oldest = self._cursor - len(self._ids)
        skipped = max(cursor - oldest, 0)
        ids = list(itertools.islice(self._ids, skipped, skipped + PAGE))
        return ids, max(cursor, oldest) + len(ids)

    async def wait(self, cursor: int, within_s: float) -> None:
        """Return when something has ended after a cursor, or after so many seconds."""
        try:
            async with asyncio.timeout(within_s):
                while self._cursor <= cursor:
                    await self._news.wait()
        except TimeoutError:
            return


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """Holds the outcome of one request.

    Attributes:
        body: the result, a failure's words included; None where it is not kept any more.
    """

    request_id: str
    failed: bool
    body: bytes | None = None
    content_type: str = "application/json"


def answer(
    completions: list[RequestOutcome], cursor: int, inline_bytes: int
) -> Mapping[str, object]:
    """Return the body of an answer."""
    room = MAX_INLINE_BYTES
    shown: list[Mapping[str, object]] = []
    for ended in completions:
        state = "failed" if ended.failed else "finished"
        fields: dict[str, object] = {"state": state, "request_id": ended.request_id}
        size = 0 if ended.body is None else len(ended.body)
        if size and not ended.failed:
            fields["response_payload_uncompressed_size"] = size
        if ended.body is not None and size <= min(inline_bytes, room) and inline_bytes:
            room -= size
            fields["content_type"] = ended.content_type
            fields["payload"] = base64.b64encode(ended.body).decode()
        shown.append(fields)
    return {"completions": shown, "cursor": cursor}
