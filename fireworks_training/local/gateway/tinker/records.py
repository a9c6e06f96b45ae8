"""Routes of the Tinker API that list, show and remove runs and checkpoints.

Knows the notes of runs and checkpoints, and their folders. A checkpoint whose time is over is
removed at the next request that lists checkpoints.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from aiohttp import web

from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.gateway.tinker.training import TRAINING
from fireworks_training.local.gateway.web.bodies import (
    int_field,
    int_query,
    read_object,
    required_text,
)
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.store.tinker_store import (
    BadTinkerPath,
    Checkpoint,
    CheckpointNote,
    Kind,
    RunNote,
    TinkerStore,
    expiry,
)

_TYPES = {"weights": "training", "sampler_weights": "sampler"}
MAX_PAGE = 1000
MAX_TTL_S = 10**11
"""Seconds in the year 5000 that a time can still hold."""


def add_routes(app: web.Application) -> None:
    """Registers the routes; the app holds TRAINING, CONTROL_PLANE and REGISTRY."""
    checkpoint = "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
    app.add_routes(
        [
            web.get("/api/v1/get_server_capabilities", _capabilities),
            web.get("/api/v1/training_runs", _list_runs),
            web.get("/api/v1/training_runs/{run}", _get_run),
            web.get("/api/v1/training_runs/{run}/checkpoints", _list_of_run),
            web.get("/api/v1/checkpoints", _list_all),
            web.delete(checkpoint, _delete),
            web.put(f"{checkpoint}/ttl", _set_ttl),
            web.get(f"{checkpoint}/archive", _archive),
            web.get("/api/v1/training_runs/{run}/checkpoints/{name}/archive", _archive_of_name),
            web.get(f"{checkpoint}/download", _download),
            web.post("/api/v1/weights_info", _weights_info),
        ]
    )


def _store(request: web.Request) -> TinkerStore:
    return request.app[TRAINING].store


def _shown(note: CheckpointNote) -> dict[str, Any]:
    checkpoint = note.checkpoint
    shown = {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": _TYPES[checkpoint.kind],
        "time": note.time,
        "tinker_path": note.path,
        "size_bytes": note.size_bytes,
        "public": False,
        "user_metadata": note.user_metadata,
        "expires_at": note.expires_at,
    }
    return {key: value for key, value in shown.items() if value is not None}


def _shown_run(note: RunNote, checkpoints: Sequence[CheckpointNote]) -> dict[str, Any]:
    of = {kind: [c for c in checkpoints if c.checkpoint.kind == kind] for kind in _TYPES}
    shown = {
        "training_run_id": note.run,
        "base_model": note.base_model,
        "model_owner": "local",
        "is_lora": note.lora is not None,
        "corrupted": False,
        "lora_rank": None if note.lora is None else note.lora["rank"],
        "last_request_time": checkpoints[-1].time if checkpoints else note.created,
        "last_checkpoint": _shown(of["weights"][-1]) if of["weights"] else None,
        "last_sampler_checkpoint": (
            _shown(of["sampler_weights"][-1]) if of["sampler_weights"] else None
        ),
        "user_metadata": note.user_metadata,
    }
    return {key: value for key, value in shown.items() if value is not None}


# -- listing -------------------------------------------------------------------------------------


async def _capabilities(request: web.Request) -> web.Response:
    models = [
        {
            # The name that works for training, sampling, and for the tokenizer: its folder.
            "model_name": str(entry.path),
            "max_context_length": entry.max_context_length,
            "trainable": True,
            "sampleable": True,
        }
        for entry in request.app[REGISTRY].models.values()
    ]
    return web.json_response({"supported_models": models})


def page(request: web.Request, rows: list[Any]) -> tuple[list[Any], Mapping[str, int]]:
    """Return one page of a list, and the cursor that the API shows with it."""
    limit = min(int_query(request, "limit", 0, default=100), MAX_PAGE)
    offset = int_query(request, "offset", 0, default=0)
    cursor = {"offset": offset, "limit": limit, "total_count": len(rows)}
    return rows[offset : offset + limit], cursor


async def kept(request: web.Request, run: str | None = None) -> list[CheckpointNote]:
    """Return the checkpoints that are there, oldest first, and remove those whose time is over."""
    store = _store(request)
    notes = await asyncio.to_thread(store.checkpoints, run)
    for note in notes:
        if note.expired:
            await _remove(request, note.checkpoint)
    return [note for note in notes if not note.expired]


async def _list_runs(request: web.Request) -> web.Response:
    checkpoints = await kept(request)
    runs = [
        _shown_run(run, [c for c in checkpoints if c.checkpoint.run == run.run])
        for run in await asyncio.to_thread(_store(request).runs)
    ]
    rows, cursor = page(request, runs[::-1])
    return web.json_response({"training_runs": rows, "cursor": cursor})


def _run(request: web.Request, run: str) -> RunNote:
    note = _store(request).run(run)
    if note is None:
        raise HttpProblem(404, f"no training run {run[:100]!r}")
    return note


async def _get_run(request: web.Request) -> web.Response:
    note = _run(request, request.match_info["run"])
    return web.json_response(_shown_run(note, await kept(request, note.run)))


async def _list_of_run(request: web.Request) -> web.Response:
    note = _run(request, request.match_info["run"])
    rows, cursor = page(request, [_shown(c) for c in await kept(request, note.run)])
    return web.json_response({"checkpoints": rows, "cursor": cursor})


async def _list_all(request: web.Request) -> web.Response:
    rows, cursor = page(request, [_shown(c) for c in (await kept(request))[::-1]])
    return web.json_response({"checkpoints": rows, "cursor": cursor})


async def _weights_info(request: web.Request) -> web.Response:
    path = required_text(await read_object(request), "tinker_path")
    checkpoint = request.app[TRAINING].checkpoint(path)
    run = _run(request, checkpoint.run)
    answer: dict[str, Any] = {"base_model": run.base_model, "is_lora": run.lora is not None}
    if run.lora is not None:
        names = ("train_unembed", "train_mlp", "train_attn")
        answer |= {"lora_rank": run.lora["rank"], **{name: run.lora[name] for name in names}}
    return web.json_response(answer)


# -- one checkpoint ------------------------------------------------------------------------------


def _checkpoint(request: web.Request) -> Checkpoint:
    info = request.match_info
    if info["kind"] not in _TYPES:
        raise HttpProblem(404, f"a checkpoint is one of {', '.join(_TYPES)}")
    try:
        return Checkpoint(info["run"], info["kind"], info["name"])  # type: ignore[arg-type]
    except BadTinkerPath as error:
        raise HttpProblem(404, str(error)) from None


def _note(request: web.Request) -> CheckpointNote:
    checkpoint = _checkpoint(request)
    note = _store(request).checkpoint(checkpoint)
    if note is None:
        raise HttpProblem(404, f"no checkpoint {checkpoint.path!r}")
    return note


def _folder(request: web.Request, checkpoint: Checkpoint) -> Path | None:
    plane = request.app[CONTROL_PLANE]
    if checkpoint.kind == "sampler_weights":
        found = [plane.snapshots_dir / checkpoint.identity]
    else:
        jobs = [row.id for row in plane.jobs.table.present() if row.body.get("tinker")]
        found = [plane.jobs.states_dir(job) / checkpoint.identity for job in jobs]
    return next((folder for folder in found if folder.is_dir()), None)


async def _remove(request: web.Request, checkpoint: Checkpoint) -> None:
    """Remove the note, then the files: what is not listed is not looked for."""
    _store(request).forget_checkpoint(checkpoint)
    folder = _folder(request, checkpoint)
    if folder is not None:
        # Under another name first, so that nobody finds half of it.
        doomed = folder.with_name(f".tmp-removed.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(doomed)
            await asyncio.to_thread(shutil.rmtree, doomed, ignore_errors=True)


async def _delete(request: web.Request) -> web.Response:
    await _remove(request, _note(request).checkpoint)
    return web.Response(status=204)


async def _set_ttl(request: web.Request) -> web.Response:
    note = _note(request)
    body = await read_object(request)
    seconds = int_field(body, "ttl_seconds", 1, MAX_TTL_S, default=0) or None
    changed = replace(note, expires_at=expiry(seconds))
    await asyncio.to_thread(_store(request).write_checkpoint, changed)
    return web.json_response({})


async def _archive(request: web.Request) -> web.Response:
    _note(request)
    location = request.path.removesuffix("/archive") + "/download"
    raise web.HTTPFound(location)


async def _archive_of_name(request: web.Request) -> web.Response:
    """Answer for a checkpoint that is named without its kind: a training state goes first."""
    run, name = request.match_info["run"], request.match_info["name"]
    for kind in get_args(Kind):
        try:
            found = _store(request).checkpoint(Checkpoint(run, kind, name))
        except BadTinkerPath as error:
            raise HttpProblem(404, str(error)) from None
        if found is not None:
            base = request.path.removesuffix(f"/{name}/archive")
            raise web.HTTPFound(f"{base}/{kind}/{name}/download")
    raise HttpProblem(404, f"no checkpoint {name[:128]!r} of run {run[:100]!r}")


async def _download(request: web.Request) -> web.StreamResponse:
    """Answer with a tar.gz of the checkpoint's files."""
    checkpoint = _note(request).checkpoint
    folder = _folder(request, checkpoint)
    if folder is None:
        raise HttpProblem(404, f"no checkpoint {checkpoint.path!r}")
    # Here: what a thread makes for a handler that is cancelled meanwhile would stay.
    descriptor, name = tempfile.mkstemp(".tar.gz")
    os.close(descriptor)
    file = Path(name)
    try:
        await asyncio.to_thread(_pack, folder, file, checkpoint.name)
        response = web.FileResponse(file, headers={"Content-Type": "application/gzip"})
        await response.prepare(request)
        return response
    finally:
        await asyncio.to_thread(file.unlink, missing_ok=True)


def _pack(folder: Path, file: Path, name: str) -> None:
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        archive.add(folder, arcname=name)
