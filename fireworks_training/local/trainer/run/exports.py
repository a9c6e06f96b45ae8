"""Sampler snapshots of one model: captured between two operations, written beside them.

Knows the model's previous save, when a delta to it is written instead of a whole snapshot, and the
fields of the answer. Does not know optimizers, queues or HTTP.

The capture is a copy, made on the torch thread; hashing, comparing, compressing and writing happen
in the export thread, one after another in the order of the captures. A delta is always to the
previous *save* that succeeded, whether or not it was loaded, and the snapshot names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fireworks_training.local.model.model import SnapshotDtype
from fireworks_training.local.store import deltas
from fireworks_training.local.store.snapshots import (
    LoraBlock,
    Manifest,
    SnapshotError,
    SnapshotStore,
    hashes_of,
)
from fireworks_training.local.trainer.queue.operations import Answer, OperationFailed

LONGEST_CHAIN = 24
"""Deltas in a row at most; then a whole snapshot is written, so that a replica that starts has at
most so many to read."""


@dataclass(frozen=True, slots=True)
class _Previous:
    """Holds the last save, and the number of deltas since the last whole snapshot."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    links: int


class SnapshotExports:
    """Captures and writes the snapshots of one model.

    Args:
        store: the snapshots on disk.
        base_model: resource name, for manifests.
        dtype: precision of the tensors.
        lora: the adapter's settings, if the model has one.
        effort: effort that makes deltas small.
    """

    def __init__(
        self,
        store: SnapshotStore,
        *,
        base_model: str,
        dtype: SnapshotDtype,
        lora: LoraBlock | None,
        effort: deltas.Effort = "fast",
    ) -> None:
        self._store = store
        self._base_model = base_model
        self._dtype: SnapshotDtype = dtype
        self._lora = lora
        self._effort: deltas.Effort = effort
        self._previous: _Previous | None = None
        self._timings: dict[str, float] = {}

    def capture(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies fp32 weights in the snapshot's dtype. On the torch thread.

        Raises:
            OperationFailed: the disk has no room for a whole snapshot.
        """
        values = sum(tensor.numel() for tensor in weights.values())
        try:
            self._store.check_room(name, values * (2 if self._dtype == "bfloat16" else 4))
        except SnapshotError as error:
            raise OperationFailed.of(error) from error
        if self._dtype == "bfloat16":
            return {key: tensor.detach().bfloat16().cpu() for key, tensor in weights.items()}
        return {key: tensor.detach().to("cpu", copy=True) for key, tensor in weights.items()}

    def write(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        checkpoint_type: Literal["base", "delta", "merged_base"],
    ) -> Answer:
        """Writes a captured snapshot, and returns the answer. On the export thread.

        Raises:
            OperationFailed: it could not be written; nothing of it is left.
        """
        self._timings = {}
        try:
            lora = None if checkpoint_type == "merged_base" else self._lora
            if checkpoint_type == "merged_base" or self._lora is not None:
                manifest = self._write_whole(name, tensors, lora=lora)
            else:
                manifest = self._write_chained(name, tensors, delta=checkpoint_type == "delta")
            return _answer(manifest, self._timings)
        except SnapshotError as error:
            raise OperationFailed.of(error) from error

    def _write_whole(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        lora: LoraBlock | None,
        hashes: Mapping[str, str] | None = None,
    ) -> Manifest:
        with self._timed("write"):
            return self._store.write(
                name,
                tensors,
                base_model=self._base_model,
                dtype=self._dtype,
                lora=lora,
                hashes=hashes,
            )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._timings[stage] = time.perf_counter() - started

    def _write_chained(self, name: str, tensors: Mapping[str, Tensor], *, delta: bool) -> Manifest:
        with self._timed("hash"):
            hashes = hashes_of(tensors)
        previous = self._previous if delta else None
        with self._timed("compress"):
            encoded = self._delta(previous, tensors) if previous is not None else None
        if previous is None or encoded is None:
            manifest = self._write_whole(name, tensors, lora=None, hashes=hashes)
            self._previous = _Previous(manifest, tensors, 0)
        else:
            with self._timed("write"):
                manifest = self._store.write_delta(
                    name,
                    encoded.tensors,
                    encoded.checksums,
                    predecessor=previous.manifest,
                    hashes=hashes,
                )
            self._previous = _Previous(manifest, tensors, previous.links + 1)
        return manifest

    def _delta(
        self, previous: _Previous, tensors: Mapping[str, Tensor]
    ) -> deltas.EncodedDelta | None:
        """Encodes the delta to the last save; None where a whole snapshot is the better one."""
        # The low bits of fp32 weights change with every step: such a delta never pays.
        if self._dtype != "bfloat16" or previous.links >= LONGEST_CHAIN:
            return None
        try:
            if self._store.read(previous.manifest.identity) != previous.manifest:
                return None
        except SnapshotError:
            return None  # it was removed
        return deltas.encode(previous.tensors, tensors, self._effort)


def _answer(manifest: Manifest, timings: Mapping[str, float]) -> Answer:
    return Answer(
        {
            "path": manifest.identity,
            "type": "save_weights_for_sampler",
            "snapshot": {
                "identity": manifest.identity,
                "kind": manifest.kind,
                "predecessor": manifest.predecessor,
                "bytes": manifest.bytes,
                "sha256": manifest.sha256,
                "timings": timings,
            },
        }
    )
