"""Routes of the Tinker API that show the sessions of clients: one, all, and those of a search.

Knows the notes of sessions and which of them are running. There is one owner and one project here:
whatever a client asks of either, it is all of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from fireworks_training.local.gateway.tinker.records import kept, page
from fireworks_training.local.gateway.tinker.training import TRAINING
from fireworks_training.local.gateway.web.bodies import invalid_body, parse_aside, read_bytes
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.store.tinker_store import SessionNote, session_of

OWNER = "local"


class _Status(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[Literal["success", "errored", "interrupted"]] | None = None

    def fits(self, status: dict[str, Any] | None) -> bool:
        if status is None or status["type"] != self.type:
            return False
        # One that is active has no reason yet.
        return self.reasons is None or status.get("reason", {}).get("type") in self.reasons


class _Cursor(BaseModel):
    last_created_at: StrictStr
    last_session_id: StrictStr


class _Search(BaseModel):
    model_config = ConfigDict(extra="forbid")

    session_id: StrictStr | None = None
    project_ids: list[StrictStr] | None = None
    user_metadata: dict[str, StrictStr] = Field(default_factory=dict)
    display_name: StrictStr | None = Field(default=None, min_length=1)
    owner: dict[str, Any] | None = None
    statuses: list[_Status] | None = Field(default=None, min_length=1)
    limit: StrictInt = Field(default=50, ge=1, le=200)
    cursor: _Cursor | None = None

    def fits(self, note: SessionNote, status: dict[str, Any] | None) -> bool:
        """Return whether a session is one of those that are looked for."""
        named = self.session_id is None and self.display_name is None
        named = named or note.session == self.session_id
        if self.display_name is not None and note.display_name is not None:
            name = note.display_name.casefold()
            named = named or all(word in name for word in self.display_name.casefold().split())
        wanted = self.user_metadata.items()
        return (
            named
            and all(note.user_metadata.get(key) == value for key, value in wanted)
            and (self.statuses is None or any(one.fits(status) for one in self.statuses))
        )


def add_routes(app: web.Application) -> None:
    """Register the routes; the app holds TRAINING."""
    app.add_routes(
        [
            web.get("/api/v1/sessions", _list),
            web.get("/api/v1/sessions/{session}", _get),
            web.post("/api/v1/sessions/search", _search),
        ]
    )


async def _list(request: web.Request) -> web.Response:
    notes = await asyncio.to_thread(request.app[TRAINING].store.sessions)
    rows, _ = page(request, [note.session for note in notes[::-1]])
    return web.json_response({"sessions": rows})


async def _get(request: web.Request) -> web.Response:
    session = request.match_info["session"]
    store = request.app[TRAINING].store
    note = await asyncio.to_thread(store.session, session)
    if note is None:
        raise HttpProblem(404, f"no session {session[:80]!r}")
    runs = [run.run for run in await asyncio.to_thread(store.runs)]
    answer: dict[str, Any] = {
        "training_run_ids": [run for run in runs if session_of(run) == session],
        "sampler_ids": await asyncio.to_thread(store.samplers_of, session),
        "user_metadata": note.user_metadata,
    }
    if note.display_name is not None:
        answer["display_name"] = note.display_name
    return web.json_response(answer)


async def _search(request: web.Request) -> web.Response:
    raw = await read_bytes(request)
    try:
        wanted = await parse_aside(raw, _Search.model_validate_json)
    except ValidationError as error:
        raise invalid_body(error) from None
    training = request.app[TRAINING]
    notes = (await asyncio.to_thread(training.store.sessions))[::-1]
    statuses = {note.session: _status(note, training.active(note.session)) for note in notes}
    found = [note for note in notes if wanted.fits(note, statuses[note.session])]
    if wanted.cursor is not None:
        behind = wanted.cursor.last_created_at, wanted.cursor.last_session_id
        found = [note for note in found if (note.created, note.session) < behind]
    shown = found[: wanted.limit]
    counts = Counter(session_of(note.checkpoint.run) for note in await kept(request))
    answer: dict[str, Any] = {
        "sessions": [_shown(note, statuses[note.session], counts[note.session]) for note in shown]
    }
    if len(found) > len(shown):
        last = shown[-1]
        cursor = {"last_created_at": last.created, "last_session_id": last.session}
        answer["next_cursor"] = cursor
    return web.json_response(answer)


def _status(note: SessionNote, active: bool) -> dict[str, Any] | None:
    if note.finished is not None:
        status = {"type": "client_finished", "reason": {"type": note.finished}}
        return status if note.detail is None else {**status, "detail": note.detail}
    return {"type": "active"} if active else None


def _shown(note: SessionNote, status: dict[str, Any] | None, checkpoints: int) -> dict[str, Any]:
    shown = {
        "session_id": note.session,
        "created_at": note.created,
        "owner": OWNER,
        "project_id": OWNER,
        "status": status,
        "checkpoints_count": checkpoints,
        "display_name": note.display_name,
        "user_metadata": note.user_metadata,
    }
    return {key: value for key, value in shown.items() if value is not None}
