"""Sampler snapshots on disk: written once under a temporary name, renamed, verified when read.

Knows: the folder format, names, hashes, free space. Does not know models, adapters' mathematics, or
who loads what.

`<folder>/<identity>/` holds `manifest.json` and `weights.safetensors` (kind base) or
`adapter.safetensors` (kind lora). An identity is immutable: a name that is taken gets
`-2`, `-3`, ... A writer that dies leaves only a folder `.tmp-<writer>.<hex>`, which that writer's
next `clean()` removes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
SPARE_BYTES = 16 << 20
"""What a save leaves free on the disk, for the metadata beside it and for everybody else."""

Kind = Literal["base", "lora"]
_FILE_OF_KIND: dict[str, str] = {"base": "weights.safetensors", "lora": "adapter.safetensors"}
FreeBytes = Callable[[Path], int]


class SnapshotError(Exception):
    """A snapshot can't be written or read; the message says which and why."""


class InvalidName(SnapshotError):
    """The name could not be a folder name of ours."""


class SnapshotMissing(SnapshotError):
    """No snapshot has this identity."""


class SnapshotCorrupt(SnapshotError):
    """The files do not hold what the manifest says."""


class SnapshotMismatch(SnapshotError):
    """The snapshot is whole, and of another model."""


class NoSpace(SnapshotError):
    """The disk has no room for the save; nothing was written."""


