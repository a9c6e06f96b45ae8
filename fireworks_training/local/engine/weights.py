"""The weights that an engine serves, and how a snapshot replaces them.

Knows one model's tensors, its pristine base values and the snapshot store. Does not know requests
or batches. A load has two halves. `prepare` reads, applies and checks the snapshot, in any thread,
without touching the served weights. `swap` copies the result into them, between two decode steps.
So a load either replaces everything or changes nothing.

An adapter is always merged into the pristine base, never into the served weights. A delta is
applied to the served weights, and only if they are the predecessor that it was made against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fireworks_training.local.model.model import (
    SnapshotDtype,
    load_model,
    parameter_tensors,
    round_parameters_,
    whole_weights,
)
from fireworks_training.local.store.snapshots import (
    Kind,
    Manifest,
    SnapshotError,
    SnapshotMismatch,
    SnapshotStore,
    apply_delta,
    check_hashes,
)


class SnapshotRefused(Exception):
    """Raised for a snapshot that can't be loaded; the weights served before are still served."""


@dataclass(frozen=True, slots=True)
class Held:
    """Identifies the snapshot that is being served.

    Attributes:
        identity: the snapshot; None for the model's own weights.
        kind: the snapshot's kind.
        tensors_sha256: hash of the tensors, from a manifest that was verified against them.
        version: grows by one with each swap, from 0.
    """

    identity: str | None = None
    kind: Kind | None = None
    tensors_sha256: str | None = None
    version: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """Holds a verified snapshot, ready to be swapped in.

    Attributes:
        manifest: the snapshot's.
        weights: every weight of the model.
        over: version of the weights that a delta was applied to; None if it stands alone.
    """

    manifest: Manifest
    weights: Mapping[str, Tensor]
    over: int | None


class WeightSet:
    """Keeps named fp32 tensors at the values of a snapshot.

    Args:
        tensors: written in place at a swap; already rounded to `dtype`.
        store: the snapshots on disk.
        base_model: resource name that a snapshot must have been trained from.
        dtype: precision of the values.

    Attributes:
        held: the snapshot whose values the tensors have now.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        store: SnapshotStore,
        base_model: str,
        dtype: SnapshotDtype = "bfloat16",
    ) -> None:
        self.held = Held()
        self._tensors = tensors
        self._store = store
        self._base_model = base_model
        self._dtype = dtype
        # Rounded values fit bf16 without loss, at half the memory.
        self._base = {name: self._stored(tensor).cpu().clone() for name, tensor in tensors.items()}

    def prepare(self, identity: str, *, restore: bool = False) -> Prepared:
        """Read and verify a snapshot, without touching the served weights. For any thread.

        Args:
            restore: a delta whose predecessor is not held is built up from the last whole snapshot
                of its chain, instead of being refused.

        Raises:
            SnapshotRefused: it is missing, damaged, of another model, or a delta to another
                snapshot than the one that is held.
        """
        try:
            manifest = self._store.read(identity)
            self._check_model(manifest)
            over: int | None = None
            if manifest.kind == "delta" and not restore:
                over = self._check_predecessor(manifest)
                tensors = self._applied(manifest)
            else:
                manifest, tensors = self._store.load(identity)
            weights = whole_weights(manifest, tensors, self._base)
        except SnapshotError as error:
            raise SnapshotRefused(str(error)) from error
        return Prepared(manifest, weights, over)

    def swap(self, prepared: Prepared) -> None:
        """Serve a prepared snapshot. For the thread that computes, between two steps.

        Raises:
            SnapshotRefused: the served weights have changed since a delta was applied to them.
        """
        manifest = prepared.manifest
        if prepared.over is not None and prepared.over != self.held.version:
            raise SnapshotRefused(
                f"snapshot {manifest.identity!r} was made ready for weights that another load has"
                f" replaced; what is held is {self.held.identity!r}"
            )
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(prepared.weights[name])
        self.held = Held(manifest.identity, manifest.kind, manifest.sha256, self.held.version + 1)

    def load(self, identity: str) -> None:
        """Prepare and swap in at once; loading the snapshot that is held changes nothing.

        Raises:
            SnapshotRefused: as `prepare`.
        """
        if identity != self.held.identity:
            self.swap(self.prepare(identity))

    def _check_model(self, manifest: Manifest) -> None:
        if manifest.base_model != self._base_model:
            raise SnapshotMismatch(
                f"snapshot {manifest.identity!r} was trained from {manifest.base_model}, this"
                f" deployment serves {self._base_model}"
            )

    def _check_predecessor(self, manifest: Manifest) -> int:
        held = self.held
        if (held.identity, held.tensors_sha256) != (
            manifest.predecessor,
            manifest.predecessor_sha256,
        ):
            raise SnapshotMismatch(
                f"snapshot {manifest.identity!r} is a delta to {manifest.predecessor!r}, and what"
                f" is held is {held.identity or 'the base model'!r}; load the missing snapshots in"
                " order, or save a base snapshot"
            )
        return held.version

    def _applied(self, manifest: Manifest) -> dict[str, Tensor]:
        served = {name: self._stored(tensor).cpu() for name, tensor in self._tensors.items()}
        tensors = apply_delta(manifest, self._store.tensors(manifest), served)
        check_hashes(manifest, tensors)
        return tensors

    def _stored(self, tensor: Tensor) -> Tensor:
        """Convert values to the snapshots' dtype; without loss, since they are rounded."""
        return tensor.bfloat16() if self._dtype == "bfloat16" else tensor


class ServedWeights(WeightSet):
    """Loads a model and makes its weights replaceable.

    Attributes:
        model: the module; its tensors keep their places over a load.

    Args:
        model_path: directory in the Hugging Face layout.
        store, base_model, dtype: those of `WeightSet`; `dtype` as the trainer's.
    """

    def __init__(
        self,
        model_path: Path,
        store: SnapshotStore,
        base_model: str,
        dtype: SnapshotDtype = "bfloat16",
    ) -> None:
        self.model = load_model(model_path)
        round_parameters_(self.model, dtype)
        super().__init__(parameter_tensors(self.model), store, base_model, dtype)
