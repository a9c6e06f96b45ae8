"""The demo's display and files: live lines, the table of results, `metrics.jsonl`, `curve.png`.

Knows records of steps. Does not know training or sampling.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fireworks_training.cli.demo_problems import Score, StepRecord

BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = 12
"""Steps that the live table shows, the newest ones."""


def wilson(score: Score, z: float = 1.959964) -> tuple[float, float]:
    """Compute the Wilson score interval of a share (E. B. Wilson, 1927); 95 % by default."""
    n, p = score.total, score.accuracy
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def sparkline(shares: Sequence[float], width: int = 60) -> str:
    """Draw shares from 0 to 1 as blocks, one a step; more steps than `width` are thinned."""
    kept = (
        [shares[i * len(shares) // width] for i in range(width)] if len(shares) > width else shares
    )
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(share * len(BLOCKS)))] for share in kept)


def line(record: StepRecord) -> str:
    """Format one step on one line."""
    held_out = record.held_out_accuracy
    return (
        f"step {record.step + 1:3}  reward {record.reward:.3f}  "
        f"held-out {'  -  ' if held_out is None else f'{held_out:.3f}'}  "
        f"window {record.window:3.0f}  {record.tokens_per_second:6.0f} tokens/s  "
        f"drift {record.drift_mean_abs:.1e}  {record.seconds:4.1f} s  {record.snapshot}"
    )


class Report:
    """Shows a run: live on a terminal, a line a step elsewhere, and always in a file.

    Args:
        console: shows the run.
        folder: folder of `metrics.jsonl`.
        steps: number of steps of the run.
    """

    def __init__(self, console: Console, folder: Path, steps: int) -> None:
        self.records: list[StepRecord] = []
        self._console = console
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("training", total=steps)
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._live.stop()
        self._file.close()

    def add(self, record: StepRecord) -> None:
        """Show and keep one step."""
        self.records.append(record)
        self._file.write(json.dumps(dataclasses.asdict(record)) + "\n")
        self._file.flush()
        self._progress.advance(self._task)
        if not self._console.is_terminal:
            self._console.print(line(record), soft_wrap=True, highlight=False)

    def _picture(self) -> Panel:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        styles = {"reward": "cyan", "held-out": "bold green", "snapshot": "dim"}
        for name in ("step", "reward", "held-out", "window", "tokens/s", "drift", "snapshot"):
            justify: Literal["left", "right"] = "left" if name == "snapshot" else "right"
            table.add_column(name, justify=justify, style=styles.get(name))
        for record in self.records[-SHOWN:]:
            held_out = record.held_out_accuracy
            table.add_row(
                str(record.step + 1),
                f"{record.reward:.3f}",
                "" if held_out is None else f"{held_out:.3f}",
                f"{record.window:.0f}",
                f"{record.tokens_per_second:.0f}",
                f"{record.drift_mean_abs:.1e}",
                record.snapshot,
            )
        shape = Text.assemble("reward  ", (sparkline([r.reward for r in self.records]), "cyan"))
        shown = Group(table, Text(), shape, self._progress)
        return Panel(shown, title="GRPO on word problems", expand=False, padding=(0, 1))


def result_table(scores: dict[str, tuple[Score, Score]]) -> Table:
    """Build the table of scores before and after, with 95 % intervals."""
    table = Table(title="Held-out problems solved")
    for name in ("", "before", "after", "gain"):
        table.add_column(name, justify="left" if not name else "right")
    for name, (before, after) in scores.items():
        gain = after.accuracy - before.accuracy
        table.add_row(
            name, _with_interval(before), _with_interval(after), f"{100 * gain:+.1f} points"
        )
    return table


def _with_interval(score: Score) -> str:
    low, high = wilson(score)
    return f"{100 * score.accuracy:.1f} %  [{100 * low:.1f}, {100 * high:.1f}]"


def _scores_on_the_way(records: Sequence[StepRecord], total: int) -> list[tuple[int, Score]]:
    """List the scores on held-out problems during the run, with the step before each."""
    return [
        (record.step + 1, Score(round(record.held_out_accuracy * total), total))
        for record in records
        if record.held_out_accuracy is not None
    ]


def draw_curve(path: Path, records: Sequence[StepRecord], before: Score, after: Score) -> None:
    """Draw reward and held-out accuracy over the steps.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = cast(Any, Figure(figsize=(7, 4), layout="constrained"))  # mostly untyped
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([r.step + 1 for r in records], [r.reward for r in records], label="reward (train)")
    points = [(0, before), *_scores_on_the_way(records, before.total), (len(records), after)]
    shares = [score.accuracy for _, score in points]
    # At a share of 0 or 1 rounding can put the bound on the wrong side by one part in 10^16.
    bars = [
        [max(0.0, score.accuracy - wilson(score)[0]) for _, score in points],
        [max(0.0, wilson(score)[1] - score.accuracy) for _, score in points],
    ]
    label = "held out, temperature 1 (95 % interval)"
    axes.errorbar([x for x, _ in points], shares, bars, fmt="o-", capsize=3, label=label)
    axes.set(xlabel="step", ylabel="share solved", ylim=(0, 1), title="GRPO on word problems")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