class LoraBlock(BaseModel):
    """What a manifest says about an adapter: the effective weight is `W + (alpha / rank) B @ A`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1)
    alpha: float
    target_modules: tuple[str, ...]


class Manifest(BaseModel):
    """What a snapshot says about itself.

    Attributes:
        format: version of this file's shape.
        identity: its name, and that of its folder.
        kind: "base" (every weight) or "lora" (the adapter's tensors).
        predecessor: the identity that a difference is against; None for kinds that stand alone.
        base_model: resource name of the model it was trained from.
        dtype: of the tensors, "bfloat16" or "float32".
        bytes: of all tensors together.
        sha256: over one line `name:hash` a tensor, in the order of names.
        tensors: sha256 of each tensor's little-endian bytes.
        lora: the adapter's settings, for kind "lora".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    identity: str
    kind: Kind
    predecessor: str | None = None
    base_model: str
    dtype: Literal["bfloat16", "float32"]
    bytes: int = Field(ge=0)
    sha256: str
    tensors: dict[str, str]
    lora: LoraBlock | None = None


def check_name(name: str, what: str = "snapshot") -> str:
    """`name`, if it can be a folder of ours; else raises InvalidName."""
    if NAME.fullmatch(name) is None:
        raise InvalidName(
            f"{name[:80]!r} can't name a {what}: use 1 to 255 letters, digits, '.', '_' and '-',"
            " starting with a letter or a digit"
        )
    return name


def disk_free_bytes(folder: Path) -> int:
    """Bytes that the file system of `folder` has free for us."""
    return shutil.disk_usage(folder).free


def check_space(folder: Path, needed: int, what: str, free_bytes: FreeBytes) -> None:
    """Raises NoSpace unless `needed` bytes and a small margin are free under `folder`."""
    free = free_bytes(folder)
    if free < needed + SPARE_BYTES:
        raise NoSpace(
            f"{what} needs {needed / 1e6:.1f} MB and {SPARE_BYTES / 1e6:.0f} MB to spare, but only"
            f" {free / 1e6:.1f} MB are free in the state folder; nothing was written. Free some"
            " space, or use a state folder on a larger disk"
        )


def sync_file(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """sha256 (hex) of a tensor's little-endian bytes in row-major order."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()


def _total_sha256(tensors: Mapping[str, str]) -> str:
    lines = "".join(f"{name}:{tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()


class SnapshotStore:
    """The snapshots of one folder. Several processes may read; one trainer writes a given name.

    Args:
        folder: made if it is missing.
        writer: who writes here, so that `clean` leaves other writers' work alone.
        free_bytes: how to measure free space (a fake in tests).
    """

    def __init__(
        self, folder: Path, *, writer: str = "", free_bytes: FreeBytes = disk_free_bytes
    ) -> None:
        self.folder = folder
        self._writer = writer
        self._free_bytes = free_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, identity: str) -> Path:
        """The snapshot's folder, whether or not it exists. Raises InvalidName."""
        return self.folder / check_name(identity)

    def identities(self) -> list[str]:
        """What is there, in the order of names."""
        return sorted(
            p.parent.name for p in self.folder.glob("*/manifest.json") if p.parent.name[0] != "."
        )

    def clean(self) -> None:
        """Removes what this writer left unfinished when it died."""
        leftover = re.compile(re.escape(f".tmp-{self._writer}.") + "[0-9a-f]{32}")
        for folder in self.folder.iterdir():
            if leftover.fullmatch(folder.name):
                shutil.rmtree(folder)

    def read(self, identity: str) -> Manifest:
        """The manifest alone. Raises InvalidName, SnapshotMissing, SnapshotCorrupt."""
        folder = self.path(identity)
        try:
            raw = (folder / "manifest.json").read_bytes()
        except FileNotFoundError as error:
            raise SnapshotMissing(f"there is no snapshot {identity!r}") from error
        try:
            manifest = Manifest.model_validate_json(raw)
        except ValidationError as error:
            raise SnapshotCorrupt(f"the manifest of snapshot {identity!r} is damaged") from error
        if manifest.identity != identity or (manifest.lora is None) != (manifest.kind == "base"):
            raise SnapshotCorrupt(f"the manifest of snapshot {identity!r} is of something else")
        return manifest

    def load(self, identity: str) -> tuple[Manifest, dict[str, torch.Tensor]]:
        """Manifest and tensors, in the dtype they were stored in, every hash checked.

        Raises:
            InvalidName, SnapshotMissing: as `read`.
            SnapshotCorrupt: a file is damaged, or a tensor is missing, unknown or changed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        manifest = self.read(identity)
        try:
            tensors = load_file(self.path(identity) / _FILE_OF_KIND[manifest.kind])
        except (SafetensorError, OSError) as error:
            raise SnapshotCorrupt(f"the tensors of snapshot {identity!r} can't be read") from error
        hashes = {name: tensor_sha256(tensor) for name, tensor in tensors.items()}
        if hashes != manifest.tensors or _total_sha256(hashes) != manifest.sha256:
            names = hashes.keys() | manifest.tensors.keys()
            wrong = sorted(n for n in names if hashes.get(n) != manifest.tensors.get(n))
            raise SnapshotCorrupt(
                f"snapshot {identity!r} does not hold what its manifest says: {len(wrong)} tensors"
                f" differ {wrong[:3]}"
            )
        return manifest, tensors

    def write(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        base_model: str,
        dtype: Literal["bfloat16", "float32"],
        lora: LoraBlock | None = None,
    ) -> Manifest:
        """Writes a snapshot under `name`, or under `name-2`, `name-3`, ... if that is taken.

        Args:
            tensors: by Hugging Face name (peft's for an adapter), already in `dtype`.
            lora: the adapter's settings; makes it a snapshot of kind "lora".

        Raises:
            InvalidName: before anything is written.
            NoSpace: before anything is written.
        """
        from safetensors.torch import save_file

        check_name(name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        check_space(self.folder, size, f"snapshot {name!r}", self._free_bytes)
        hashes = {key: tensor_sha256(tensor) for key, tensor in tensors.items()}
        kind: Kind = "base" if lora is None else "lora"
        scratch = self.folder / f".tmp-{self._writer}.{uuid.uuid4().hex}"
        scratch.mkdir(mode=0o700)
        try:
            file = scratch / _FILE_OF_KIND[kind]
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
            sync_file(file)
            return self._publish(
                scratch,
                name,
                lambda identity: Manifest(
                    identity=identity,
                    kind=kind,
                    predecessor=None,
                    base_model=base_model,
                    dtype=dtype,
                    bytes=size,
                    sha256=_total_sha256(hashes),
                    tensors=hashes,
                    lora=lora,
                ),
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _publish(
        self, scratch: Path, name: str, manifest_of: Callable[[str], Manifest]
    ) -> Manifest:
        """Renames the scratch folder to the first free identity, its manifest in it."""
        number = 1
        while True:
            identity = name if number == 1 else check_name(f"{name}-{number}")
            number += 1
            target = self.folder / identity
            if target.exists():
                continue
            manifest = manifest_of(identity)
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
