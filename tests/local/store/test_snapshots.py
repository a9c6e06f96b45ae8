"""Snapshots on disk: written whole or not at all, verified when read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fireworks_training.local.store.snapshots import (
    InvalidName,
    LoraBlock,
    NoSpace,
    NotWritten,
    SnapshotCorrupt,
    SnapshotMissing,
    SnapshotStore,
    tensor_sha256,
)

LORA = LoraBlock(rank=2, alpha=16.0, target_modules=("q_proj",))


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(4, 3, generator=generator).bfloat16(),
        "a.weight": torch.randn(5, generator=generator).bfloat16(),
    }


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", writer="job-1")


def write(store: SnapshotStore, name: str = "step_1", lora: LoraBlock | None = None) -> str:
    manifest = store.write(name, tensors(), base_model="m", dtype="bfloat16", lora=lora)
    return manifest.identity


def test_what_was_written_is_read(store: SnapshotStore) -> None:
    assert write(store) == "step_1"
    manifest, loaded = store.load("step_1")
    assert manifest == store.read("step_1")
    assert (manifest.kind, manifest.predecessor, manifest.bytes) == ("base", None, 34)
    assert (manifest.base_model, manifest.dtype, manifest.lora) == ("m", "bfloat16", None)
    assert manifest.tensors == {name: tensor_sha256(t) for name, t in tensors().items()}
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], tensor)
    assert [p.name for p in store.folder.iterdir()] == ["step_1"]


def test_an_adapter_carries_its_settings(store: SnapshotStore) -> None:
    manifest, _ = store.load(write(store, lora=LORA))
    assert manifest.kind == "lora"
    assert manifest.lora == LORA
    assert (store.path(manifest.identity) / "adapter.safetensors").is_file()


def test_the_hash_is_of_values_and_names(store: SnapshotStore) -> None:
    first = store.read(write(store))
    same = store.write("x", tensors(), base_model="m", dtype="bfloat16")
    renamed = {f"z.{name}": tensor for name, tensor in tensors().items()}
    other = store.write("y", renamed, base_model="m", dtype="bfloat16")
    assert same.sha256 == first.sha256 != other.sha256


def test_a_name_that_is_taken_gets_a_number(store: SnapshotStore) -> None:
    assert [write(store) for _ in range(3)] == ["step_1", "step_1-2", "step_1-3"]
    assert store.identities() == ["step_1", "step_1-2", "step_1-3"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".tmp-x", "a/b", "../a", "/a", "a\n", "-a", "a" * 256]
)
def test_names_that_are_no_names(store: SnapshotStore, name: str) -> None:
    with pytest.raises(InvalidName):
        write(store, name)
    with pytest.raises(InvalidName):
        store.read(name)
    assert list(store.folder.iterdir()) == []


def test_a_missing_snapshot(store: SnapshotStore) -> None:
    with pytest.raises(SnapshotMissing, match="nothing"):
        store.load("nothing")


def change_a_bit(folder: Path) -> None:
    file = folder / "weights.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def truncate(folder: Path) -> None:
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_tensor(folder: Path) -> None:
    loaded = load_file(folder / "weights.safetensors")
    del loaded["a.weight"]
    save_file(loaded, folder / "weights.safetensors")


def swap_names(folder: Path) -> None:
    loaded = load_file(folder / "weights.safetensors")
    swapped = {"a.weight": loaded["b.weight"], "b.weight": loaded["a.weight"]}
    save_file(swapped, folder / "weights.safetensors")


def forge_the_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-5])


def rename_it(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"] = "other"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lose_the_file(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        change_a_bit,
        truncate,
        lose_a_tensor,
        swap_names,
        forge_the_manifest,
        cut_the_manifest,
        rename_it,
        lose_the_file,
    ],
)
def test_damage_is_seen(store: SnapshotStore, damage: object) -> None:
    identity = write(store)
    store.load(identity)
    damage(store.path(identity))  # type: ignore[operator]
    with pytest.raises(SnapshotCorrupt, match="step_1"):
        store.load(identity)


def test_without_room_nothing_is_written(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path, free_bytes=lambda _: 1 << 20)
    with pytest.raises(NoSpace, match="nothing was written"):
        write(store)
    assert list(tmp_path.iterdir()) == []
    roomy = SnapshotStore(tmp_path, free_bytes=lambda _: 1 << 40)
    assert write(roomy) == "step_1"


def test_a_write_that_fails_leaves_nothing(
    store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise OSError("disk on fire")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", broken)
        with pytest.raises(NotWritten, match="on fire"):
            write(store)
    assert list(store.folder.iterdir()) == []
    assert write(store) == "step_1"


def test_cleaning_removes_only_this_writers_leftovers_and_removals(store: SnapshotStore) -> None:
    write(store)
    mine = store.folder / (".tmp-job-1." + "0" * 32)
    removed = store.folder / (".tmp-removed." + "0" * 32)
    others = store.folder / (".tmp-job-1.2." + "0" * 32)
    for folder in (mine, removed, others):
        folder.mkdir()
        (folder / "weights.safetensors").write_bytes(b"half")
    assert store.identities() == ["step_1"]
    store.clean()
    assert not mine.exists()
    assert not removed.exists()
    assert others.exists()
    assert store.identities() == ["step_1"]
