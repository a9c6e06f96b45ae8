"""Short arithmetic word problems: their stories, and how they are drawn, split and answered.

Knows the stories, the two ways of answering, and which operand pairs are held out. Does not know
tokens or tensors. All randomness comes from the `random.Random` that the caller passes, so equal
seeds give equal problems on every machine.

A problem is one or two additions or subtractions on whole numbers. Every number in it, partial
results included, lies in 1..99. A problem is *held out* when each operand pair that its working
meets is a held-out pair, and *open* when none is; mixed ones are never drawn. Pairs are unordered
and shared by both operators: a model that has seen 17+25 has seen 25-17.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["open", "held_out"]
Style = Literal["working", "blurt"]

LARGEST = 99
ANSWER_MARK = "####"
_PAIR_BUCKETS = 20
_HELD_OUT_BUCKETS = 3

PRONOUNS = {
    "Tom": "he",
    "Anna": "she",
    "Ben": "he",
    "Mia": "she",
    "Sam": "he",
    "Lily": "she",
    "Max": "he",
    "Eva": "she",
    "Leo": "he",
    "Zoe": "she",
}
ITEMS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cookies",
    "eggs",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stickers",
    "toys",
)


@dataclass(frozen=True, slots=True)
class Story:
    """Holds a template: `text` with {n}, {m} (names), {p} (n's pronoun), {i} (item), {a}, {b}, {c}.

    `signs` holds one sign for each operation: "+-" means a+b-c.
    """

    text: str
    signs: str


STORIES = (
    Story("{n} has {a} {i} and gets {b} more. How many {i} does {p} have?", "+"),
    Story("{n} has {a} {i} and gives away {b}. How many {i} are left?", "-"),
    Story("{n} has {a} {i} and {m} has {b}. How many {i} do they have together?", "+"),
    Story("There are {a} {i} in a box. {n} takes {b}. How many {i} are left?", "-"),
    Story("{n} has {a} {i}. {n} finds {b} more, then buys {c}. How many {i} does {p} have?", "++"),
    Story("{n} has {a} {i}. {n} gets {b} more and loses {c}. How many {i} are left?", "+-"),
    Story("{n} has {a} {i}. {n} sells {b}, then buys {c}. How many {i} does {p} have now?", "-+"),
    Story("{n} has {a} {i}. {n} gives {m} {b} and loses {c}. How many {i} are left?", "--"),
    Story("A box has {a} {i}. {n} takes {b} and {m} takes {c}. How many {i} are left?", "--"),
    Story("A box has {a} {i}. {n} adds {b} and {m} takes {c}. How many {i} are in the box?", "+-"),
    Story("A box has {a} {i}. {n} takes {b} and {m} adds {c}. How many {i} are in the box?", "-+"),
    Story("{n} buys {a} {i}, {m} buys {b} and then {c} more. How many {i} are there now?", "++"),
)
# One-step stories are what a forward pass can answer at once; kept rare so that blurting fails.
_ONE_STEP_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Holds one problem: the prompt, the operands in order, and one sign for each operation."""

    prompt: str
    operands: tuple[int, ...]
    signs: str

    def steps(self) -> Iterator[tuple[int, str, int, int]]:
        """Yields each operation of the working as (left, sign, right, result)."""
        left = self.operands[0]
        for sign, right in zip(self.signs, self.operands[1:], strict=True):
            result = left + right if sign == "+" else left - right
            yield left, sign, right, result
            left = result

    @property
    def answer(self) -> int:
        """The final number, 1..99."""
        *_, (_, _, _, result) = self.steps()
        return result

    def completion(self, style: Style) -> str:
        """Writes the right answer in a style: ``#### 11``, or ``4+7=11. #### 11``."""
        final = f"{ANSWER_MARK} {self.answer}"
        if style == "blurt":
            return final
        working = ", ".join(
            f"{left}{sign}{right}={result}" for left, sign, right, result in self.steps()
        )
        return f"{working}. {final}"


def is_held_out_pair(left: int, right: int) -> bool:
    """Tells whether an unordered operand pair is kept away from pretraining and from RL."""
    low, high = sorted((left, right))
    return zlib.crc32(f"{low}:{high}".encode()) % _PAIR_BUCKETS < _HELD_OUT_BUCKETS


def split_of(problem: Arithmetic) -> Split | None:
    """Finds the split that a problem belongs to; None when its pairs are mixed."""
    held_out = {is_held_out_pair(left, right) for left, _, right, _ in problem.steps()}
    if len(held_out) > 1:
        return None
    return "held_out" if held_out.pop() else "open"


def draw_problem(rng: random.Random, split: Split, unseen_words: float = 0.0) -> Arithmetic:
    """Draws one problem of a split.

    `unseen_words` is the chance of spelling the names and the item with made-up words, which the
    tokenizer breaks into bytes: the shipped model should not stumble over a new name.
    """
    one_step = rng.random() < _ONE_STEP_SHARE
    story = rng.choice([s for s in STORIES if (len(s.signs) == 1) == one_step])
    while True:
        problem = _fill(rng, story, made_up=rng.random() < unseen_words)
        if (
            all(1 <= result <= LARGEST for *_, result in problem.steps())
            and split_of(problem) == split
        ):
            return problem


def draw_unique(rng: random.Random, split: Split, count: int) -> list[Arithmetic]:
    """Draws `count` problems of a split whose prompts all differ."""
    unique: dict[str, Arithmetic] = {}
    while len(unique) < count:
        problem = draw_problem(rng, split)
        unique.setdefault(problem.prompt, problem)
    return list(unique.values())


def final_answer(completion: str) -> int | None:
    """Reads the integer after the last ``####`` of a completion; None when there is none."""
    _, mark, tail = completion.rpartition(ANSWER_MARK)
    tail = tail.strip()
    return int(tail) if mark and tail.isascii() and tail.isdigit() else None


def words() -> list[str]:
    """Lists every word that the stories, names and items use, in the forms that texts contain.

    A form is the bare word where a text may start with it, and the word after a space.
    """
    found: set[str] = set()
    for story in STORIES:
        for name, pronoun in PRONOUNS.items():
            for item in ITEMS:
                text = story.text.format(n=name, m=name, p=pronoun, i=item, a=0, b=0, c=0)
                found.update(_word_forms(text))
    return sorted(found)


def _word_forms(text: str) -> Sequence[str]:
    first, *rest = text.split(" ")
    forms = [first, *(f" {word}" for word in rest)]
    return [stripped for form in forms if (stripped := form.rstrip(".,?")).strip().isalpha()]


def _fill(rng: random.Random, story: Story, made_up: bool) -> Arithmetic:
    name, other = rng.sample(tuple(PRONOUNS), 2)
    pronoun = PRONOUNS[name]
    item = rng.choice(ITEMS)
    if made_up:
        name, other, item = _made_up(rng).title(), _made_up(rng).title(), _made_up(rng)
    operands = tuple(rng.randint(2, 50) for _ in range(len(story.signs) + 1))
    numbers = dict(zip("abc", operands, strict=False))
    prompt = story.text.format(n=name, m=other, p=pronoun, i=item, **numbers)
    return Arithmetic(prompt, operands, story.signs)


def _made_up(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))
