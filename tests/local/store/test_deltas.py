"""Differences: exact, readable by the public package, refused when they don't fit or don't pay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fireworks_delta_compression import (
    delta_compress_dicts_to_file,
    delta_decompress_dict_from_file,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fireworks_training.local.store.deltas import DeltaCorrupt, apply, encode
from fireworks_training.local.store.snapshots import (
    SnapshotCorrupt,
    SnapshotMissing,
    SnapshotStore,
    hashes_of,
)

Tensors = dict[str, torch.Tensor]


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(64, 33, generator=generator).to(dtype),
        "b": torch.randn(7, generator=generator).to(dtype),
        "scalar": torch.randn((), generator=generator).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }


def nudged(old: Tensors, seed: int, size: float = 1e-3) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + size * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for name, t in old.items()
    }


def same(left: Tensors, right: Tensors) -> bool:
    return hashes_of(left) == hashes_of(right)


@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([1e-4, 3e-3]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_applied_it_is_what_it_was_made_of(
    first: int, second: int, size: float, dtype: torch.dtype
) -> None:
    old = tensors(first, dtype)
    new = nudged(old, second, size)
    delta = encode(old, new)
    if delta is not None:
        assert same({name: apply(old[name], delta.tensors[name], name) for name in old}, new)
        assert same(old, tensors(first, dtype))
        # Undone by itself: the encoding is an XOR.
        assert same({name: apply(new[name], delta.tensors[name], name) for name in new}, old)


def test_more_effort_gives_fewer_bytes_in_the_same_encoding() -> None:
    generator = torch.Generator().manual_seed(3)
    old = {"a": (0.02 * torch.randn(1 << 18, generator=generator)).bfloat16()}
    new = nudged(old, 4, 1.5e-5)
    fast, small = encode(old, new), encode(old, new, "small")
    assert fast is not None
    assert small is not None
    assert float((old["a"] != new["a"]).float().mean()) > 0.12
    assert small.bytes < 0.9 * fast.bytes
    assert same({"a": apply(old["a"], small.tensors["a"], "a")}, new)


def test_one_that_does_not_pay_is_not_made() -> None:
    assert encode(tensors(0), tensors(1)) is None
    assert encode(tensors(0), nudged(tensors(0), 1)) is not None


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_the_public_package_reads_it_and_we_read_the_packages(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "snapshots")
    old, new = tensors(0), nudged(tensors(0), 1)
    delta = encode(old, new)
    assert delta is not None
    base = store.write("base", old, base_model="m", dtype="bfloat16")
    store.write_delta(
        "next", delta.tensors, delta.checksums, predecessor=base, hashes=hashes_of(new)
    )
    file = store.path("next") / "delta.safetensors"
    theirs = delta_decompress_dict_from_file(
        src=dict(old), diff_file=str(file), compression_format="arc_v2"
    )
    assert same(theirs, new)
    delta_compress_dicts_to_file(
        src=old, dst=new, diff_file=str(tmp_path / "d"), compression_format="arc_v2"
    )
    frames = load_file(tmp_path / "d")
    assert same({name: apply(old[name], frames[name], name) for name in old}, new)


def test_frames_that_do_not_fit_are_refused() -> None:
    old, new = tensors(0), nudged(tensors(0), 1)
    delta = encode(old, new)
    assert delta is not None
    with pytest.raises(DeltaCorrupt, match="size"):
        apply(old["b"], delta.tensors["a"], "b")
    for frame in (delta.tensors["a"][:-3], torch.zeros(5, dtype=torch.uint8)):
        with pytest.raises(DeltaCorrupt):
            apply(old["a"], frame, "a")


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """base <- one <- two."""
    store = SnapshotStore(tmp_path / "snapshots", writer="job-1")
    old = tensors(0)
    manifest = store.write("base", old, base_model="m", dtype="bfloat16")
    for seed, name in enumerate(["one", "two"], 1):
        new = nudged(old, seed)
        delta = encode(old, new)
        assert delta is not None
        manifest = store.write_delta(
            name, delta.tensors, delta.checksums, predecessor=manifest, hashes=hashes_of(new)
        )
        old = new
    return store


def test_a_chain_is_restored_from_its_last_whole_snapshot(store: SnapshotStore) -> None:
    assert [link.identity for link in store.chain("two")] == ["base", "one", "two"]
    manifest, restored = store.load("two")
    assert (manifest.kind, manifest.predecessor, manifest.job) == ("delta", "one", "job-1")
    assert manifest.bytes < store.read("base").bytes
    wanted = nudged(nudged(tensors(0), 1), 2)
    assert same(restored, wanted)
    assert manifest.tensors == hashes_of(wanted)


def test_a_chain_that_is_broken_is_refused(store: SnapshotStore, tmp_path: Path) -> None:
    # Another snapshot under the predecessor's name: the hash in the delta tells.
    store.path("one").rename(store.folder / "kept")
    store.write("one", tensors(5), base_model="m", dtype="bfloat16")
    with pytest.raises(SnapshotCorrupt, match="another 'one'"):
        store.load("two")
    (store.path("one")).rename(store.folder / "other")
    with pytest.raises(SnapshotMissing, match="'one'"):
        store.load("two")


def test_a_delta_that_is_damaged_is_refused(store: SnapshotStore) -> None:
    file = store.path("two") / "delta.safetensors"
    whole = file.read_bytes()
    for place in (-1, -20):
        raw = bytearray(whole)
        raw[place] ^= 1
        file.write_bytes(raw)
        with pytest.raises(SnapshotCorrupt, match="'two'"):
            store.load("two")
    file.write_bytes((store.path("one") / "delta.safetensors").read_bytes())
    with pytest.raises(SnapshotCorrupt, match="'two' does not hold"):
        store.load("two")
