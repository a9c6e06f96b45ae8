"""Training states on disk: everything that a later process needs to go on bit for bit.

Knows the folder format, atomic replacement, and sibling jobs. Does not know how a state is made or
used.

`<folder>/<name>/` holds `state.json` and the tensor file that it names. Replacing `state.json` is
the one moment at which a save becomes true: before it the old state stands whole, and a tensor file
that `state.json` does not name is a leftover.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fireworks_training.local.model.model import LoraSettings
from fireworks_training.local.model.optimizer import AdamSettings
from fireworks_training.local.store import expiry
from fireworks_training.local.store.retention import remove
from fireworks_training.local.store.snapshots import (
    FreeBytes,
    LoraBlock,
    check_name,
    check_space,
    disk_free_bytes,
    sync_file,
    written_or_gone,
)
from fireworks_training.local.trainer.queue.operations import OperationFailed


class StateInfo(BaseModel):
    """Describes a state, beside its tensors.

    Attributes:
        base_model: resource name.
        lora: the adapter's settings, or None for full-parameter training.
        snapshot_dtype: precision that the module's values had; the tensors are fp32 masters.
        optimizer_steps: steps that the moments were averaged over.
        adam: settings of the last step, or None before the first.
        adapter: the adapter's requested settings, so that a model can be made from the state; None
            without one, and in states of earlier versions.
        projection_head_dim: outputs of a projection head, or None without one.
        tensors_file: name of the file with the tensors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    base_model: str
    lora: LoraBlock | None
    snapshot_dtype: Literal["bfloat16", "float32"]
    optimizer_steps: int = Field(ge=0)
    adam: AdamSettings | None
    adapter: LoraSettings | None = None
    projection_head_dim: int | None = None
    tensors_file: str = ""


class StateStore:
    """Saves, loads and lists the states of one job.

    Args:
        folder: `<jobs>/<job>/states`; made if it is missing.
        free_bytes: how to measure free space (a fake in tests).
    """

    def __init__(self, folder: Path, *, free_bytes: FreeBytes = disk_free_bytes) -> None:
        self.folder = folder
        self._free_bytes = free_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def names(self) -> list[str]:
        """Lists the names of complete states, sorted."""
        return _names(self.folder)

    def has(self, name: str) -> bool:
        """Tells whether there is a complete state of that name."""
        return (self.folder / check_name(name, "state") / "state.json").exists()

    def clean(self) -> None:
        """Removes the leftovers of saves and removals that were cut off."""
        for folder in self.folder.iterdir():
            if folder.name.startswith(".") or not (folder / "state.json").exists():
                # Another process may be at it.
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                keep = {"state.json", self._info(folder).tensors_file, expiry.FILE}
            except OperationFailed:
                continue  # damaged: a load reports it, and nothing more of it is removed
            for leftover in folder.iterdir():
                if leftover.name not in keep:
                    leftover.unlink()

    def remove_expired(self) -> None:
        """Removes the states whose time is over."""
        for name in self.names():
            ends = expiry.expiry_of(self.folder / name)
            if ends is not None and ends <= time.time():
                with contextlib.suppress(FileNotFoundError):  # the gateway was quicker
                    remove(self.folder / name)

    def save(
        self,
        name: str,
        info: StateInfo,
        tensors: Mapping[str, Tensor],
        ttl_seconds: int | None = None,
    ) -> None:
        """Writes a state; it replaces an older one of that name.

        Args:
            ttl_seconds: time after which it may be removed; None keeps it.

        Raises:
            NoSpace: before anything is written.
            NotWritten: the write failed; an older state of that name is as it was.
        """
        folder = self.folder / check_name(name, "state")
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        check_space(self.folder, size, f"state {name!r}", self._free_bytes)
        with written_or_gone(f"state {name!r}"):
            self._write(folder, info, tensors)
            expiry.set_expiry(folder, ttl_seconds)

    def _write(self, folder: Path, info: StateInfo, tensors: Mapping[str, Tensor]) -> None:
        folder.mkdir(exist_ok=True, mode=0o700)
        file = folder / f"tensors-{uuid.uuid4().hex}.safetensors"
        draft = folder / "state.json.new"
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
            sync_file(file)
            info = info.model_copy(update={"tensors_file": file.name})
            draft.write_bytes(orjson.dumps(info.model_dump(), option=orjson.OPT_INDENT_2))
            sync_file(draft)
            sync_file(folder)
            draft.replace(folder / "state.json")
        except BaseException:
            file.unlink(missing_ok=True)
            draft.unlink(missing_ok=True)
            if not (folder / "state.json").exists():
                folder.rmdir()
            raise
        sync_file(folder)
        sync_file(self.folder)
        for old in folder.glob("tensors-*.safetensors"):
            if old.name != file.name:
                old.unlink()

    def load(self, name: str, job: str | None = None) -> tuple[StateInfo, dict[str, Tensor]]:
        """Loads a state by name, of this job or of another one.

        Raises:
            OperationFailed: there is no such state (the message lists those that are there), or
                its files are damaged.
        """
        folder = self.folder if job is None else self._sibling(job)
        place = folder / check_name(name, "state")
        if not (place / "state.json").exists():
            raise OperationFailed(self._missing(name, job, folder), error_class="StateNotFound")
        try:
            info = self._info(place)
            return info, load_file(place / info.tensors_file)
        except (SafetensorError, OSError) as error:
            raise OperationFailed(
                f"state {name!r} is damaged: its tensors can't be read", error_class="StateDamaged"
            ) from error

    def info(self, name: str) -> StateInfo:
        """Reads the description of a state of this job, without its tensors.

        Raises:
            OperationFailed: as `load`.
        """
        place = self.folder / check_name(name, "state")
        if not self.has(name):
            raise OperationFailed(
                self._missing(name, None, self.folder), error_class="StateNotFound"
            )
        return self._info(place)

    def _sibling(self, job: str) -> Path:
        return self.folder.parent.parent / check_name(job, "job") / "states"

    def _missing(self, name: str, job: str | None, folder: Path) -> str:
        where = "this trainer" if job is None else f"job {job!r}"
        if job is not None and not folder.parent.is_dir():
            return f"there is no {where} here, so state {name!r} can't be loaded from it"
        listed = ", ".join(_names(folder)[:20]) or "none"
        return f"{where} has no state {name!r}; saved states: {listed}"

    def _info(self, place: Path) -> StateInfo:
        try:
            info = StateInfo.model_validate_json((place / "state.json").read_bytes())
            check_name(info.tensors_file, "file")
            return info
        except ValidationError as error:
            raise OperationFailed(
                f"state {place.name!r} is damaged: state.json can't be read",
                error_class="StateDamaged",
            ) from error


def _names(folder: Path) -> list[str]:
    """List complete states; a folder whose name begins with a dot is being removed."""
    there = (path.parent.name for path in folder.glob("*/state.json"))
    return sorted(name for name in there if not name.startswith("."))
