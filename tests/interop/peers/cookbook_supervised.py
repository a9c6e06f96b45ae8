"""tinker-cookbook's supervised loop on a data set of its own; the losses that it logged."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import chz
import numpy as np
import tinker
from tinker_cookbook.supervised import train
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder


class Counting(SupervisedDataset):
    """Sequences that count upwards: something a few steps can learn."""

    def __init__(self, batches: int) -> None:
        self._batches = batches

    def get_batch(self, index: int) -> list[tinker.Datum]:
        data = []
        for row in range(8):
            tokens = [20 + (3 * row + step) % 40 for step in range(12)]
            data.append(
                tinker.Datum(
                    model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": tinker.TensorData.from_numpy(np.array(tokens[1:])),
                        "weights": tinker.TensorData.from_numpy(np.ones(11, np.float32)),
                    },
                )
            )
        return data

    def __len__(self) -> int:
        return self._batches

    def set_epoch(self, seed: int = 0) -> None:
        """The order does not matter."""


@chz.chz
class Builder(SupervisedDatasetBuilder):
    batches: int

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        return Counting(self.batches), None


if __name__ == "__main__":
    log = Path("supervised")
    config = train.Config(
        log_path=str(log),
        model_name=sys.argv[1],
        recipe_name="interop",
        dataset_builder=Builder(batches=6),
        learning_rate=1e-3,
        lora_rank=8,
        num_epochs=1,
        save_every=3,
        eval_every=0,
    )
    asyncio.run(train.main(config))
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    saved = [json.loads(line) for line in (log / "checkpoints.jsonl").read_text().splitlines()]
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    print(json.dumps({"losses": losses, "saved": saved}), flush=True)
