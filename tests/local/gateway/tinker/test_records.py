"""Checkpoints of the Tinker API: listed, fetched as an archive, kept for a time, removed."""

from __future__ import annotations

import io
import tarfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fireworks_training.local.gateway.tinker.refusals import REFUSED
from fireworks_training.local.store.tinker_store import (
    Checkpoint,
    CheckpointNote,
    RunNote,
    TinkerStore,
    now,
)
from tests.local.gateway.platform_fakes import KEY, MODEL, Gateway, PlatformFolders

RUN = f"ts-{'1' * 32}:train:0"
BASE = f"training_runs/{RUN}/checkpoints"


async def call(
    gateway: Gateway, method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[int, bytes, Any]:
    async with gateway.session.request(
        method, f"{gateway.base_url}/api/v1/{path}", json=body, headers={"X-API-Key": KEY}
    ) as response:
        raw = await response.read()
        answer = await response.json() if response.content_type == "application/json" else None
        return response.status, raw, answer


@pytest.fixture
def store(folders: PlatformFolders) -> TinkerStore:
    store = TinkerStore(folders.state_dir / "tinker")
    store.write_run(RunNote(RUN, MODEL, None))
    return store


def save(folders: PlatformFolders, store: TinkerStore, name: str, expires: float | None) -> Path:
    """A sampler checkpoint, as a trainer leaves it."""
    checkpoint = Checkpoint(RUN, "sampler_weights", name)
    folder = folders.state_dir / "snapshots" / checkpoint.identity
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"tensors of " + name.encode())
    at = None if expires is None else (now() + timedelta(seconds=expires)).isoformat()
    store.write_checkpoint(CheckpointNote(checkpoint.path, 9, now().isoformat(), at))
    return folder


async def test_an_archive_has_the_files(
    folders: PlatformFolders, store: TinkerStore, gateway: Gateway
) -> None:
    save(folders, store, "step-1", None)
    status, raw, _ = await call(gateway, "GET", f"{BASE}/sampler_weights/step-1/archive")
    assert status == 200
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
        assert files == {"step-1/manifest.json", "step-1/model.safetensors"}
        tensors = archive.extractfile("step-1/model.safetensors")
        assert tensors is not None
        assert tensors.read() == b"tensors of step-1"
    for missing in ("sampler_weights/step-2", "weights/step-1", "other/step-1", "weights/.."):
        assert (await call(gateway, "GET", f"{BASE}/{missing}/archive"))[0] == 404
        assert (await call(gateway, "GET", f"{BASE}/{missing}/download"))[0] == 404


async def test_a_checkpoint_goes_when_its_time_is_over(
    folders: PlatformFolders, store: TinkerStore, gateway: Gateway
) -> None:
    kept, over = save(folders, store, "kept", 3600.0), save(folders, store, "over", -1.0)
    forever = save(folders, store, "forever", None)
    _, _, answer = await call(gateway, "GET", BASE)
    listed = {row["checkpoint_id"]: row.get("expires_at") for row in answer["checkpoints"]}
    assert set(listed) == {"sampler_weights/kept", "sampler_weights/forever"}
    assert listed["sampler_weights/kept"] is not None
    assert not over.exists()
    # Another time, then none; and a time for what had none.
    for name, seconds in (("kept", 7200), ("kept", None), ("forever", 60)):
        path = f"{BASE}/sampler_weights/{name}/ttl"
        assert (await call(gateway, "PUT", path, {"ttl_seconds": seconds}))[0] == 200
    _, _, answer = await call(gateway, "GET", "checkpoints")
    listed = {row["checkpoint_id"]: row.get("expires_at") for row in answer["checkpoints"]}
    assert listed["sampler_weights/kept"] is None
    assert listed["sampler_weights/forever"] is not None
    for wrong in (0, -1, 1.5, True, "1h", 10**12):
        path = f"{BASE}/sampler_weights/kept/ttl"
        assert (await call(gateway, "PUT", path, {"ttl_seconds": wrong}))[0] == 400
    assert (await call(gateway, "PUT", f"{BASE}/weights/kept/ttl", {"ttl_seconds": 1}))[0] == 404
    assert kept.is_dir()
    assert forever.is_dir()
    assert (await call(gateway, "DELETE", f"{BASE}/sampler_weights/kept"))[0] == 204
    assert not kept.exists()


@pytest.mark.parametrize(("method", "path"), list(REFUSED))
async def test_what_is_not_there_is_refused_in_words(
    gateway: Gateway, method: str, path: str
) -> None:
    filled = path.format(run=RUN, kind="weights", name="x", session=RUN.partition(":")[0])
    status, _, answer = await call(gateway, method, filled, {"any": "thing"})
    assert (status, answer["error"]["code"]) == (400, "UNIMPLEMENTED")
    assert REFUSED[method, path] in answer["error"]["message"]


async def test_an_archive_is_found_by_its_name_alone(
    folders: PlatformFolders, store: TinkerStore, gateway: Gateway
) -> None:
    save(folders, store, "step-1", None)
    status, raw, _ = await call(gateway, "GET", f"{BASE}/step-1/archive")
    assert status == 200
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        assert "step-1/manifest.json" in archive.getnames()
    for name in ("step-2", "..", "%00"):
        assert (await call(gateway, "GET", f"{BASE}/{name}/archive"))[0] == 404


async def test_models_are_listed_under_names_that_have_a_tokenizer(
    folders: PlatformFolders, gateway: Gateway
) -> None:
    _, _, shown = await call(gateway, "GET", "get_server_capabilities")
    names = [model["model_name"] for model in shown["supported_models"]]
    assert str(folders.model_dir) in names
    assert all((Path(name) / "tokenizer.json").is_file() for name in names)
