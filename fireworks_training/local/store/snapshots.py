"""Sampler snapshots on disk: written once under a temporary name, renamed, verified when read.

Knows: the folder format, names, hashes, free space. Does not know models, adapters' mathematics, or
who loads what.

`<folder>/<identity>/` holds `manifest.json` and `weights.safetensors` (kind base),
`delta.safetensors` (kind delta: `deltas`) or `adapter.safetensors` (kind lora). An identity is
immutable: a name that is taken gets `-2`, `-3`, ... A writer that dies leaves only a folder
`.tmp-<writer>.<hex>`, which that writer's next `clean()` removes.

A delta names its predecessor and the hash that this one has, so that it is never applied to
anything else; its own hashes are those of the weights it leads to.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
SPARE_BYTES = 16 << 20
"""What a save leaves free on the disk, for the metadata beside it and for everybody else."""

Kind = Literal["base", "delta", "lora"]
_FILE_OF_KIND: dict[str, str] = {
    "base": "weights.safetensors",
    "delta": "delta.safetensors",
    "lora": "adapter.safetensors",
}
LONGEST_CHAIN = 256
"""Links that a chain may have before it is taken for damaged; writers stay far below."""

FreeBytes = Callable[[Path], int]


class SnapshotError(Exception):
    """Raised when a snapshot can't be written or read; says which and why."""


class InvalidName(SnapshotError):
    """Raised when a name could not be a folder name of ours."""


class SnapshotMissing(SnapshotError):
    """Raised when no snapshot has an identity."""


class SnapshotCorrupt(SnapshotError):
    """Raised when the files do not hold what the manifest says."""


class SnapshotMismatch(SnapshotError):
    """Raised when a snapshot is whole, and of another model."""


class NoSpace(SnapshotError):
    """Raised when the disk has no room for a save; nothing was written."""


class NotWritten(SnapshotError):
    """Raised when a save failed on its way to the disk; nothing is left of it."""


