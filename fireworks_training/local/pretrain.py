# pyright: standard
"""`python -m fireworks_training.local.pretrain --out DIR`: makes the small model that ships.

Writes a Hugging Face directory, `pretrain.json` beside the weights (the plan, the loss curve, the
scores, the hash), and the problem file of the demo. Knows files and the command line. Does not know
the training itself, which is in `pretraining`.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict
from pathlib import Path

import click
import torch
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from fireworks_training.local.pretraining.evaluate import MAX_NEW_TOKENS, ModelEvaluation, evaluate
from fireworks_training.local.pretraining.problems import Arithmetic, draw_unique
from fireworks_training.local.pretraining.tokenizer import BOS, END, PAD, build_tokenizer
from fireworks_training.local.pretraining.train import (
    MAX_CONTEXT,
    LossPoint,
    PretrainingPlan,
    pretrain,
    repeatable,
)

OPEN_PROBLEMS = 1600
HELD_OUT_PROBLEMS = 400
EVALUATION_PROBLEMS = 400
_DEFAULTS = PretrainingPlan()


def demo_problems(seed: int) -> list[Arithmetic]:
    """Draws the demo's problems, all different: 1600 open ones, then 400 held-out ones.

    The operand pairs of the last 400 occur neither in the first 1600 nor in pretraining.
    """
    rng = random.Random(f"problems {seed}")  # noqa: S311
    return [
        *draw_unique(rng, "open", OPEN_PROBLEMS),
        *draw_unique(rng, "held_out", HELD_OUT_PROBLEMS),
    ]


def write_problems(problems: list[Arithmetic], path: Path) -> None:
    """Writes JSONL: `prompt`, and `answer` as a string that holds an integer."""
    lines = [json.dumps({"prompt": p.prompt, "answer": str(p.answer)}) for p in problems]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> str:
    """Writes the model directory; returns the SHA-256 of `model.safetensors` in hex.

    Turns `model` into bfloat16, the precision that is stored.
    """
    vocabulary = tokenizer.get_vocab()
    model.bfloat16()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    weights = out / "model.safetensors"
    weights.chmod(0o644)  # safetensors writes files that only their owner may read
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def make_model(
    plan: PretrainingPlan, out: Path, evaluation_problems: int = EVALUATION_PROBLEMS
) -> str:
    """Pretrains by a plan, writes the directory with its `pretrain.json`, returns the hash."""
    tokenizer = build_tokenizer(MAX_CONTEXT)
    curve: list[LossPoint] = []

    def report(progress: LossPoint) -> None:
        curve.append(progress)
        click.echo(
            f"step {progress.step}/{plan.steps}  loss {progress.loss:.3f}  {progress.seconds:.0f} s"
        )

    with repeatable(plan.seed):
        model = pretrain(plan, tokenizer, report)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        digest = write_model(model, tokenizer, out)
        # Scored as served: rounded to bfloat16, computed in float32.
        rng = random.Random(f"evaluation {plan.seed}")  # noqa: S311
        held_out = draw_unique(rng, "held_out", evaluation_problems)
        model.float()  # type: ignore[no-untyped-call]
        scores = evaluate(model, tokenizer, held_out)
    _write_log(out / "pretrain.json", plan, parameters, curve, scores, digest)
    click.echo(f"{parameters} parameters, sha256 {digest}")
    click.echo("  ".join(f"{name} {value:.3g}" for name, value in asdict(scores).items()))
    return digest


def _write_log(
    path: Path,
    plan: PretrainingPlan,
    parameters: int,
    curve: list[LossPoint],
    scores: ModelEvaluation,
    digest: str,
) -> None:
    log = {
        "plan": asdict(plan),
        "parameters": parameters,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "sha256": digest,
        "held_out": asdict(scores),
        "seconds": round(curve[-1].seconds, 1),
        "loss_curve": [[point.step, round(point.loss, 4)] for point in curve],
    }
    path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--seed", type=click.IntRange(min=0), default=_DEFAULTS.seed, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=_DEFAULTS.steps, show_default=True)
@click.option(
    "--problems",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write the demo's problem file.  [default: OUT/problems.jsonl]",
)
def main(out: Path, seed: int, steps: int, problems: Path | None) -> None:
    """Makes the small model and the demo's problem file from a seed."""
    write_problems(demo_problems(seed), problems or out / "problems.jsonl")
    make_model(PretrainingPlan(seed=seed, steps=steps), out)


if __name__ == "__main__":
    main()
