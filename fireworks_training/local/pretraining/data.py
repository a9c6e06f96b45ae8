"""Pretraining sequences: token ids with the labels that count, in batches of similar prompts.

Knows the curriculum. *Drills* come first: bare equations, the cheapest way to learn arithmetic.
Then come chats that show their working, and last the habit that RL is to undo: chats that mostly
blurt. Every answer in the data is right; the blurted ones are merely more than one forward pass of
a small model can find. Does not know the model or the optimizer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from fireworks_training.local.pretraining.problems import Arithmetic, Style, draw_problem
from fireworks_training.local.pretraining.tokenizer import END, START

IGNORED = -100
"""Label of a position that has no part in the loss (torch's default `ignore_index`)."""

_POOL = 16  # batches drawn together, so that similar prompts can share one
_EQUATIONS = 7  # a drill is about as long as a chat
_UNSEEN_WORDS = 0.03


@dataclass(frozen=True, slots=True)
class Phase:
    """Sets a stretch of pretraining: the share of the steps at which it ends, and its mix.

    Attributes:
        until: share of all steps at which it ends.
        drills: share of drills among its examples; the others are chats.
        working: share of chats that show their working.
    """

    until: float
    drills: float
    working: float


# The habit: in the last phase three chats in eight show their working.
CURRICULUM = (
    Phase(until=0.25, drills=0.95, working=0.95),
    Phase(until=0.75, drills=0.25, working=0.95),
    Phase(until=1.0, drills=0.05, working=0.38),
)


@dataclass(frozen=True, slots=True)
class Example:
    """Holds one sequence: `ids` and, at the same positions, `labels` (or `IGNORED`)."""

    ids: list[int]
    labels: list[int]

    def prompt_length(self) -> int:
        """Counts the positions before the first one that counts."""
        return next(place for place, label in enumerate(self.labels) if label != IGNORED)


class Encoder:
    """Turns problems into examples."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._start = vocabulary[START]
        self._end = vocabulary[END]

    def prompt(self, problem: Arithmetic) -> list[int]:
        """Encodes the chat prompt of a problem, up to where the assistant starts to write."""
        messages = [{"role": "user", "content": problem.prompt}]
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return self._encode(str(text))

    def chat(self, problem: Arithmetic, style: Style) -> Example:
        """Encodes a problem with its answer in a style; only the answer and its end count."""
        prompt = self.prompt(problem)
        completion = [*self._encode(problem.completion(style)), self._end]
        return Example(prompt + completion, [IGNORED] * len(prompt) + completion)

    def drill(self, rng: random.Random) -> Example:
        """Draws a row of equations with operands as in open problems; only the results count."""
        ids, labels = [self._start], [IGNORED]
        drawn = 0
        while drawn < _EQUATIONS:
            for left, sign, right, result in draw_problem(rng, "open").steps():
                asked = self._encode(f"{left}{sign}{right}=")
                answered = self._encode(f"{result}, ")
                ids += asked + answered
                labels += [IGNORED] * len(asked) + answered
                drawn += 1
        return Example(ids, labels)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def batches(
    encoder: Encoder, seed: int, steps: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields `steps` pairs (ids, labels), both int64 [batch_size, longest], padded on the right.

    Causal attention never looks to the right, so the padding needs no mask. Batches gather similar
    prompts, not similar totals: with a batch for each style, the mean over tokens would count a
    short style more often than it is drawn.
    """
    rng = random.Random(f"pretraining {seed}")  # noqa: S311
    for start in range(0, steps, _POOL):
        phase = next(phase for phase in CURRICULUM if start < phase.until * steps)
        count = min(_POOL, steps - start)
        pool = sorted(
            (_draw_example(rng, encoder, phase) for _ in range(count * batch_size)),
            key=Example.prompt_length,
        )
        groups = [pool[row : row + batch_size] for row in range(0, len(pool), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(example.ids) for example in group)
            yield (
                torch.tensor([_padded(example.ids, 0, longest) for example in group]),
                torch.tensor([_padded(example.labels, IGNORED, longest) for example in group]),
            )


def _draw_example(rng: random.Random, encoder: Encoder, phase: Phase) -> Example:
    if rng.random() < phase.drills:
        return encoder.drill(rng)
    problem = draw_problem(rng, "open", _UNSEEN_WORDS)
    return encoder.chat(problem, "working" if rng.random() < phase.working else "blurt")


def _padded(values: list[int], filler: int, length: int) -> list[int]:
    return values + [filler] * (length - len(values))
