"""One side of `grpo_step.py`: TRL's GRPOTrainer, a step for each line on standard input.

Runs in an interpreter of its own that has TRL. Prints `ready ...`, then the seconds of each step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class OneAtATime(TrainerCallback):
    """Waits for a line before each step, and prints how long the step took."""

    began = 0.0

    def on_step_begin(self, *_args, **_kwargs):
        if not sys.stdin.readline():
            sys.exit(0)
        self.began = time.perf_counter()

    def on_step_end(self, *_args, **_kwargs):
        print(f"{time.perf_counter() - self.began:.6f}", flush=True)


def settings(tuned: bool, job: dict, folder: str) -> GRPOConfig:
    """TRL as it comes, or with what makes it faster here: no checkpointing, no bf16 on a CPU that
    emulates it, one micro-batch, nothing logged."""
    rows = job["prompts"] * job["samples"]
    common = {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": 10_000,
        "learning_rate": 1e-4,
        "num_generations": job["samples"],
        "max_completion_length": job["max_tokens"],
        "temperature": 1.0,
        "beta": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "generation_kwargs": {"min_new_tokens": job["min_tokens"]} if job["min_tokens"] else None,
        "seed": 0,
    }
    if not tuned:
        return GRPOConfig(
            per_device_train_batch_size=rows // 8, gradient_accumulation_steps=8, **common
        )
    return GRPOConfig(
        per_device_train_batch_size=rows // job["micro_batches"],
        gradient_accumulation_steps=job["micro_batches"],
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=10_000,
        dataloader_pin_memory=False,
        optim="adamw_torch_fused",
        disable_dropout=False,
        shuffle_dataset=False,
        **common,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="JSON: model, problems, prompts, samples, tokens, threads")
    parser.add_argument("--default", action="store_true")
    arguments = parser.parse_args()
    job = json.loads(arguments.job)
    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [json.loads(line) for line in Path(job["problems"]).read_text("utf-8").splitlines()]
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]}
            for row in rows
        ]
    )

    def reward(completions, answer, **_others):
        texts = [completion[0]["content"] for completion in completions]
        if job["min_tokens"]:  # no room for an answer: any reward that varies will do
            return [float(len(text) % 2) for text in texts]
        return [
            float(text.rpartition("####")[2].strip() == str(right))
            for text, right in zip(texts, answer, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            reward_funcs=reward,
            args=settings(not arguments.default, job, folder),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[OneAtATime()],
        )
        print(
            f"ready trl {trl.__version__}, transformers {transformers.__version__}, "
            f"torch {torch.__version__}",
            flush=True,
        )
        trainer.train()


if __name__ == "__main__":
    main()
