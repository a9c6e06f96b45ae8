"""The weights that an engine serves, and how a snapshot replaces them.

Knows one module, its pristine base values and the snapshot store; nothing of requests or batches.
A load either replaces everything or changes nothing, and an adapter is always merged into the
pristine base, never into what is being served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fireworks_training.local.model import (
    SnapshotDtype,
    load_model,
    load_snapshot_,
    parameter_tensors,
    round_parameters_,
)
from fireworks_training.local.snapshots import (
    Kind,
    SnapshotError,
    SnapshotMismatch,
    SnapshotStore,
)


class LoadFailed(Exception):
    """The snapshot was refused; what was served before is still served."""


@dataclass(frozen=True, slots=True)
class Held:
    """What is being served.

    Attributes:
        identity: the snapshot; None for the model's own weights.
        kind: its kind.
        tensors_sha256: hash of its tensors, from a manifest that was verified against them.
        version: grows by one with each swap, from 0.
    """

    identity: str | None = None
    kind: Kind | None = None
    tensors_sha256: str | None = None
    version: int = 0


class ServedWeights:
    """A model whose weights can be replaced.

    Attributes:
        model: the module; its tensors keep their places over a load.
        held: what it holds now.

    Args:
        model_path: directory in the Hugging Face layout.
        store: where snapshots lie.
        base_model: resource name that a snapshot must have been trained from.
        dtype: precision that the base's values are rounded to, as the trainer's are.
    """

    def __init__(
        self,
        model_path: Path,
        store: SnapshotStore,
        base_model: str,
        dtype: SnapshotDtype = "bfloat16",
    ) -> None:
        self.model = load_model(model_path)
        self.held = Held()
        self._store = store
        self._base_model = base_model
        round_parameters_(self.model, dtype)
        # Rounded values fit bf16 without loss, at half the memory.
        self._base = {
            name: tensor.bfloat16() if dtype == "bfloat16" else tensor.clone()
            for name, tensor in parameter_tensors(self.model).items()
        }

    def load(self, identity: str) -> None:
        """Serve a snapshot from now on.

        Raises:
            LoadFailed: it is missing, damaged, or of another model.
        """
        if identity == self.held.identity:
            return
        try:
            manifest, tensors = self._store.load(identity)
            if manifest.base_model != self._base_model:
                raise SnapshotMismatch(
                    f"snapshot {identity!r} was trained from {manifest.base_model}, this "
                    f"deployment serves {self._base_model}"
                )
            adapter = manifest.kind == "lora"
            base = {name: t.float() for name, t in self._base.items()} if adapter else {}
            load_snapshot_(self.model, manifest, tensors, base)
        except SnapshotError as error:
            raise LoadFailed(str(error)) from error
        self.held = Held(identity, manifest.kind, manifest.sha256, self.held.version + 1)
