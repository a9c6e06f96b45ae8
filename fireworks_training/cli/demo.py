"""`fireworks-training demo`: a small model learns arithmetic word problems while you watch.

The loop is in `demo_loop`, its display in `demo_report`. Knows options, files and the order of the
parts, and reports wrong input. Does not know how training works.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

import fireworks_training
from fireworks_training import (
    AsyncFiretitanServiceClient,
    DeploymentSampler,
    FireworksTrainingError,
)
from fireworks_training.cli.demo_loop import LoopPlan, score, sync, train
from fireworks_training.cli.demo_problems import (
    Problem,
    Score,
    StepRecord,
    load_problems,
    split,
)
from fireworks_training.cli.demo_report import Report, draw_curve, result_table, wilson

SHIPPED_PROBLEMS = Path(fireworks_training.__file__).parent / "local" / "assets" / "problems.jsonl"
MODEL = "accounts/local/models/tiny-qwen3"
FOLDER = "fireworks-demo"
INTERRUPTED = 130
METRICS, SUMMARY, CURVE = "metrics.jsonl", "summary.json", "curve.png"
EVALUATIONS = ("before", "before-greedy", "after", "after-greedy")
WRITTEN = (METRICS, SUMMARY, CURVE, *(f"{name}.jsonl" for name in EVALUATIONS))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSONL file of {"prompt", "answer"}.  [default: word problems that ship]',
)
@click.option("--steps", type=click.IntRange(1), default=LoopPlan.steps, show_default=True)
@click.option("--seed", type=int, default=LoopPlan.seed, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    show_default=f"{FOLDER}, or the next free {FOLDER}-2, ...",
    help="Folder for metrics.jsonl, summary.json, curve.png and the evaluations; one that holds "
    "a run is refused.",
)
@click.option(
    "--prompts-per-step",
    "--prompts",
    "prompts",
    type=click.IntRange(1),
    default=LoopPlan.prompts,
    show_default=True,
    help="Problems a step.",
)
@click.option(
    "--samples",
    type=click.IntRange(2),
    default=LoopPlan.samples,
    show_default=True,
    help="Completions of each problem.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=LoopPlan.learning_rate,
    show_default=True,
)
@click.option(
    "--held-out",
    type=click.IntRange(1),
    default=LoopPlan.held_out,
    show_default=True,
    help="Problems kept for scoring.",
)
@click.option(
    "--base-url", default="local", show_default=True, help='"local", or a platform\'s URL.'
)
def demo(
    data: Path | None,
    steps: int,
    seed: int,
    out: Path | None,
    prompts: int,
    samples: int,
    learning_rate: float,
    held_out: int,
    base_url: str,
) -> None:
    """Train, sync and score a small model on this machine, offline."""
    plan = LoopPlan(
        steps=steps,
        prompts=prompts,
        samples=samples,
        learning_rate=learning_rate,
        held_out=held_out,
        seed=seed,
    )
    console = Console()
    metrics = Path()
    try:
        problems = load_problems(data or SHIPPED_PROBLEMS)
        folder = free_folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / METRICS
        asyncio.run(run(console, problems, plan, folder, base_url))
    except (FireworksTrainingError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        print_line(console, interrupted(metrics))
        sys.exit(INTERRUPTED)


def free_folder(asked: Path | None) -> Path:
    """Find the folder of a run: the one asked for, else the first of the default's names.

    Raises:
        ClickException: the folder asked for holds another run.
    """
    if asked is not None:
        if held := [name for name in WRITTEN if (asked / name).exists()]:
            raise click.ClickException(
                f"{asked} holds another run ({held[0]}): choose another folder, or remove that one"
            )
        return asked
    names = (FOLDER if n == 1 else f"{FOLDER}-{n}" for n in itertools.count(1))
    return next(Path(name) for name in names if not Path(name).exists())


def print_line(console: Console, text: str) -> None:
    """Print a line without wrapping or colouring it."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def interrupted(metrics: Path) -> str:
    """Describe a run that ended by Ctrl-C: its steps, and the file that is kept."""
    steps = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    if not steps:
        return "interrupted before the first step was done"
    return f"interrupted after step {steps}; what was measured so far is in {metrics}"