class LoraBlock(BaseModel):
    """Describes an adapter in a manifest: the effective weight is `W + (alpha / rank) B @ A`.

    Attributes:
        transposed: those of `target_modules` whose weight is stored as `[in, out]` (GPT-2's).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1)
    alpha: float
    target_modules: tuple[str, ...]
    transposed: tuple[str, ...] = ()


class Manifest(BaseModel):
    """Describes a snapshot, in its `manifest.json`.

    Attributes:
        format: version of this file's shape.
        identity: its name, and that of its folder.
        kind: "base" (every weight), "delta" (the difference to `predecessor`) or "lora" (the
            adapter's tensors).
        predecessor: the identity that a difference is against; None for kinds that stand alone.
        predecessor_sha256: `sha256` of that one.
        base_model: resource name of the model it was trained from.
        job: the trainer job that wrote it; "" for another writer.
        dtype: dtype of the tensors, "bfloat16" or "float32".
        bytes: size of all tensors as they are stored.
        sha256: over one line `name:hash` a tensor, in the order of names.
        tensors: sha256 of each tensor's little-endian bytes; of a delta, once it is applied.
        lora: the adapter's settings, for kind "lora".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    identity: str
    kind: Kind
    predecessor: str | None = None
    predecessor_sha256: str | None = None
    base_model: str
    job: str = ""
    dtype: Literal["bfloat16", "float32"]
    bytes: int = Field(ge=0)
    sha256: str
    tensors: dict[str, str]
    lora: LoraBlock | None = None

    @property
    def consistent(self) -> bool:
        """True when the manifest has what its kind needs, and nothing else."""
        links = (self.predecessor is not None, self.predecessor_sha256 is not None)
        return (self.lora is not None) == (self.kind == "lora") and set(links) == {
            self.kind == "delta"
        }


def check_name(name: str, what: str = "snapshot") -> str:
    """Return `name`, if it can be a folder of ours; else raise InvalidName."""
    if NAME.fullmatch(name) is None:
        raise InvalidName(
            f"{name[:80]!r} can't name a {what}: use 1 to 255 letters, digits, '.', '_' and '-',"
            " starting with a letter or a digit"
        )
    return name


def disk_free_bytes(folder: Path) -> int:
    """Return the bytes that the file system of `folder` has free for us."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, needed: int, what: str, free_bytes: FreeBytes) -> None:
    """Raise NoSpace unless `needed` bytes and a small margin are free under `folder`."""
    free = free_bytes(folder)
    if free < needed + SPARE_BYTES:
        raise NoSpace(
            f"{what} needs {needed / 1e6:.1f} MB and {SPARE_BYTES / 1e6:.0f} MB to spare, but only"
            f" {free / 1e6:.1f} MB are free in the state folder; nothing was written. Free some"
            " space, or use a state folder on a larger disk"
        )


@contextmanager
def written_or_gone(what: str) -> Generator[None]:
    """Turn a failure to write into NotWritten: a full disk, a limit, a folder that is gone.

    Raises:
        NotWritten: the block raised an error of the operating system or of safetensors.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NotWritten(
            f"{what} could not be written: {error}. Nothing is left of it, and the weights are as"
            " they were. Free some space in the state folder, then save again"
        ) from error


def sync_file(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the sha256 (hex) of a tensor's little-endian bytes in row-major order."""
    import torch

    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def total_sha256(tensors: Mapping[str, str]) -> str:
    lines = "".join(f"{name}:{tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()


def hashes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the sha256 of each tensor."""
    return {name: tensor_sha256(tensor) for name, tensor in tensors.items()}


def stored_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def apply_delta(
    manifest: Manifest, frames: Mapping[str, torch.Tensor], old: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors that a delta leads to from `old`, new ones, not yet checked.

    Raises:
        SnapshotCorrupt: it is damaged, or of other tensors.
    """
    from fireworks_training.local.store.deltas import DeltaCorrupt, apply

    if frames.keys() != old.keys():
        odd = sorted(frames.keys() ^ old.keys())[:3]
        raise SnapshotCorrupt(f"delta {manifest.identity!r} is of other tensors: {odd}")
    try:
        return {name: apply(tensor, frames[name], name) for name, tensor in old.items()}
    except DeltaCorrupt as error:
        raise SnapshotCorrupt(f"snapshot {manifest.identity!r}: {error}") from error


def check_hashes(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise SnapshotCorrupt unless the tensors are those of the manifest, each by its hash."""
    hashes = hashes_of(tensors)
    if hashes != manifest.tensors or total_sha256(hashes) != manifest.sha256:
        names = hashes.keys() | manifest.tensors.keys()
        wrong = sorted(n for n in names if hashes.get(n) != manifest.tensors.get(n))
        raise SnapshotCorrupt(
            f"snapshot {manifest.identity!r} does not hold what its manifest says: {len(wrong)}"
            f" tensors differ {wrong[:3]}"
        )


class SnapshotStore:
    """Writes and reads the snapshots of one folder. Several processes may read; one trainer writes
    a given name.

    Args:
        folder: made if it is missing.
        writer: who writes here, so that `clean` leaves other writers' work alone.
        free_bytes: measures free space (a fake in tests).
    """

    def __init__(
        self, folder: Path, *, writer: str = "", free_bytes: FreeBytes = disk_free_bytes
    ) -> None:
        self.folder = folder
        self._writer = writer
        self._free_bytes = free_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, identity: str) -> Path:
        """Return the snapshot's folder, whether or not it exists. Raises InvalidName."""
        return self.folder / check_name(identity)

    def identities(self) -> list[str]:
        """Return the identities of all snapshots, in the order of names."""
        return sorted(
            p.parent.name for p in self.folder.glob("*/manifest.json") if p.parent.name[0] != "."
        )

    def clean(self) -> None:
        """Remove what this writer, or a removal, left unfinished when it died."""
        leftover = re.compile(rf"\.tmp-({re.escape(self._writer)}|removed)\.[0-9a-f]{{32}}")
        for folder in self.folder.iterdir():
            if leftover.fullmatch(folder.name):
                # Another process may be at a removal.
                shutil.rmtree(folder, ignore_errors=True)

    def read(self, identity: str) -> Manifest:
        """Read the manifest alone. Raises InvalidName, SnapshotMissing, SnapshotCorrupt."""
        folder = self.path(identity)
        try:
            raw = (folder / "manifest.json").read_bytes()
        except FileNotFoundError as error:
            raise SnapshotMissing(f"there is no snapshot {identity!r}") from error
        try:
            manifest = Manifest.model_validate_json(raw)
        except ValidationError as error:
            raise SnapshotCorrupt(f"the manifest of snapshot {identity!r} is damaged") from error
        if manifest.identity != identity or not manifest.consistent:
            raise SnapshotCorrupt(f"the manifest of snapshot {identity!r} is of something else")
        return manifest

    def tensors(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Read a snapshot's tensors as they are stored, unchecked.

        Raises:
            SnapshotCorrupt: the file can't be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

        try:
            return load_file(self.path(manifest.identity) / _FILE_OF_KIND[manifest.kind])
        except (SafetensorError, OSError) as error:
            raise SnapshotCorrupt(
                f"the tensors of snapshot {manifest.identity!r} can't be read"
            ) from error

    def load(self, identity: str) -> tuple[Manifest, dict[str, torch.Tensor]]:
        """Read manifest and tensors, in the dtype they were stored in, and check every hash.

        A delta is applied to its predecessor, and that one to its own, back to a whole snapshot.

        Raises:
            InvalidName, SnapshotMissing: as `read`; also for a predecessor.
            SnapshotCorrupt: a file is damaged, or a tensor is missing, unknown or changed.
        """
        *before, manifest = self.chain(identity)
        tensors: dict[str, torch.Tensor] = {}
        for link in [*before, manifest]:
            stored = self.tensors(link)
            tensors = apply_delta(link, stored, tensors) if link.kind == "delta" else stored
            check_hashes(link, tensors)
        return manifest, tensors

    def chain(self, identity: str) -> list[Manifest]:
        """Read the manifests from the last whole snapshot up to this one, in the order of loading.

        Raises:
            InvalidName, SnapshotMissing: as `read`; also for a predecessor.
            SnapshotCorrupt: a manifest is damaged, or a predecessor is not what a delta was made
                against.
        """
        links = [self.read(identity)]
        while (predecessor := links[-1].predecessor) is not None:
            if len(links) > LONGEST_CHAIN:
                raise SnapshotCorrupt(f"the chain of snapshot {identity!r} has no beginning")
            link = self.read(predecessor)
            if link.sha256 != links[-1].predecessor_sha256:
                raise SnapshotCorrupt(
                    f"snapshot {links[-1].identity!r} was made against another {predecessor!r} than"
                    " the one here"
                )
            links.append(link)
        return links[::-1]

    def check_room(self, name: str, size: int) -> None:
        """Raise InvalidName or NoSpace if a snapshot of `size` bytes could not be written."""
        check_space(self.folder, size, f"snapshot {check_name(name)!r}", self._free_bytes)

    def write(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        base_model: str,
        dtype: Literal["bfloat16", "float32"],
        lora: LoraBlock | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Write a whole snapshot under `name`, or `name-2`, `name-3`, ... if that is taken.

        Args:
            tensors: by Hugging Face name (peft's for an adapter), already in `dtype`.
            lora: the adapter's settings; makes it a snapshot of kind "lora".
            hashes: sha256 of the tensors, where they are known already.

        Raises:
            InvalidName: before anything is written.
            NoSpace: before anything is written.
            NotWritten: it failed on the way.
        """
        if hashes is None:
            hashes = hashes_of(tensors)
        manifest = Manifest(
            identity=name,
            kind="base" if lora is None else "lora",
            base_model=base_model,
            job=self._writer,
            dtype=dtype,
            bytes=stored_bytes(tensors),
            sha256=total_sha256(hashes),
            tensors=dict(hashes),
            lora=lora,
        )
        return self._write(manifest, tensors)

    def write_delta(
        self,
        name: str,
        frames: Mapping[str, torch.Tensor],
        checksums: Mapping[str, str],
        *,
        predecessor: Manifest,
        hashes: Mapping[str, str],
    ) -> Manifest:
        """Write the difference to `predecessor`, under a name as `write` does.

        Args:
            frames, checksums: output of `deltas.encode`.
            hashes: sha256 of each tensor once the difference is applied.

        Raises:
            InvalidName, NoSpace: as `write`.
        """
        manifest = Manifest(
            identity=name,
            kind="delta",
            predecessor=predecessor.identity,
            predecessor_sha256=predecessor.sha256,
            base_model=predecessor.base_model,
            job=self._writer,
            dtype=predecessor.dtype,
            bytes=stored_bytes(frames),
            sha256=total_sha256(hashes),
            tensors=dict(hashes),
        )
        return self._write(manifest, frames, checksums)

    def _write(
        self,
        manifest: Manifest,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> Manifest:
        from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

        self.check_room(manifest.identity, manifest.bytes)
        scratch = self.folder / f".tmp-{self._writer}.{uuid.uuid4().hex}"
        try:
            with written_or_gone(f"snapshot {manifest.identity!r}"):
                scratch.mkdir(mode=0o700)
                file = scratch / _FILE_OF_KIND[manifest.kind]
                whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(whole, file, metadata=dict(metadata) if metadata else None)
                sync_file(file)
                return self._publish(scratch, manifest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, scratch: Path, manifest: Manifest) -> Manifest:
        """Rename the scratch folder to the first free identity, its manifest in it."""
        name, number = manifest.identity, 1
        while True:
            identity = name if number == 1 else check_name(f"{name}-{number}")
            number += 1
            target = self.folder / identity
            if target.exists():
                continue
            manifest = manifest.model_copy(update={"identity": identity})
            (scratch / "manifest.json").write_text(manifest.model_dump_json(indent=2))
            sync_file(scratch / "manifest.json")
            sync_file(scratch)
            try:
                scratch.rename(target)
            except OSError:
                # Another writer took the identity between the look and the rename.
                if target.exists():
                    continue
                raise
            sync_file(self.folder)
            return manifest
