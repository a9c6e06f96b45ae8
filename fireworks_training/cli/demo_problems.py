"""The demo's problems and records: a problem file read and split, and the values kept of a run.

Knows files and numbers. Does not know training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fireworks_training import InvalidArgument


@dataclass(frozen=True)
class Problem:
    """Holds a question and its right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class StepRecord:
    """Holds the metrics of one step: a line of `metrics.jsonl`.

    Attributes:
        step: number of the step, from 0.
        reward: mean over the step's completions, 0 to 1.
        held_out_accuracy: share of held-out problems solved at temperature 1; None after steps
            without scoring.
        window: requests that the concurrency controller allows in flight.
        tokens_per_second: completion tokens sampled a second.
        drift_mean_abs, drift_max_abs: difference of the sampled tokens' logprobs between the engine
            that sampled them and the trainer that trains on them; natural log.
        grad_norm: norm of the gradient before clipping.
        snapshot: the snapshot that was sampled from.
        seconds: duration of the step.
    """

    step: int
    reward: float
    held_out_accuracy: float | None
    window: float
    tokens_per_second: float
    drift_mean_abs: float
    drift_max_abs: float
    grad_norm: float
    snapshot: str
    seconds: float


@dataclass(frozen=True)
class Score:
    """Counts right answers among those given."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right / self.total


def load_problems(path: Path) -> list[Problem]:
    """Read problems from a JSONL file of `{"prompt": ..., "answer": ...}`.

    Both are strings that are not empty; an answer may also be an integer.

    Raises:
        InvalidArgument: a line is no such object (it names the line), or fewer than two are.
    """
    problems: list[Problem] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            problems.append(_problem(json.loads(line.decode("utf-8"))))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidArgument(
                f"{path}, line {number}: an object with 'prompt' and 'answer' is needed ({error!r})"
            ) from error
    if len(problems) < 2:
        raise InvalidArgument(f"{path} has {len(problems)} problems; at least two are needed")
    return problems


def _problem(row: Mapping[str, object]) -> Problem:
    prompt, answer = row["prompt"], row["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise TypeError("'prompt' has to be a string, 'answer' a string or an integer")
    if not prompt.strip() or not answer.strip():
        raise ValueError("'prompt' or 'answer' is empty")
    return Problem(prompt, answer.strip())


def split(problems: Sequence[Problem], held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Split into training and held-out problems: the last `held_out` ones, at most half.

    The split is by place, since the file that ships keeps its last 400 apart: their pairs of
    numbers occur neither in the others nor in what the model was pretrained on.
    """
    kept = min(held_out, len(problems) // 2)
    return list(problems[:-kept]), list(problems[-kept:])