async def run(
    console: Console,
    problems: list[Problem],
    plan: LoopPlan,
    out: Path,
    base_url: str,
    api_key: str | None = None,
) -> dict[str, object]:
    """Run the whole demo; returns the contents of `summary.json`."""
    training, held_out = split(problems, plan.held_out)
    print_line(
        console,
        f"{len(training)} problems to train on, {len(held_out)} held out; "
        f"starting the platform at base_url={base_url!r} ...",
    )
    began = time.monotonic()
    async with AsyncFiretitanServiceClient.from_firetitan_config(
        base_url=base_url,
        api_key=api_key,
        base_model=MODEL,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        client = await service.create_training_client()
        sampler = await sync(service, client, "untrained")
        before, greedy_before = await both_scores(sampler, held_out, plan, out, "before")
        print_line(
            console,
            f"ready after {time.monotonic() - began:.1f} s; held-out accuracy "
            f"{before.accuracy:.3f} sampled, {greedy_before.accuracy:.3f} greedy",
        )
        trained_from = time.monotonic()
        with Report(console, out, plan.steps) as report:
            sampler = await train(service, training, held_out, plan, report.add)
        seconds = time.monotonic() - trained_from
        after, greedy_after = await both_scores(sampler, held_out, plan, out, "after")
    scores = {"temperature 1": (before, after), "greedy": (greedy_before, greedy_after)}
    timing = {"seconds": seconds, "total_seconds": time.monotonic() - began}
    return conclude(console, plan, report.records, scores, timing, out)


async def both_scores(
    sampler: DeploymentSampler, held_out: Sequence[Problem], plan: LoopPlan, out: Path, when: str
) -> tuple[Score, Score]:
    """Score at temperature 1 and greedily, each with a record of prompts and completions."""
    sampled = await score(
        sampler, held_out, temperature=1.0, seed=plan.seed, record=out / f"{when}.jsonl"
    )
    greedy = await score(
        sampler, held_out, temperature=0.0, seed=plan.seed, record=out / f"{when}-greedy.jsonl"
    )
    return sampled, greedy


def conclude(
    console: Console,
    plan: LoopPlan,
    records: Sequence[StepRecord],
    scores: dict[str, tuple[Score, Score]],
    timing: dict[str, float],
    out: Path,
) -> dict[str, object]:
    """Show the table and write the files; returns the contents of `summary.json`.

    Args:
        timing: `seconds` of the loop, and `total_seconds` with start, scoring and end.
    """
    (before, after), (greedy_before, greedy_after) = scores["temperature 1"], scores["greedy"]
    summary: dict[str, object] = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "greedy_before": greedy_before.accuracy,
        "greedy_after": greedy_after.accuracy,
        "interval_before": list(wilson(before)),
        "interval_after": list(wilson(after)),
        **timing,
        "drift_mean_abs": max(record.drift_mean_abs for record in records),
        "drift_max_abs": max(record.drift_max_abs for record in records),
        **dataclasses.asdict(plan),
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    console.print(result_table(scores))
    written = [METRICS, SUMMARY, *(f"{name}.jsonl" for name in EVALUATIONS)]
    try:
        draw_curve(out / CURVE, records, before, after)
        written.append(CURVE)
    except ImportError:
        print_line(console, f"(no {CURVE}: matplotlib is not installed)")
    print_line(
        console,
        f"{plan.steps} steps in {timing['seconds']:.0f} s. Engine and trainer differ by at most "
        f"{summary['drift_mean_abs']:.1e} on average over a step's tokens, "
        f"{summary['drift_max_abs']:.1e} on any one.\n"
        f"Written to {out}: {', '.join(written)}",
    )
    return summary
