"""`python -m fireworks_training.local.model.promotion`: makes a model directory of a snapshot.

Runs as a process of its own, since it needs torch, which the gateway does not load. It reads one
JSON line (`Order`) on standard input; the directory is written under a temporary name and renamed.
A failure is one JSON line on standard output, and exit code 1.

The weights are loaded as the engine loads them, every hash checked, an adapter merged in fp32; so
the model computes the same as the snapshot. Knows files and weights. Does not know HTTP or names of
the API.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from fireworks_training.local.settings import read_line


@dataclass(frozen=True, slots=True)
class Order:
    """Names the snapshot to promote and the directory to make.

    Attributes:
        snapshots_dir, identity: the snapshot.
        base_model: resource name of the model that it must have been trained from.
        base_path: that model's directory.
        target: the directory to make; its parent exists.
    """

    snapshots_dir: str
    identity: str
    base_model: str
    base_path: str
    target: str

    def line(self) -> bytes:
        """Encode the order as the line that the process reads."""
        return json.dumps(asdict(self)).encode() + b"\n"


# The files of a model directory that are not weights.
_KEPT = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")


def make_model(order: Order) -> None:
    """Write the model directory.

    Raises:
        SnapshotError: the snapshot is missing, damaged, or of another model.
    """
    from fireworks_training.local.model.model import (
        load_model,
        load_snapshot_,
        parameter_tensors,
        round_parameters_,
    )
    from fireworks_training.local.store.snapshots import SnapshotMismatch, SnapshotStore

    manifest, tensors = SnapshotStore(Path(order.snapshots_dir)).load(order.identity)
    if manifest.base_model != order.base_model:
        raise SnapshotMismatch(
            f"snapshot {order.identity!r} was trained from {manifest.base_model}, not from"
            f" {order.base_model}"
        )
    model = load_model(Path(order.base_path))
    round_parameters_(model, manifest.dtype)
    base = {name: tensor.clone() for name, tensor in parameter_tensors(model).items()}
    load_snapshot_(model, manifest, tensors, base if manifest.lora is not None else {})
    target = Path(order.target)
    scratch = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        # Rounded weights fit bf16 without loss; a merged adapter does not.
        whole = manifest.lora is None and manifest.dtype == "bfloat16"
        (model.bfloat16() if whole else model).save_pretrained(scratch)
        for pattern in _KEPT:
            for file in Path(order.base_path).glob(pattern):
                shutil.copy2(file, scratch / file.name)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    """Carry out one order; returns the exit code."""
    from fireworks_training.local.store.snapshots import SnapshotError

    order = Order(**json.loads(read_line(0)))
    try:
        make_model(order)
    except (SnapshotError, OSError) as error:
        print(json.dumps({"error": f"{error}"}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
