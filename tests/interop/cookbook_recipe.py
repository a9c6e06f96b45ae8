"""Runs one recipe of the vendor's cookbook on a few problems; prints its metrics as JSON lines.

    python cookbook_recipe.py RECIPE DATA OUT TOKENIZER

The cookbook's folder is FIREWORKS_COOKBOOK. Run as it is, the recipe uses the official SDK; run by
`python -m fireworks_training.dropin`, it uses this package.
"""

import dataclasses
import importlib
import os
import sys

MODEL, SHAPE = "accounts/local/models/tiny-qwen3", "accounts/local/trainingShapes/cpu"


def main(recipe: str, data: str, out: str, tokenizer: str) -> None:
    sys.path.insert(0, os.environ["FIREWORKS_COOKBOOK"])
    sdk = importlib.import_module("fireworks.training.sdk")
    print("SDK", sdk.FiretitanServiceClient.__module__, flush=True)
    loop = importlib.import_module(f"training.recipes.{recipe}")
    config = importlib.import_module("training.utils.config")
    wanted = {
        "log_path": out,
        "base_model": MODEL,
        "dataset": data,
        "tokenizer_model": tokenizer,
        "renderer_name": "qwen3_instruct",
        "epochs": 1,
        "batch_size": 4,
        "max_seq_len": 256,
        "lora_rank": 0,
        "trainer": config.TrainerConfig(training_shape_id=SHAPE),
    }
    known = {field.name for field in dataclasses.fields(loop.Config)}
    loop.main(loop.Config(**{name: value for name, value in wanted.items() if name in known}))


if __name__ == "__main__":
    main(*sys.argv[1:])
